"""Chat templates in Jinja, as Hugging Face checkpoints carry them."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from mm_jax.data.messages import BadSample
from mm_jax.errors import UserError

_PROBE = "qprobeq"
# around what the model writes; noncharacters, which no text may hold
BEGIN, END = "\ufdd0", "\ufdd1"


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the model writes; the marks are put into the text."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: jinja2.runtime.Macro) -> str:
        return f"{BEGIN}{caller()}{END}"


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


class ChatTemplate:
    """Messages to one text (reference: transformers' apply_chat_template). Picklable.

    Args:
      source: the template.
      variables: what it may name besides the messages, such as bos_token.

    Raises UserError for a template that cannot be read.
    """

    def __init__(self, source: str, variables: Mapping[str, str]):
        self.source, self.variables = source, dict(variables)
        try:
            self._template = _environment().from_string(source)
        except jinja2.exceptions.TemplateError as error:
            raise UserError(f"the chat template cannot be read: {error}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        answer_header: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The text, with BEGIN and END around what `generation` tags mark.

        Args:
          messages: plain data: role, content (text, or parts with a type each), and what the template knows besides.
          answer_header: with the header of the answer to come.
          tools: JSON schemas of functions.
          options: further variables, such as enable_thinking.

        Raises BadSample when the template refuses the messages.
        """
        values = {**self.variables, **(options or {}), "messages": list(map(self._fitting, messages))}
        return self._render(
            values | {"tools": tools, "documents": None, "add_generation_prompt": answer_header}
        )

    def marked(self, messages: Sequence[Mapping[str, Any]], stops: Sequence[str], **how: Any) -> str:
        """`render` with BEGIN and END around every answer and the stop token behind it.

        By the template's own tags, or else around the contents of the assistant's messages.

        Args:
          stops: tokens that end an answer.
        """
        text = self.render(messages, **how)
        if BEGIN in text:
            return text
        # a template may strip contents, which marks at their ends would prevent
        for change in (str, str.strip):
            found = self.render([_around(message, change) for message in messages], **how)
            if found.replace(BEGIN, "").replace(END, "") == text:
                ends = "|".join(map(re.escape, stops))
                return re.sub(f"{END}(\\s*(?:{ends}))", rf"\1{END}", found) if stops else found
        raise BadSample(
            "the chat template changes the answers, so it is unknown which of its tokens to train on; mark them with "
            "{% generation %} ... {% endgeneration %} in the template",
            "bad_conversation",
        )

    def _render(self, values: Mapping[str, Any]) -> str:
        try:
            return self._template.render(**values)
        except jinja2.exceptions.TemplateError as error:
            raise BadSample(f"the chat template refuses the messages: {error}", "bad_conversation") from None
        except (TypeError, ValueError, ArithmeticError, LookupError) as error:
            text = f"the chat template cannot write these messages ({type(error).__name__}: {error})"
            raise BadSample(text, "bad_conversation") from None

    def _fitting(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The content in the form that the template writes: some know texts alone, others lists of parts."""
        message = {key: value for key, value in message.items() if value is not None}
        content, (text, parts) = message.get("content"), self._forms
        if isinstance(content, str) and parts and not text:
            message["content"] = [{"type": "text", "text": content}]
        elif isinstance(content, list) and text and not parts and all("text" in part for part in content):
            message["content"] = "".join(part["text"] for part in content)
        return message

    @cached_property
    def _forms(self) -> tuple[bool, bool]:
        """Whether a content is written that is a text, and one that is a list of parts."""

        def written(content: Any) -> bool:
            values = {**self.variables, "tools": None, "documents": None, "add_generation_prompt": False}
            try:
                text = self._render(values | {"messages": [{"role": "user", "content": content}]})
            except BadSample:
                return False
            return _PROBE in text and "'type'" not in text and '"type"' not in text

        return written(_PROBE), written([{"type": "text", "text": _PROBE}])

    def __getstate__(self) -> tuple[str, dict[str, str]]:
        return self.source, self.variables

    def __setstate__(self, state: tuple[str, dict[str, str]]) -> None:
        self.__init__(*state)


def unmark(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A text without BEGIN and END, and the (start, end) of what was between them.

    >>> unmark("a \ufdd0b\ufdd1 c")
    ('a b c', [(2, 3)])
    """
    spans: list[tuple[int, int]] = []
    pieces: list[str] = []
    length = 0
    for k, piece in enumerate(text.split(BEGIN)):
        inside, found, rest = piece.partition(END) if k else ("", "", piece)
        if found:
            spans.append((length, length + len(inside)))
        pieces += [inside, rest]
        length += len(inside) + len(rest)
    return "".join(pieces), spans


def _around(message: Mapping[str, Any], change: Callable[[str], str]) -> Mapping[str, Any]:
    content = message.get("content")
    if message["role"] != "assistant" or not content:
        return message
    if isinstance(content, str):
        return {**message, "content": f"{BEGIN}{change(content)}{END}"}
    text = change("".join(part.get("text", "") for part in content))
    return {**message, "content": [{"type": "text", "text": f"{BEGIN}{text}{END}"}]}


def read_template(directory: str | Path) -> str | None:
    """The source of a directory's template, None where there is none.

    In the order of the reference: chat_template.jinja, chat_template.json, processor_config.json and
    tokenizer_config.json; of several templates the one called "default".
    """
    directory = Path(directory)
    if (path := directory / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if not (path := directory / name).is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
        except ValueError as error:
            raise UserError(f"{path} is not JSON: {error}") from None
        if isinstance(found, list):
            found = {item["name"]: item["template"] for item in found}
        if isinstance(found, dict):
            found = found.get("default")
        if found is not None:
            return found
    return None
