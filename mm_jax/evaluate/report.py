"""A self-contained page about a run: scores, curves, test questions with boxes and heat maps."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import soundfile

from mm_jax.data.media import decode_audio, decode_image
from mm_jax.data.messages import Audio, Image, Message
from mm_jax.data.sources import Source
from mm_jax.errors import UserError
from mm_jax.evaluate.draw import ANSWER, EXPECTED, draw_boxes, enlarge
from mm_jax.evaluate.runner import Question, questions_of
from mm_jax.inference.attention import attention_map, overlay
from mm_jax.inference.text import render

if TYPE_CHECKING:
    from mm_jax.lm import LanguageModel

_CSS = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #e3e7ee; --paper: #fff; --ground: #f6f7fa; --good: #16a34a;
  --bad: #dc2626; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 16px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 36px 0 12px; }
p.note { color: var(--soft); margin: 4px 0 12px; max-width: 75ch; }
.panel, .card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
.panel { padding: 14px 18px; overflow-x: auto; }
.panel img { max-width: 100%; display: block; }
table { border-collapse: collapse; width: 100%; }
th { text-align: right; color: var(--soft); font-weight: 600; font-size: 13px; }
th:first-child, td:first-child { text-align: left; }
th, td { padding: 5px 10px; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
td { text-align: right; font-variant-numeric: tabular-nums; }
td.bar { background: linear-gradient(90deg, #d7ecdd var(--share), transparent var(--share)); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 14px; }
.card { padding: 12px; display: flex; flex-direction: column; gap: 8px; }
.card .media { display: flex; gap: 8px; flex-wrap: wrap; }
.card .media figure { margin: 0; flex: 1 1 100px; max-width: 320px; }
.card img { width: 100%; border-radius: 6px; display: block; image-rendering: pixelated; border: 1px solid
var(--line); } .card figcaption, .card .where { font-size: 12px; color: var(--soft); }
.card audio { width: 100%; height: 36px; }
.card .question { font-weight: 600; overflow-wrap: anywhere; white-space: pre-line; }
.card dl { display: grid; grid-template-columns: auto 1fr; gap: 2px 10px; margin: 0; }
.card dt { color: var(--soft); } .card dd { margin: 0; overflow-wrap: anywhere; }
.right { color: var(--good); font-weight: 600; } .wrong { color: var(--bad); font-weight: 600; }
.key { display: inline-block; width: 12px; height: 12px; border: 3px solid; vertical-align: -1px; }
"""


@dataclass(frozen=True)
class Card:
    """One line of answers.jsonl with the question read again from its source; why: how it was chosen."""

    line: dict[str, Any]
    question: Question
    why: str


def read_answers(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of answers.jsonl. Raises UserError when it is missing (not evaluated yet) or damaged."""
    path = Path(run_dir) / "answers.jsonl"
    if not path.is_file():
        raise UserError(f"{path} is not there; run first: python -m mm_jax evaluate {run_dir}")
    try:
        lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines() if text]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); run evaluate again") from None
    if not lines:
        raise UserError(f"{path} holds no answer")
    return lines


def choose(lines: Sequence[dict[str, Any]], count: int) -> dict[str, list[tuple[dict[str, Any], str]]]:
    """For every task the first `count` lines, whatever was answered, and the first wrong one after them.

    >>> choose([{"task": "a", "right": r} for r in (True, True, True, False)], 2)["a"][2]
    ({'task': 'a', 'right': False}, 'first mistake after these')
    """
    chosen = {}
    for task in sorted({line["task"] for line in lines}):
        mine = [line for line in lines if line["task"] == task]
        picked = [(line, f"test question {k + 1}") for k, line in enumerate(mine[:count])]
        wrong = next((line for line in mine[count:] if not line["right"]), None)
        chosen[task] = picked + ([(wrong, "first mistake after these")] if wrong else [])
    return chosen


def write_report(
    run_dir: str | Path,
    lm: LanguageModel | None,
    sources: dict[str, Source],
    *,
    samples: int = 3,
    out: str | Path | None = None,
) -> Path:
    """Writes `report.html` from scores.json, answers.jsonl and loss.png of a run directory.

    Args:
      lm: the model that answered, for the heat maps; None leaves them out.
      sources: the sources that were asked, by the names in answers.jsonl.
      samples: questions shown of each task.
      out: the file; None for report.html in the run directory.

    Raises UserError when the run has not been evaluated.
    """
    run_dir = Path(run_dir)
    lines = read_answers(run_dir)
    scores = json.loads((run_dir / "scores.json").read_text())
    sections = []
    for task, picked in choose(lines, samples).items():
        cards = [Card(line, question, why) for line, why in picked if (question := _question(sources, line))]
        row = scores["tasks"].get(task, {})
        right = f' <span class="where">{100 * row["model"]:.0f} % of {row["n"]} right</span>' if row else ""
        body = "".join(_card(lm, card) for card in cards)
        sections.append(f'<h2>{_text(task)}{right}</h2>\n<div class="cards">{body}</div>\n')
    curves, loss = run_dir / "loss.png", ""
    if curves.is_file():
        shown = f'<img alt="loss curves" src="{_png(curves.read_bytes())}">'
        loss = f'<h2>Loss</h2><div class="panel">{shown}</div>'
    name = scores.get("run", run_dir.name)
    key = (
        f'<span class="key" style="border-color:rgb{EXPECTED}"></span> expected box, '
        f'<span class="key" style="border-color:rgb{ANSWER}"></span> answered box'
    )
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(name)}</title><style>{_CSS}</style></head><body><main>
<h1>{_text(name)}</h1>
<p class="note">{_text(_caption(scores))}</p>
<h2>Scores on held-out questions</h2>
<div class="panel">{_table(scores)}</div>
<p class="note">Per cent answered exactly right (boxes: overlap of at least one half). Blanked: the same model
and questions with pictures and clips set to zero. Chance: always the commonest answer of the task.</p>
{loss}
<h2>Questions</h2>
<p class="note">The first questions of each task in the order of the data, right or wrong, then the first mistake
after them if there is one. {key}. The heat map shows which parts of the picture the decoder attended to
(mean over layers and heads) when it chose the first word of its answer; blue is least, yellow most.</p>
{"".join(sections)}</main></body></html>
"""
    path = Path(out) if out else run_dir / "report.html"
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path


def _question(sources: dict[str, Source], line: dict[str, Any]) -> Question | None:
    """The question of a line; None where the source cannot be read any more."""
    source = sources.get(line["source"])
    if source is None or not 0 <= line["index"] < len(source):
        return None
    found = questions_of(source[line["index"]], line["source"], line["index"])
    return next((question for question in found if question.turn == line["turn"]), None)


def _card(lm: LanguageModel | None, card: Card) -> str:
    line, parts = card.line, [part for message in card.question.prompt for part in message.parts]
    figures = []
    images = [part for part in parts if isinstance(part, Image)]
    for k, part in enumerate(images):
        picture = decode_image(part.source)
        large, factor = enlarge(picture)
        boxes = [(line["expected_box"], EXPECTED)] if k == 0 and line.get("expected_box") else []
        if line.get("answer_box") and line.get("answer_image", 0) == k:
            boxes.append((line["answer_box"], ANSWER))
        figures.append(
            _figure(draw_boxes(large, boxes, factor), f"picture {k + 1}" if len(images) > 1 else "")
        )
        if lm is not None and k == 0 and line["ids"]:
            word = first_word(lm, line["ids"])
            heat = attention_map(lm, card.question.prompt, line["ids"], word, image=k)
            shown = lm.processor.text(line["ids"][word]).strip() or "its first token"
            figures.append(_figure(enlarge(overlay(picture, heat))[0], f"looked at for “{shown}”"))
    sounds = "".join(
        f'<audio controls preload="none" src="{_wav(part)}"></audio>'
        for part in parts
        if isinstance(part, Audio)
    )
    mark, verdict = ("right", "✓") if line["right"] else ("wrong", "✗")
    rows = [("answer", f'<span class="{mark}">{_text(line["answer"]) or "(nothing)"} {verdict}</span>')]
    rows.append(("expected", _text(line["expected"])))
    if "blanked_answer" in line and (images or sounds):
        rows.append(("blanked", _text(line["blanked_answer"])))
    earlier = [f"{m.role}: {_plain(m)}" for m in card.question.prompt[:-1]]
    asked = "\n".join([*earlier, line["question"].replace("<image>", "").replace("<audio>", "").strip()])
    return (
        f'<div class="card"><div class="media">{"".join(figures)}</div>{sounds}'
        f'<div class="question">{_text(asked)}</div>'
        f"<dl>{''.join(f'<dt>{name}</dt><dd>{value}</dd>' for name, value in rows)}</dl>"
        f'<div class="where">{_text(card.why)} · {_text(line["source"])} {line["index"]}</div></div>'
    )


def first_word(lm: LanguageModel, ids: Sequence[int]) -> slice:
    """The tokens of the first word of an answer, or of its first box."""
    texts = [lm.processor.text(ids[: k + 1]) for k in range(len(ids))]
    end = 1
    while end < len(ids) and not texts[end][len(texts[end - 1]) :].startswith(" "):
        end += 1
    return slice(0, end)


def _plain(message: Message) -> str:
    return render(message.parts)


def _figure(picture: PIL.Image.Image, caption: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    below = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><img alt="{_text(caption or "picture")}" src="{_png(buffer.getvalue())}">{below}</figure>'
    )


def _png(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _wav(part: Audio) -> str:
    rate = 16_000
    buffer = io.BytesIO()
    soundfile.write(buffer, decode_audio(part.source, rate, part.sample_rate), rate, "PCM_16", format="WAV")
    return "data:audio/wav;base64," + base64.b64encode(buffer.getvalue()).decode()


def _caption(scores: dict[str, Any]) -> str:
    pieces = [
        f"{name} {scores[name]}"
        for name in ("stage", "step", "split", "weights")
        if scores.get(name) not in (None, "")
    ]
    return ", ".join(pieces)


def _table(scores: dict[str, Any]) -> str:
    def cell(value: float | None, bar: bool = False) -> str:
        if value is None:
            return "<td></td>"
        share = f' class="bar" style="--share:{100 * value:.1f}%"' if bar else ""
        return f"<td{share}>{100 * value:.1f}</td>"

    rows = ["<tr><th>task</th><th>n</th><th>model</th><th>blanked</th><th>chance</th><th>mean IoU</th></tr>"]
    for task, row in scores["tasks"].items():
        cells = cell(row["model"], bar=True) + "".join(
            cell(row.get(k)) for k in ("blanked", "chance", "mean_iou")
        )
        rows.append(f"<tr><td>{_text(task)}</td><td>{row['n']}</td>{cells}</tr>")
    if row := scores.get("false_yes"):
        cells = cell(row["model"]) + cell(row.get("blanked"))
        rows.append(
            f"<tr><td>false yes (lower is better)</td><td>{row['n']}</td>{cells}<td></td><td></td></tr>"
        )
    return f"<table>{''.join(rows)}</table>"


def _text(value: Any) -> str:
    return html.escape(str(value))
