"""Preference pairs from the model's own mistakes, and their log-probs under the model before the stage.

Made once, at the start of a `preference` stage, into `preferences/<stage>/` of the run directory:
`preferences.jsonl` (chat JSON with `rejected`, read back as any chat source), the media beside it and
`reference.npy`. A resumed run reads the same files.
"""

import dataclasses
import hashlib
import json
import math
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mm_jax.data.example import Example
from mm_jax.data.messages import (
    Audio,
    Box,
    Conversation,
    Image,
    Message,
    Part,
    Text,
    Video,
    conversation_to_json,
)
from mm_jax.data.packing import FirstFitPacker, Layout, collate, refusal, size_of
from mm_jax.errors import UserError
from mm_jax.models import Execution
from mm_jax.parallel import processes
from mm_jax.parallel.mesh import Demand, MeshConfig, make_mesh
from mm_jax.parallel.rules import place_tree
from mm_jax.serialize import from_json, to_json
from mm_jax.train.config import PreferenceConfig, Stage
from mm_jax.train.encode import Encode, PretrainedEncode, text_alone
from mm_jax.train.losses import answer_log_probs
from mm_jax.train.optimizer import tree_bytes
from mm_jax.train.setup import Setup, sample

ROWS = 16  # prompts answered at a time
LONGER = 4  # tokens by which an answer may exceed the longest right one; it is cut there, and wrong anyway


@dataclass(frozen=True)
class Pairs:
    """path: the chat JSONL, one pair a line. reference: float32 [pairs, 2], log-probs (chosen, rejected)."""

    path: Path
    reference: np.ndarray


def pairs(setup: Setup, name: str, params: dict[str, Any]) -> Pairs:
    """The pairs of stage `name`; mined with `params` unless the run directory has them.

    Of several processes each asks its share of the questions, with the whole model on its own devices.

    Raises:
        UserError: no question of the wanted tasks in the mixture.
    """
    directory = setup.run_dir / "preferences" / name
    if not processes.agree(directory.exists()):
        stage = setup.config.stages[name]
        setup, params = _here(setup, params)
        candidates = mine(setup, stage, params)
        reference = log_probs(setup, stage, params, [c for c, _ in candidates])
        right = [answer_text(pair.messages[-1].parts) for pair, _ in candidates]
        order = rank([wrong for _, wrong in candidates], reference, right)[: stage.preference.pairs]
        if not order:
            raise UserError(f'stage "{name}": no preference pair fits a row; raise batch.length')
        with processes.first() as first:
            if first:
                _write(
                    directory,
                    [dataclasses.replace(candidates[i][0], id=str(i)) for i in order],
                    reference[order],
                )
    return Pairs(directory / "preferences.jsonl", np.load(directory / "reference.npy"))


def _here(setup: Setup, params: dict[str, Any]) -> tuple[Setup, dict[str, Any]]:
    """Of several processes: with a copy of the parameters on the devices of this one alone."""
    if processes.count() == 1:
        return setup, params
    from jax.experimental import multihost_utils  # a process alone starts faster without

    decoder, rules = setup.model_config.decoder, setup.config.rules
    demand = Demand(ROWS, tree_bytes(params), math.gcd(decoder.num_heads, decoder.num_kv_heads))
    mesh = make_mesh(MeshConfig(), demand, jax.local_devices())
    places = place_tree(params, params, mesh, rules)

    def copy(x: jax.Array, place: jax.sharding.Sharding) -> jax.Array:
        return jax.device_put(multihost_utils.process_allgather(x, tiled=True), place)

    execution = Execution(mesh, rules.axes(), attention=setup.config.attention, context=setup.config.context)
    return dataclasses.replace(setup, execution=execution), jax.tree.map(copy, params, places)


def _write(directory: Path, found: list[Conversation], reference: np.ndarray) -> None:
    # Written elsewhere and renamed, so that a stop in between leaves no half of it.
    temporary = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with (temporary / "preferences.jsonl").open("w") as file:
        for pair in found:
            file.write(json.dumps(_to_json(pair, temporary)) + "\n")
    np.save(temporary / "reference.npy", reference)
    temporary.replace(directory)


def look_up(reference: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Reference log-probs float32 [..., G, 2] of pair indices [..., G]; unused (-1) ones are zero."""
    return np.where(index[..., None] >= 0, reference[np.maximum(index, 0)], 0).astype(np.float32)


def mine(setup: Setup, stage: Stage, params: dict[str, Any]) -> list[tuple[Conversation, bool]]:
    """(pair, is it the model's own mistake): every question once, with its greedy answer where it is wrong.

    A question answered rightly gets another answer of its task instead, the commonest one that is wrong here;
    `rank` then decides whether the pair is worth training on.
    """
    asked = questions(setup, stage)
    if not asked:
        raise UserError(f"no question of the tasks {', '.join(stage.preference.tasks)} in the mixture")
    common: dict[str, Counter] = {}
    parts: dict[str, tuple[Part, ...]] = {}
    for conversation in asked:
        answer = conversation.messages[-1]
        common.setdefault(answer.task, Counter())[answer_text(answer.parts)] += 1
        parts[answer_text(answer.parts)] = answer.parts
    found = []
    for conversation, said in zip(asked, _answers(setup, stage, params, asked), strict=True):
        gold = conversation.messages[-1]
        right = answer_text(gold.parts)
        wrong = bool(answer_text(said)) and answer_text(said) != right
        if not wrong:
            others = [text for text, _ in common[gold.task].most_common() if text != right]
            if not others:
                continue
            said = parts[others[0]]
        found.append((dataclasses.replace(conversation, rejected=tuple(said)), wrong))
    return found


def questions(setup: Setup, stage: Stage) -> list[Conversation]:
    """Training questions of the wanted tasks, one a conversation, spread evenly over the sources."""
    wanted: PreferenceConfig = stage.preference
    found: list[Conversation] = []
    for name in sorted(stage.mixture):
        mine: list[Conversation] = []
        limit = wanted.questions // len(stage.mixture)
        for conversation in sample(setup.sources[name], limit):
            for turn, message in enumerate(conversation.messages):
                if message.role != "assistant" or message.task not in wanted.tasks:
                    continue
                if not wanted.right_answers or answer_text(message.parts) in wanted.right_answers:
                    mine.append(alone(conversation, turn))
        keep = np.unique(np.linspace(0, len(mine) - 1, min(limit, len(mine))).astype(int)) if mine else []
        found += [mine[i] for i in keep]
    return found


def alone(conversation: Conversation, turn: int) -> Conversation:
    """The question answered in message `turn` on its own: earlier turns go, their media stay.

    [user: <image> "how many?"], [assistant: "2"], [user: "is there a dog?"], [assistant: "no"] with turn 3
    becomes [user: <image> "is there a dog?"], [assistant: "no"].
    """
    before = conversation.messages[: turn - 1]
    system = tuple(m for m in before if m.role == "system")
    media = tuple(
        p for m in before if m.role == "user" for p in m.parts if isinstance(p, Image | Audio | Video)
    )
    user = conversation.messages[turn - 1]
    user = dataclasses.replace(user, parts=media + user.parts)
    return dataclasses.replace(conversation, messages=(*system, user, conversation.messages[turn]))


def answer_text(parts: tuple[Part, ...] | list[Part]) -> str:
    """Answers that read the same are the same: text lower-cased, boxes as rounded numbers."""
    words = [p.text if isinstance(p, Text) else str([round(x) for x in p.box]) for p in parts
             if isinstance(p, Text | Box)]  # fmt: skip
    return " ".join(" ".join(words).lower().split())


def rank(wrong: list[bool], reference: np.ndarray, right: list[str]) -> list[int]:
    """Indices of usable pairs, the right answers in turn: what is always right needs no look at the picture.

    Among the pairs with one right answer the model's own mistakes come first, then those whose rejected answer is the
    likeliest. A model that says "yes" too often would otherwise get nothing but "no" to prefer, and say that instead.
    """
    usable = [i for i in range(len(wrong)) if np.isfinite(reference[i]).all()]
    best = sorted(usable, key=lambda i: (not wrong[i], -reference[i, 1], i))
    seen: Counter[str] = Counter()
    turn = {}
    for i in best:
        turn[i] = seen[right[i]]
        seen[right[i]] += 1
    return sorted(best, key=lambda i: turn[i])


def log_probs(setup: Setup, stage: Stage, params: dict[str, Any], found: list[Conversation]) -> np.ndarray:
    """float32 [pairs, 2]: summed answer log-probs (chosen, rejected) in one pass over packed rows.

    NaN where a pair cannot be encoded or fits no row. Of several processes each scores its share.
    """
    encode = Encode.of(setup.processor, stage)
    batch = dataclasses.replace(stage.batch, accumulate=1)
    layout = Layout.of(encode.processor, two_way=setup.config.model.two_way)
    packer, rows = FirstFitPacker(batch), []
    for index in range(processes.index(), len(found), processes.count()):
        conversation = found[index]
        try:
            example = dataclasses.replace(encode(conversation), source="preferences", preference=index)
        except UserError:
            continue
        if refusal(example, batch) is None:
            full = packer.add(example, size_of(example))
            rows += [full] if full else []
    rows += packer.rows
    score = jax.jit(lambda params, arrays: answer_log_probs(setup.apply(params, arrays), arrays))
    result = np.full((len(found), 2), np.nan, np.float32)
    for start in range(0, len(rows), batch.rows):
        part = rows[start : start + batch.rows]
        part = part + [[]] * (batch.rows - len(part))
        arrays = collate(part, batch, layout, {"preferences": 0})
        index, used = arrays["preference"], arrays["preference"] >= 0
        result[index[used]] = np.asarray(score(params, arrays))[used]
    everyone = processes.gather(result.tolist())
    scored = [everyone[k % len(everyone)][k] for k in range(len(found))]
    return np.array(scored, np.float32).reshape(-1, 2)


def _answers(
    setup: Setup, stage: Stage, params: dict[str, Any], asked: list[Conversation]
) -> list[list[Part]]:
    """Greedy answers to conversations that end with the right answer; of several processes each asks its share."""
    from mm_jax.lm import LanguageModel  # not needed by the other stages

    encode = Encode.of(setup.processor, stage)
    mine = asked[processes.index() :: processes.count()]
    prompts: list[tuple[Message, ...]] = [c.messages[:-1] for c in mine]
    distinct = {answer_text(c.messages[-1].parts): c for c in asked}
    answers = [_without_media(encode, c) for c in list(distinct.values())[:100]]
    longest = max(int((example.loss_weights > 0).sum()) for example in answers) + LONGER
    room = max(1024, stage.batch.length + longest)
    lm = LanguageModel(setup.model_config, params, encode.processor, max_length=room)
    found: list[list[Part]] = []
    quiet = None if processes.is_first() else True
    for start in tqdm(range(0, len(prompts), ROWS), desc="own answers", disable=quiet, leave=False):
        chunk = prompts[start : start + ROWS]
        # The last batch is filled up, so that its shape needs no program of its own.
        found += lm.answer(chunk + chunk[-1:] * (ROWS - len(chunk)), longest)[: len(chunk)]
    everyone = processes.gather([to_json(tuple(parts)) for parts in found])
    said = [everyone[k % len(everyone)][k // len(everyone)] for k in range(len(asked))]
    return [list(from_json(tuple[Text | Box, ...], parts)) for parts in said]


def _without_media(encode: Encode | PretrainedEncode, conversation: Conversation) -> Example:
    if isinstance(encode, PretrainedEncode):
        return encode.processor.example(text_alone(conversation))
    return encode.processor.example(conversation, media=False)


def _to_json(pair: Conversation, directory: Path) -> dict[str, Any]:
    """Chat JSON of a pair, encoded media as files in `directory`/media, each content once; files stay in place."""
    media = directory / "media"

    def found(source: Any) -> Any:
        if isinstance(source, list):
            return [found(one) for one in source]
        is_path = isinstance(source, str) and not source.startswith(("data:", "http://", "https://"))
        return str(Path(source).absolute()) if is_path else source

    def stored(part: Part) -> Part:
        if not isinstance(part, Image | Audio | Video):
            return part
        if not isinstance(part, Image | Audio) or not isinstance(part.source, bytes):
            return dataclasses.replace(part, source=found(part.source))
        media.mkdir(exist_ok=True)
        name = hashlib.sha256(part.source).hexdigest()[:24] + (".png" if isinstance(part, Image) else ".wav")
        (media / name).write_bytes(part.source)
        return dataclasses.replace(part, source=f"media/{name}", regions=())

    messages = [dataclasses.replace(m, parts=tuple(map(stored, m.parts))) for m in pair.messages]
    return conversation_to_json(dataclasses.replace(pair, messages=tuple(messages)))
