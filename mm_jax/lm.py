"""A model with what it needs to answer: modules, parameters and processor behind one interface."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from mm_jax.checkpoint.hf import HFCheckpoint, is_hf, load_hf, save_hf
from mm_jax.checkpoint.kept import is_kept, open_kept
from mm_jax.checkpoint.own import is_own, load_own
from mm_jax.checkpoint.pretrained import processor_of
from mm_jax.data.example import TAPS, Example
from mm_jax.data.media_rule import MediaRule
from mm_jax.data.messages import Audio, Conversation, Image, Message, Part, Text, messages_from_json
from mm_jax.data.packing import Layout
from mm_jax.data.pretrained import PretrainedProcessor
from mm_jax.errors import UserError, nearest
from mm_jax.families.media import layout_of
from mm_jax.inference.arrays import batch_of
from mm_jax.inference.attention import extended, reading_weights
from mm_jax.inference.batch import collate_prompts, count_bucket, span_bucket
from mm_jax.inference.embedding import Input, is_ids, question, unit
from mm_jax.inference.engine import Engine
from mm_jax.inference.programs import Programs
from mm_jax.inference.prompt import Medium, Prompt, prompt_of, prompts_of, text_prompt
from mm_jax.inference.request import Request
from mm_jax.inference.sampling import Sampling
from mm_jax.inference.session import ChatSession
from mm_jax.inference.text import answer_ids, render
from mm_jax.models import Execution, MultimodalConfig, MultimodalLM
from mm_jax.models.quantised import WEIGHTS, Quantised, Weights, quantised
from mm_jax.parallel.rules import Rules, place
from mm_jax.tower import Tower

if TYPE_CHECKING:
    from mm_jax.data.processor import Processor

Messages = Sequence[dict | Message]

ROWS = 64  # answered at a time; further ones wait for a row


class LanguageModel:
    """A multimodal language model.

    Attributes:
      family: name of the system that the weights belong to.
      config: sizes of the model.
      params: plain nested dict of arrays.
      processor: messages to arrays and back.
      checkpoint: the Hugging Face checkpoint that it, or the run that trained it, was loaded from, or None.
      stop_ids: the tokens that end an answer.
      max_length: most tokens of prompt and answer together.
      programs: the compiled programs that all engines of the model share.

    Args:
      processor, checkpoint: one of the two is needed.
      max_length: most tokens of prompt and answer together.
      execution: where and how the programs run.
    """

    def __init__(
        self,
        config: MultimodalConfig,
        params: Any,
        processor: Processor | None = None,
        *,
        checkpoint: HFCheckpoint | None = None,
        max_length: int = 1024,
        execution: Execution = Execution(),
    ):
        self.config, self.params, self.checkpoint = config, params, checkpoint
        self._processor = processor
        self.model = MultimodalLM(config, execution)
        if checkpoint is None:
            self.family = "mm_jax"
            self.layout = Layout.of(processor, two_way=config.two_way)
            self.stop_ids = tuple(processor.stop_ids)
        else:
            self.family = checkpoint.family.name
            self.stop_ids = tuple(checkpoint.stop_ids)
            pad = checkpoint.system.text.pad_id
            self.layout = layout_of(config, pad, self.stop_ids, checkpoint.rule.taps)
        self.max_length = max_length
        taps = TAPS if self.layout.taps else 0
        two_way = self.layout.two_way != "none"
        shares = self.layout.shares
        self.programs = Programs(self.model, params, self.stop_ids, self.layout.pad_id, taps, two_way, shares)

    @property
    def processor(self) -> Processor | PretrainedProcessor:
        """Raises UserError for a Hugging Face checkpoint without a tokenizer."""
        if self._processor is None:
            self._processor = processor_of(self.checkpoint, self.config)
        return self._processor

    @property
    def takes_videos(self) -> bool:
        """Whether messages may hold videos."""
        return self.checkpoint is not None and "video" in self.checkpoint.rule.tokens

    def prompt(self, messages: Messages, **how: Any) -> Example:
        """The tokens that ask for the next assistant message.

        Args:
          how: tools and options of a Hugging Face checkpoint, see `mm_jax.data.chat_template.ChatTemplate.render`.

        Raises UserError: no question at the end, unreadable media, or media that the model has no encoder
        for.
        """
        messages = self._messages(messages)
        if not messages or _role(messages[-1]) == "assistant":
            raise UserError("the last message must be a user's question")
        return self.processor.prompt(messages, **how)

    def example(self, messages: Messages, **how: Any) -> Example:
        """Like `prompt`, for conversations that may end with an answer, which is then part of the tokens."""
        messages = self._messages(messages)
        if not messages or _role(messages[-1]) != "assistant":
            return self.prompt(messages, **how)
        return self.processor.example(messages if self.checkpoint else Conversation(messages), **how)

    def _messages(self, messages: Messages) -> Sequence[dict | Message]:
        """JSON stays JSON for the templates of Hugging Face checkpoints, which know more keys than we do."""
        if self.checkpoint is not None:
            return messages
        messages = messages_from_json(messages)
        self._check_media(messages)
        return messages

    def _check_media(self, messages: Sequence[Message]) -> None:
        parts = [part for message in messages for part in message.parts]
        for kind, name, encoder in (
            (Image, "picture", self.config.vision),
            (Audio, "clip", self.config.audio),
        ):
            if encoder is None and any(isinstance(part, kind) for part in parts):
                what = "vision" if kind is Image else "audio"
                raise UserError(
                    f"there is a {name} in the conversation, but this model has no {what} encoder"
                )

    def batch(
        self,
        messages: Messages | Sequence[Messages] | None = None,
        *,
        tools: Sequence[dict] | None = None,
        template_options: dict[str, Any] | None = None,
        **arrays: np.ndarray,
    ) -> dict:
        """Chat messages to the arrays that `apply` and `generate` take.

        Args:
          messages: one conversation or a list of them: JSON objects of the OpenAI/transformers chat format or
            `Message`s. One that ends with a question is closed by the header of the answer.
          tools, template_options: JSON schemas of functions, and variables such as enable_thinking, for the chat
            template of a Hugging Face checkpoint.
          arrays: instead of messages, a batch of arrays, checked and completed; of a Hugging Face checkpoint,
            those that its processor in transformers returns (see `mm_jax.inference.arrays.batch_of`).

        Returns:
          numpy arrays of `mm_jax.data.example`, one conversation a row; made of messages, right-padded to a
          listed length.
        """
        if messages is None:
            if self.checkpoint is not None and "tokens" not in arrays:
                return batch_of(self.config, self.checkpoint.rule, self.layout, arrays)
            return self._complete(arrays)
        many = bool(len(messages)) and not isinstance(messages[0], dict | Message)
        rows = messages if many else [messages]
        how = {"tools": tools, "options": template_options} if self.checkpoint else {}
        return collate_prompts([self.example(row, **how) for row in rows], self.layout)

    def _complete(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if "tokens" not in arrays:
            raise UserError("a batch of arrays needs at least tokens [B, S]")
        batch = {key: np.asarray(value) for key, value in arrays.items()}
        segments = batch.setdefault("segment_ids", (batch["tokens"] != self.layout.pad_id).astype(np.int32))
        places = np.where(segments > 0, np.cumsum(segments > 0, axis=1) - 1, 0)
        batch.setdefault("positions", places.astype(np.int32))
        batch.setdefault("media_index", np.full(segments.shape, -1, np.int32))
        return batch

    def apply(self, params: Any, batch: dict) -> jax.Array:
        """Logits float32 [B, S, vocab], aligned with batch["tokens"]. Pure and jittable."""
        return self.model.apply({"params": params}, batch)

    def generate(
        self,
        batch: dict,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        sampling: Sampling | None = None,
        ignore_eos: bool = False,
    ) -> np.ndarray:
        """New ids int32 [B, N] for a batch of prompts: greedy unless temperature is above 0.

        Padding follows the stop id. `sampling` holds temperature, top_k, top_p and seed in one object. Raises
        UserError for settings out of range and for prompts over the length limit.
        """
        sampling = sampling or Sampling(temperature, top_k, top_p, seed)
        prompts = prompts_of(batch, self.layout)
        answers = self._answers(
            Request(prompt, setting, max_new_tokens, ignore_eos)
            for prompt, setting in zip(prompts, sampling.rows(len(prompts)), strict=True)
        )
        ids = np.full((len(answers), max(len(row) for row in answers)), self.layout.pad_id, np.int32)
        for row, tokens in zip(ids, answers, strict=True):
            row[: len(tokens)] = tokens
        return ids

    def _answers(self, requests: Iterable[Request]) -> list[list[int]]:
        """The new ids of each request, stop ids included."""
        requests = list(requests)
        engine = self.engine(min(count_bucket(len(requests)), ROWS))
        answers = [engine.submit(request) for request in requests]
        while engine.busy:
            engine.step()
        return [answer.tokens for answer in answers]

    def engine(self, slots: int = 8, **options: Any) -> Engine:
        """A new engine of the model's programs: many answers at once; see `Engine` for the options."""
        options = {"max_length": self.max_length, **options}
        # tokens that see each other are read together, and what is read beside the text is read once
        if self.layout.two_way != "none" or self.layout.shares:
            options["chunk"] = options["max_length"]
        return Engine(self.programs, slots=slots, **options)

    def read(self, example: Example) -> Prompt:
        """What `prompt` makes, as the engine takes it."""
        return prompt_of(example, self.layout)

    def sample_media(self, longest: int = 0) -> list[Medium]:
        """One medium of every kind that prompts of at most `longest` tokens hold, to compile the encoders with."""
        layout, media = self.layout, []
        rule = self.checkpoint.rule if self.checkpoint else getattr(self._processor, "rule", MediaRule())
        spans = rule.spans(longest or self.max_length) if self.config.vision is not None else ()
        for slots in sorted({span_bucket(count, layout) for count in spans}):
            arrays = {name: np.zeros((slots, *shape), dtype) for name, shape, dtype in layout.image_arrays}
            arrays |= {name: array + 1 for name, array in arrays.items() if name.endswith("segment_ids")}
            media.append(Medium(arrays, layout.image_features(slots)))
        if self.config.audio is not None:
            values = np.zeros((1, *layout.audio_size), np.float32)
            arrays = {"audio_values": values, "audio_frames": np.ones(1, np.int32)}
            media.append(Medium(arrays, layout.audio_tokens))
        return media

    def answer(
        self, messages: Sequence[Messages], max_new_tokens: int = 64, sampling: Sampling | None = None
    ) -> list[list[Part]]:
        """Answers to several conversations at once, as parts; boxes in original pixels."""
        examples = [self.prompt(row) for row in messages]
        settings = (sampling or Sampling()).rows(len(examples))
        answers = self._answers(
            Request(self.read(example), setting, max_new_tokens)
            for example, setting in zip(examples, settings, strict=True)
        )
        return [
            list(self.processor.parts(answer_ids(tokens, self.stop_ids), example.transforms))
            for tokens, example in zip(answers, examples, strict=True)
        ]

    def chat(self, messages: Messages, max_new_tokens: int = 64, sampling: Sampling | None = None) -> str:
        """The answer to one conversation as text; boxes as [x0, y0, x1, y1] in original pixels."""
        return render(self.answer([messages], max_new_tokens, sampling)[0])

    def embed(self, inputs: Sequence[Input]) -> np.ndarray:
        """Unit vectors float32 [n, D] of texts, pictures, clips and mixtures; their products say how alike they are.

        A vector is what the last layer, behind the final norm, has made of the prompt's last token, divided by its
        length (as in Zhang et al. 2024, GME, and Jiang et al. 2024, VLM2Vec). The prompt is the input as a user's
        message with the header of the answer, for texts and pictures alike.

        Args:
          inputs: each a text, a part of a message, a list of parts (`Part`s or JSON objects), or a list of token ids,
            which are then the whole prompt.

        Raises UserError: an empty input, token ids outside of the vocabulary, and what `prompt` raises.
        """
        prompts = [self.embedding_prompt(one) for one in ([inputs] if isinstance(inputs, str) else inputs)]
        if not prompts:
            return np.zeros((0, self.embedding_size), np.float32)
        engine = self.engine(min(count_bucket(len(prompts)), ROWS))
        answers = [engine.submit(Request(prompt, max_new_tokens=1, embed=True)) for prompt in prompts]
        while engine.busy:
            engine.step()
        return unit([answer.hidden for answer in answers])

    @property
    def embedding_size(self) -> int:
        """Numbers in a vector of `embed`."""
        return self.config.decoder.embed_dim

    def embedding_prompt(self, one: Input) -> Prompt:
        """What is read of one of the inputs of `embed`; where there is no chat template, of a text the text alone."""
        if is_ids(one):
            vocab = self.programs.vocab_size
            if not 0 <= min(one) <= max(one) < vocab:
                raise UserError(f"a token id is outside of 0 to {vocab - 1}")
            return text_prompt(one)
        message = question(one)
        if self.checkpoint is not None and self.processor.template is None:
            if all(isinstance(part, Text) for part in message.parts):
                text = "".join(part.text for part in message.parts)
                return text_prompt(self.processor.tokenizer.encode(text, around=True))
        return self.read(self.prompt([message]))

    def stream(
        self, messages: Messages, max_new_tokens: int = 64, sampling: Sampling | None = None
    ) -> Iterator[str]:
        """`chat` in pieces, as they are made."""
        *before, last = messages_from_json(messages)
        session = self.session(before)
        return session.stream(last.parts, max_new_tokens=max_new_tokens, sampling=sampling)

    def session(self, messages: Messages = ()) -> ChatSession:
        """A chat of several turns that reads only what is new in each."""
        return ChatSession(self, messages_from_json(messages) if messages else ())

    def preprocess(
        self, images: Sequence = (), audio: Sequence = (), videos: Sequence = ()
    ) -> dict[str, np.ndarray]:
        """The media arrays alone: pixel_values [n, H, W, 3]; audio_values [m, F, mels], audio_frames [m].

        Of a Hugging Face checkpoint: those of its processor in transformers, such as pixel_values [n, 3, H, W].

        images: anything that `Image` takes. audio: anything that `Audio` takes, or (samples, rate in Hz). videos:
        anything that `Video` takes, or (source, frames a second).
        """
        self._check_media([Message("user", (*(Image(i) for i in images), *(Audio(b"") for _ in audio)))])
        if len(videos) and not self.takes_videos:
            raise UserError("this model takes no videos")
        return self.processor.preprocess(images, audio, **({"videos": videos} if len(videos) else {}))

    def attention(
        self, messages: Messages | Example, answer: Sequence[int]
    ) -> tuple[Example, dict[str, np.ndarray]]:
        """Where the decoder and projectors with learned queries look while they read a prompt and its answer.

        Args:
          messages: the prompt, or what `prompt` made of it.
          answer: ids of the answer, such as a row of `generate`.

        Returns:
          The prompt (its indices say which token is which media feature), and float32 weights: "decoder"
          [layers with attention, heads, S, S] with S = prompt + answer; where the projector has queries also
          "image_projector" [slots, heads, queries, patches] and "audio_projector", see
          `mm_jax.inference.attention.reading_weights`.
          `mm_jax.inference.attention.looks` carries them back to the patches of each picture.
        """
        if self.config.crossed:
            raise UserError(
                "this model reads pictures beside the text, so no token stands for a place of one"
            )
        if "attention" not in self.config.decoder.kinds:
            raise UserError("this model has linear attention alone, which has no weights")
        prompt = messages if isinstance(messages, Example) else self.prompt(messages)
        whole = extended(prompt, answer)
        batch = collate_prompts([whole], self.layout)
        sown = self._attention(self.params, batch)["intermediates"]
        length = whole.length
        layers, kinds = sown["decoder"]["layers"], self.config.decoder.pattern
        if len(kinds) > 1:  # of several kinds, of which some look at all tokens
            blocks = [layers[f"block{k}"] for k, kind in enumerate(kinds) if kind == "attention"]
        else:
            blocks = [layers]
        found = [np.asarray(block["attention"]["attention_weights"][0]) for block in blocks]
        decoder = np.stack(found, axis=1).reshape(-1, *found[0].shape[1:])
        weights = {"decoder": decoder[:, 0, :, :length, :length]}
        for name, count in (("image_projector", prompt.num_images), ("audio_projector", prompt.num_audio)):
            if count and name in sown:
                weights[name] = reading_weights(getattr(self.config, name), sown[name])[:count]
        return prompt, weights

    @property
    def _attention(self) -> Any:
        if not hasattr(self, "_attention_program"):
            self._attention_program = jax.jit(
                lambda params, batch: self.model.apply({"params": params}, batch, mutable=["intermediates"])[
                    1
                ]
            )
        return self._attention_program


def load(
    path: str | Path,
    stage: str | None = None,
    *,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules = Rules(),
    weights: Weights = "float",
) -> LanguageModel | Tower:
    """The model of a Hugging Face directory (one with a model_type in its config.json), of a run, or of a directory in
    our own format, which `python -m mm_jax convert` writes of a run.

    Args:
      stage: of a run; its newest checkpoint without.
      dtype: of a Hugging Face checkpoint's parameters and computation: "float32" or "bfloat16"; that of the file
        without, but float16 is computed with in float32.
      mesh: of `mm_jax.parallel.mesh.make_mesh`, for a Hugging Face checkpoint; the first device without.
      rules: how parameters, activations and KV cache lie on it.
      weights: "int8" or "int4" for the decoder's large kernels as integers with factors, to answer with; see
        `mm_jax.models.quantised.quantised`.

    Returns:
      A `LanguageModel`, or a `Tower` for the checkpoint of an encoder alone.

    Raises UserError: no checkpoint there, an unknown stage, an unknown family, or tensors that do not fit.
    """
    if weights not in WEIGHTS:
        raise UserError(f'weights are "{weights}"{nearest(weights, WEIGHTS)}')
    if is_hf(path):
        if stage is not None:
            raise UserError(f"{path} is a Hugging Face checkpoint and has no stages")
        where = None if mesh is None else place(mesh, rules)
        if is_own(path):
            from mm_jax.train.start import load_processor  # training code is not needed for others

            config, params, length = load_own(Path(path), dtype, where)
            processor = load_processor(Path(path), config)
            execution = Execution(mesh, rules.axes())
            params = quantised(params, weights)
            return LanguageModel(config, params, processor, max_length=length, execution=execution)
        checkpoint, params = load_hf(path, dtype, where)
        system = checkpoint.system
        if not isinstance(system.config, MultimodalConfig):
            if weights != "float":
                raise UserError(f"{path} holds an encoder alone; integers are for the decoder's weights")
            return Tower(checkpoint, params)
        execution = Execution(mesh, rules.axes())
        return LanguageModel(
            system.config,
            quantised(params, weights),
            checkpoint=checkpoint,
            max_length=system.text.max_length,
            execution=execution,
        )
    if dtype is not None or mesh is not None:
        raise UserError(f"{path} is no Hugging Face checkpoint; dtype and mesh are for those alone")
    from mm_jax.train.setup import read_run  # training code is not needed to use a model that is in memory

    config, processor, params = read_run(path, stage)
    longest = max(1024, *(stage.batch.length for stage in config.stages.values()))
    kept, checkpoint = Path(path) / "processor", None
    if is_kept(kept):
        checkpoint = open_kept(kept, config.model)
        longest = checkpoint.system.text.max_length
    params = quantised(params, weights)
    return LanguageModel(config.model, params, processor, checkpoint=checkpoint, max_length=longest)


def load_lm(path: str | Path, stage: str | None = None, weights: Weights = "float") -> LanguageModel:
    """`load` for those who want answers. Raises UserError for the checkpoint of an encoder alone."""
    lm = load(path, stage, weights=weights)
    if not isinstance(lm, LanguageModel):
        raise UserError(f"{path} holds an encoder alone ({lm.family}), and no language model")
    return lm


def save(lm: LanguageModel | Tower, directory: str | Path, format: str = "hf") -> None:
    """Writes `lm.params` as a Hugging Face checkpoint that transformers loads.

    Also of a run that began with such a checkpoint, with the weights as they are now.

    Raises UserError for another format, and for a model that did not come from a Hugging Face checkpoint.
    """
    if format != "hf":
        raise UserError(f'format is "{format}"; "hf" is the one that there is')
    if any(isinstance(x, Quantised) for x in jax.tree.leaves(lm.params, is_leaf=_whole)):
        raise UserError("weights that were made integers cannot be saved; load the model without")
    if lm.checkpoint is None:
        raise UserError(
            "this model belongs to no Hugging Face family, so it has no such checkpoint; "
            "python -m mm_jax convert writes its run in another way"
        )
    save_hf(directory, lm.checkpoint, lm.params)


def _whole(x: Any) -> bool:
    return isinstance(x, Quantised)


def _role(message: dict | Message) -> str:
    return message.role if isinstance(message, Message) else message.get("role", "")


def user_message(question: str, images: Sequence[str] = (), audio: Sequence[str] = ()) -> Message:
    """A question with its media in front, as the quickstart data has them.

    Raises UserError when there is nothing in it.
    """
    parts: list[Part] = [*(Image(path) for path in images), *(Audio(path) for path in audio)]
    if question.strip():
        parts.append(Text(question.strip()))
    if not parts:
        raise UserError("the question is empty")
    return Message("user", tuple(parts))
