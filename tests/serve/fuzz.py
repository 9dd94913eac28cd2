"""Malformed requests without end against a running server: `python -m tests.serve.fuzz http://127.0.0.1:8000 10000`.

Half of them are made by schemathesis from the server's own OpenAPI document, valid and invalid ones; half are requests
that were valid until something in them was broken. What must not happen: an answer of 500, none at all, one that is not
JSON in OpenAI's shape, a server that stops answering.
"""

from __future__ import annotations

import collections
import copy
import http.client
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from tests.serve.conftest import audio_part, image_part, text_part

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
SLOW = 60.0  # seconds that no request may take
FINE = {200, 400, 401, 404, 405, 413, 429, 503}
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 1e308, -0.0, 0.5, "", "x", "\x00", "\ud800", "é" * 50,
    [], {}, [[]], [None], {"": None}, {"type": "function"}, "auto", [1, "a", {}], "data:image/png;base64,",
    "file:///etc/passwd", "http://127.0.0.1/", {"url": "data:,"}, "A" * 20_000, [0] * 2_000,
]  # fmt: skip


def deep(levels: int) -> Any:
    found: Any = 1
    for _ in range(levels):
        found = {"a": [found]}
    return found


def valid() -> list[tuple[str, dict[str, Any]]]:
    """One request of each kind; short answers."""
    look = {
        "type": "function",
        "function": {"name": "look", "parameters": {"type": "object", "properties": {}}},
    }
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    media = [image_part(0), audio_part(0), text_part("what")]
    ask = {"role": "user", "content": "how many"}
    chats = [
        {"messages": [ask], "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1, "n": 2},
        {"messages": [{"role": "user", "content": media}], "attention": {"words": [0], "pictures": True}},
        {"messages": [{"role": "system", "content": "x"}, ask], "logprobs": True, "top_logprobs": 2, "stop": ["a"]},
        {"messages": [ask], "tools": [look], "tool_choice": "required"},
        {"messages": [ask, {"role": "assistant", "tool_calls": [call]},
                      {"role": "tool", "tool_call_id": "c", "content": "y"}], "tools": [look]},
        {"messages": [ask], "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}},
        {"messages": [ask], "stream": True, "stream_options": {"include_usage": True}, "logit_bias": {"5": 1}},
        {"messages": [ask], "repetition_penalty": 1.1, "presence_penalty": 1, "frequency_penalty": 1},
    ]  # fmt: skip
    texts = [
        {"prompt": "how many", "echo": True, "logprobs": 2},
        {"prompt": [["how"], [1, 2]][1]},
        {"prompt": ["a", "b"]},
    ]
    vectors = [
        {"input": ["how many", [1, 2], [image_part(0), text_part("what")]], "encoding_format": "base64"},
        {"input": [image_part(1)], "dimensions": None},
        {"input": "red", "encoding_format": "float"},
    ]
    return [
        *((PATHS[0], {"max_tokens": 2, **body}) for body in chats),
        *((PATHS[1], {"max_tokens": 2, **body}) for body in texts),
        *((PATHS[2], body) for body in vectors),
    ]


def spots(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Ways to everything inside of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from spots(inner, (*path, key))


def broken(body: Any, rng: random.Random) -> Any:
    """With one to three places replaced, removed, added or doubled."""
    body = copy.deepcopy(body)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(spots(body))
        if not places:
            return rng.choice(VALUES)
        *way, last = rng.choice(places)
        parent = body
        for key in way:
            parent = parent[key]
        how = rng.random()
        if how < 0.6:
            parent[last] = copy.deepcopy(rng.choice([*VALUES, parent, deep(5)]))
        elif how < 0.75:
            del parent[last]
        elif how < 0.9 and isinstance(parent[last], str):
            text = parent[last]
            at = rng.randrange(len(text) + 1)
            parent[last] = (
                text[:at] + rng.choice(("", "@", "\x00", "é", "=", "A" * 99)) + text[at + rng.randrange(9) :]
            )
        elif isinstance(parent, dict):
            parent[rng.choice(("x", "n", "stop", "type", "content", "role"))] = copy.deepcopy(
                rng.choice(VALUES)
            )
        else:
            parent.insert(last, copy.deepcopy(parent[last]))
    return body


def raw(body: bytes, rng: random.Random) -> bytes:
    """Bytes that may be no JSON, and no UTF-8."""
    how = rng.randrange(6)
    if how == 0:
        return body[: rng.randrange(len(body) + 1)]
    if how == 1:
        at = rng.randrange(len(body))
        return body[:at] + bytes([rng.randrange(256)]) + body[at + 1 :]
    if how == 2:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(64)))
    if how == 3:
        return b"[" * rng.randrange(1, 50_000)
    if how == 4:
        return json.dumps(deep(rng.randrange(10, 400))).encode()
    return body.replace(b'"', rng.choice((b"'", b"", b"\xff", b"\\")), rng.randrange(1, 4))


class Fuzz:
    """Sends requests and judges the answers."""

    def __init__(self, url: str, key: str = ""):
        parts = urlsplit(url)
        self.host, self.port, self.key = parts.hostname, parts.port, key
        self.seen: collections.Counter[int] = collections.Counter()
        self.slowest = 0.0

    def send(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=SLOW)
        began = time.monotonic()
        try:
            sent = {
                "Content-Type": "application/json",
                "Authorization": f"Bearer {self.key}",
                **(headers or {}),
            }
            connection.request("POST", path, body, sent)
            answer = connection.getresponse()
            status, text = answer.status, answer.read()
        finally:
            connection.close()
        self.slowest = max(self.slowest, time.monotonic() - began)
        self.seen[status] += 1
        assert status in FINE, f"{status} of {path}: {body[:3000]!r} -> {text[:500]!r}"
        if status != 200:
            error = json.loads(text)["error"]
            assert error["message"] and "Traceback" not in error["message"], text
        return status, text

    def well(self) -> None:
        """A valid request is answered."""
        body = {
            "messages": [{"role": "user", "content": [image_part(1), text_part("how many")]}],
            "max_tokens": 2,
        }
        status, text = self.send(PATHS[0], json.dumps(body).encode())
        assert status == 200 and json.loads(text)["choices"][0]["finish_reason"] in ("stop", "length"), text


def by_hand(fuzz: Fuzz, count: int, seed: int = 0) -> None:
    """Requests that were valid once."""
    rng = random.Random(seed)
    requests = valid()
    for path, body in requests:
        assert fuzz.send(path, json.dumps(body).encode())[0] == 200, body
    for k in range(count):
        path, body = rng.choice(requests)
        whole = broken(body, rng)
        if isinstance(whole, dict) and path != PATHS[2] and rng.random() < 0.9:
            whole["max_tokens"] = 2
        data = json.dumps(whole).encode()
        fuzz.send(path, raw(data, rng) if rng.random() < 0.2 else data)
        if k % 500 == 499:
            fuzz.well()


def by_schema(fuzz: Fuzz, url: str, count: int, seed: int = 0) -> None:
    """Requests that schemathesis makes of the document, of both modes."""
    import hypothesis
    import schemathesis
    from schemathesis import GenerationMode

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")

    def run(path: str, modes: list[GenerationMode], each: int) -> None:
        strategy = schema[path]["POST"].as_strategy(generation_mode=modes[0])

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=each, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],
        )  # fmt: skip
        @hypothesis.given(case=strategy)
        def one(case: Any) -> None:
            body = case.body
            if isinstance(body, dict) and path != PATHS[2]:
                body = {**body, "max_tokens": 2} if isinstance(body.get("max_tokens", 2), int) else body
            try:
                data = json.dumps(body).encode()
            except (TypeError, ValueError):
                data = repr(body).encode("utf-8", "replace")
            fuzz.send(path, data)

        one()

    for path in PATHS:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            run(path, [mode], -(-count // (2 * len(PATHS))))
            fuzz.well()


def main(url: str, count: int, key: str = "", log: Callable[[str], None] = print) -> None:
    fuzz = Fuzz(url, key)
    fuzz.well()
    by_hand(fuzz, -(-count // 2))
    by_schema(fuzz, url, count // 2)
    fuzz.well()
    log(
        f"{sum(fuzz.seen.values())} requests, answers {dict(fuzz.seen)}, the slowest after {fuzz.slowest:.1f} s"
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:4])
