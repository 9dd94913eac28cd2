"""Tool calls: how functions are told to a model, how its answer is read, and how results go back."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mm_jax.errors import UserError
from mm_jax.inference.text import beginning


@dataclass(frozen=True)
class Function:
    """A function that a model may call.

    Attributes:
      parameters: JSON schema of its arguments.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As in OpenAI's API."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Call:
    """A function's name and its arguments as JSON text, which may be wrong in any way: a model wrote it."""

    name: str
    arguments: str


def functions_from_json(tools: Any) -> list[Function]:
    """The "tools" of a request to OpenAI's API. Raises UserError."""
    if not isinstance(tools, list):
        raise UserError("tools must be a list")
    found = []
    for k, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict):
            raise UserError(f'tools.{k} must be {{"type": "function", "function": {{...}}}}')
        name, description = function.get("name"), function.get("description") or ""
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,64}", name):
            raise UserError(
                f"tools.{k}.function.name must be 1 to 64 letters, digits, dots, dashes or underscores"
            )
        if not isinstance(description, str) or not isinstance(parameters, dict):
            raise UserError(f"tools.{k}.function: description is a text and parameters a JSON schema")
        found.append(Function(name, description, parameters))
    if len({function.name for function in found}) != len(found):
        raise UserError("two tools have the same name")
    return found


@dataclass(frozen=True)
class Style:
    """How a family writes calls.

    Attributes:
      begin, end: around the JSON of one call.
      key: under which that JSON has the arguments.
      opens: beginnings of a call; anywhere: they may stand behind other text.
      parse: text of an answer -> (text before and between the calls, calls).
    """

    begin: str
    end: str
    key: str
    opens: tuple[str, ...]
    anywhere: bool
    parse: Callable[[str], tuple[str, list[Call]]]

    def safe(self, text: str) -> int:
        """How many characters of a growing answer are certainly no call and may be shown."""
        if self.anywhere:
            found = [at for at in (text.find(mark) for mark in self.opens) if at >= 0]
            return min(found) if found else len(text) - max(beginning(text, mark) for mark in self.opens)
        start = text.lstrip()
        return (
            0 if any(start.startswith(mark) or mark.startswith(start) for mark in self.opens) else len(text)
        )

    def parse_forced(self, text: str) -> tuple[str, list[Call]]:
        """An answer that could be nothing but one call in JSON; cut off, it is text."""
        body = text.strip().removeprefix(self.begin.strip()).removesuffix(self.end.strip())
        try:
            call = _call(json.loads(body))
        except ValueError:
            call = None
        return (text, []) if call is None else ("", [call])


def _call(value: Any) -> Call | None:
    """From {"name", "arguments" or "parameters"}; None for anything else."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return Call(value["name"], text)


def _hermes(text: str) -> tuple[str, list[Call]]:
    """`<tool_call>{"name": "f", "arguments": {}}</tool_call>`, any number of them (Hermes 2 Pro, Qwen2.5, Qwen3)."""
    calls: list[Call] = []

    def take(found: re.Match) -> str:
        try:
            call = _call(json.loads(found[1]))
        except ValueError:
            call = None
        if call is None:
            return found[0]  # no call: it stays visible as it is
        calls.append(call)
        return ""

    rest = re.sub(r"<tool_call>(.*?)(?:</tool_call>|\Z)", take, text, flags=re.DOTALL)
    return rest.strip(), calls


def _llama3(text: str) -> tuple[str, list[Call]]:
    """`{"name": "f", "parameters": {}}`, several divided by semicolons, perhaps after <|python_tag|> (Llama 3.1)."""
    body = text.removeprefix("<|python_tag|>").strip()
    calls, decoder = [], json.JSONDecoder()
    while body:
        try:
            value, end = decoder.raw_decode(body)
        except ValueError:
            return text, []
        call = _call(value)
        if call is None:
            return text, []
        calls.append(call)
        body = body[end:].lstrip(" ;\n")
    return "", calls


def _pythonic(text: str) -> tuple[str, list[Call]]:
    """`[f(a=1), g()]` with literal arguments by name (Llama 3.2, Llama 4)."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            return text, []
        calls = []
        for node in tree.elts:
            if not isinstance(node, ast.Call) or node.args or any(k.arg is None for k in node.keywords):
                return text, []
            arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
            calls.append(Call(ast.unparse(node.func), json.dumps(arguments, ensure_ascii=False)))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return text, []
    return "", calls


STYLES: dict[str, Style] = {
    "hermes": Style("<tool_call>\n", "\n</tool_call>", "arguments", ("<tool_call>",), True, _hermes),
    "llama3": Style("", "", "parameters", ("{", "<|python_tag|>"), False, _llama3),
    "pythonic": Style("", "", "arguments", ("[",), False, _pythonic),
}
# model_type -> style; every other family learns the Hermes style from its prompt
_FAMILIES = {"llama": "llama3", "mllama": "pythonic", "llama4": "pythonic"}


def style_of(family: str) -> Style:
    """How the models of a family write calls."""
    return STYLES[_FAMILIES.get(family, "hermes")]


def write_call(call: Call) -> str:
    """A call in the Hermes style."""
    try:
        arguments = json.loads(call.arguments)
    except ValueError:
        arguments = call.arguments
    style = STYLES["hermes"]
    value = {"name": call.name, style.key: arguments}
    return f"{style.begin}{json.dumps(value, ensure_ascii=False)}{style.end}"


def system_text(functions: Sequence[Function]) -> str:
    """What tells a model about its functions where its chat template does not (after Hermes 2 Pro's prompt)."""
    lines = "\n".join(json.dumps(function.to_json(), ensure_ascii=False) for function in functions)
    style = STYLES["hermes"]
    example = f'{style.begin}{{"name": <function-name>, "arguments": <args-json-object>}}{style.end}'
    return (
        "You may call one or more functions to help with the question. Their signatures are between <tools></tools>:\n"
        f"<tools>\n{lines}\n</tools>\n"
        "For each call write a JSON object with the function's name and its arguments between "
        f"<tool_call></tool_call>:\n{example}"
    )


def plain_messages(
    messages: Sequence[Mapping[str, Any]], functions: Sequence[Function]
) -> list[dict[str, Any]]:
    """Messages of OpenAI's API with tool calls and results as text of the roles that every template knows.

    Calls of an assistant become text in the Hermes style, results become a user's message between <tool_response> tags
    (media in a result stay media), and the functions go into the system message. Raises UserError for a result that
    belongs to no call.
    """
    plain: list[dict[str, Any]] = []
    known: set[str] = set()
    for k, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role == "assistant" and message.get("tool_calls"):
            known |= {call["id"] for call in message["tool_calls"]}
            written = [
                write_call(Call(c["function"]["name"], c["function"]["arguments"]))
                for c in message["tool_calls"]
            ]
            plain.append(
                {"role": role, "content": [*_parts(content), {"type": "text", "text": "\n".join(written)}]}
            )
        elif role == "tool":
            if message.get("tool_call_id") not in known:
                raise UserError(f'messages.{k}: no call has the id "{message.get("tool_call_id")}"')
            begin, end = (
                {"type": "text", "text": "<tool_response>\n"},
                {"type": "text", "text": "\n</tool_response>"},
            )
            result = [begin, *_parts(content), end]
            if plain and plain[-1].get("role") == "user" and messages[k - 1].get("role") == "tool":
                plain[-1]["content"] += result  # several results are one message
            else:
                plain.append({"role": "user", "content": result})
        else:
            plain.append({"role": role, "content": content})
    if functions:
        text = system_text(functions)
        if plain and plain[0]["role"] == "system":
            parts = [*_parts(plain[0]["content"]), {"type": "text", "text": f"\n\n{text}"}]
            plain[0] = {"role": "system", "content": parts}
        else:
            plain.insert(0, {"role": "system", "content": text})
    return plain


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages for chat templates that know tools: they want the arguments of calls as objects."""

    def read(call: Mapping[str, Any]) -> dict[str, Any]:
        try:
            arguments = json.loads(call["function"]["arguments"])
        except ValueError:
            arguments = call["function"]["arguments"]
        return {**call, "function": {**call["function"], "arguments": arguments}}

    return [
        {**message, "tool_calls": [read(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else dict(message)
        for message in messages
    ]


def _parts(content: Any) -> list[dict[str, Any]]:
    if content is None or content == "":
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
