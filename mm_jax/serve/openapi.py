"""What the server takes and gives, as an OpenAPI 3.1 document."""

from __future__ import annotations

import math
from typing import Any

from mm_jax.inference.sampling import ALTERNATIVES
from mm_jax.serve.schema import CHAT, COMPLETION, EMBEDDING, IGNORED, INPUTS, NUMBERS, STOPS

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}


def _object(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


def _list(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


def _one_of(*choices: Schema) -> Schema:
    return {"anyOf": list(choices)}


def _number(name: str) -> Schema:
    kind, low, high = NUMBERS[name]
    schema: Schema = {"type": "integer" if kind is int else "number"}
    schema |= {"minimum": low} if low > -math.inf else {}
    return schema | ({"maximum": high} if high < math.inf else {})


def _kind(name: str) -> Schema:
    return {"type": "string", "const": name}


_FUNCTION = _object(
    ("name",),
    name={"type": "string", "pattern": r"^[A-Za-z0-9_.\-]{1,64}$"},
    description=_TEXT,
    parameters={"type": "object"},
)
_CALL = _object(
    ("id", "type", "function"),
    id=_TEXT,
    type=_kind("function"),
    function=_object(("name", "arguments"), name=_TEXT, arguments=_TEXT),
)
_PART = _one_of(
    _object(("type", "text"), type=_kind("text"), text=_TEXT),
    _object(
        ("type", "image_url"),
        type=_kind("image_url"),
        image_url=_object(
            ("url",), url=_TEXT | {"description": "a data URL; others where hosts are allowed"}
        ),
    ),
    _object(
        ("type", "input_audio"),
        type=_kind("input_audio"),
        input_audio=_object(("data",), data=_TEXT | {"contentEncoding": "base64"}, format=_TEXT),
    ),
    _object(
        ("type", "video_url"),
        type=_kind("video_url"),
        video_url=_object(("url",), url=_TEXT | {"description": "a data URL"}),
        fps={"type": "number", "exclusiveMinimum": 0, "description": "where the file does not say"},
    ),
    _object(
        ("type", "video"),
        type=_kind("video"),
        video=_list(_TEXT | {"description": "a picture as data URL"}, minItems=1),
        fps={"type": "number", "exclusiveMinimum": 0},
    ),
)
_MESSAGE = _object(
    ("role",),
    role={"type": "string", "enum": ["system", "developer", "user", "assistant", "tool"]},
    content=_one_of(_TEXT, _list({"$ref": "#/components/schemas/Part"}), {"type": "null"}),
    tool_calls=_list(_CALL),
    tool_call_id=_TEXT,
)
_IDS = _list({"type": "integer", "minimum": 0}, minItems=1)
_PARTS = _list({"$ref": "#/components/schemas/Part"}, minItems=1)
_FIELDS: dict[str, Schema] = {
    "model": _TEXT,
    "messages": _list({"$ref": "#/components/schemas/Message"}, minItems=1),
    "prompt": _one_of(_TEXT, _IDS, _list(_TEXT, minItems=1), _list(_IDS, minItems=1)),
    "input": _one_of(
        _TEXT | {"minLength": 1}, _IDS, _PARTS,
        _list(_one_of(_TEXT | {"minLength": 1}, _IDS, _PARTS), minItems=1, maxItems=INPUTS),
    ),
    "encoding_format": {"type": "string", "enum": ["float", "base64"]},
    "dimensions": {"type": "integer", "minimum": 1, "description": "none but the model's own are possible"},
    "logit_bias": {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
    "stop": _one_of(_TEXT | {"minLength": 1}, _list(_TEXT | {"minLength": 1}, maxItems=STOPS)),
    "ignore_eos": _FLAG,
    "logprobs": _FLAG,
    "echo": _FLAG,
    "stream": _FLAG,
    "stream_options": _object(include_usage=_FLAG),
    "response_format": _object(
        ("type",),
        type={"type": "string", "enum": ["text", "json_object", "json_schema"]},
        json_schema=_object(("schema",), name=_TEXT, schema={"type": "object"}, strict=_FLAG),
    ),
    "tools": _list(_object(("type", "function"), type=_kind("function"), function=_FUNCTION)),
    "tool_choice": _one_of(
        {"type": "string", "enum": ["none", "auto", "required"]},
        _object(("type", "function"), type=_kind("function"), function=_object(("name",), name=_TEXT)),
    ),
    "attention": _one_of(
        _FLAG,
        _object(words=_list({"type": "integer", "minimum": 0}), pictures=_FLAG) | {"additionalProperties": False},
    ),
    **{name: _number(name) for name in NUMBERS},
}  # fmt: skip


def _request(names: tuple[str, ...], required: str, **other: Schema) -> Schema:
    known = {name: other.get(name, _FIELDS.get(name)) for name in names}
    return _object((required,), **known, **{name: {} for name in IGNORED}) | {"additionalProperties": False}


_ERROR = _object(
    ("error",),
    error=_object(
        ("message", "type"), message=_TEXT, type=_TEXT, param={"type": ["string", "null"]},
        code={"type": ["string", "null"]},
    ),
)  # fmt: skip
_ANSWER = _object(
    ("id", "object", "created", "model", "choices", "usage"),
    id=_TEXT,
    object=_TEXT,
    created={"type": "integer"},
    model=_TEXT,
    choices=_list(_object(("index", "finish_reason"), index={"type": "integer"}, finish_reason=_TEXT)),
    usage=_object(
        ("prompt_tokens", "completion_tokens", "total_tokens"),
        **{f"{kind}_tokens": {"type": "integer"} for kind in ("prompt", "completion", "total")},
    ),
)


_VECTOR = _one_of(_list({"type": "number"}), _TEXT | {"contentEncoding": "base64"})
_VECTORS = _object(
    ("object", "data", "model", "usage"),
    object=_TEXT,
    data=_list(
        _object(("object", "index", "embedding"), object=_TEXT, index={"type": "integer"}, embedding=_VECTOR)
    ),
    model=_TEXT,
    usage=_object(
        ("prompt_tokens", "total_tokens"), prompt_tokens={"type": "integer"}, total_tokens={"type": "integer"}
    ),
)


def _responses(text: str, kind: str, schema: Schema, *failures: int, streams: bool = False) -> dict[str, Any]:
    content = {kind: {"schema": schema}}
    if streams:
        content["text/event-stream"] = {"schema": _TEXT}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    names = {400: "a mistake of the request", 401: "the key is missing or wrong", 404: "another model",
             413: "the body is too large", 429: "too many requests wait", 503: "not ready, or stopping",
             504: "no answer in time"}  # fmt: skip
    found = {"200": {"description": text, "content": content}}
    return found | {str(status): {"description": names[status], "content": error} for status in failures}


def _post(text: str, schema: str, answer: str = "Answer") -> dict[str, Any]:
    body = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    failures = (400, 401, 404, 413, 429, 503, 504)
    found = {"$ref": f"#/components/schemas/{answer}"}
    streams = answer == "Answer"
    return {
        "post": {
            "summary": text,
            "requestBody": {"required": True, "content": body},
            "responses": _responses("an answer", "application/json", found, *failures, streams=streams),
        }
    }


def _get(text: str, kind: str, schema: Schema, *failures: int) -> dict[str, Any]:
    return {"get": {"summary": text, "responses": _responses(text, kind, schema, *failures)}}


def document(model: str, key: bool) -> dict[str, Any]:
    """The document of a server; key: clients must send one."""
    status = _object(("status",), status=_TEXT)
    not_ready = {"description": "not ready, or failed", "content": {"application/json": {"schema": status}}}
    health = _get("ready for requests", "application/json", status)
    health["get"]["responses"]["503"] = not_ready
    listed = _object(("object", "data"), object=_TEXT, data=_list({"type": "object"}))
    top = {"logprobs": {"type": "integer", "minimum": 0, "maximum": ALTERNATIVES}}
    schemas = {
        "Part": _PART,
        "Message": _MESSAGE,
        "ChatRequest": _request(CHAT, "messages"),
        "CompletionRequest": _request(COMPLETION, "prompt", **top),
        "EmbeddingRequest": _request(EMBEDDING, "input"),
        "Answer": _ANSWER,
        "Vectors": _VECTORS,
        "Error": _ERROR,
    }
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": f"mm_jax: {model}", "version": "1", "description": "In the form of OpenAI's API."},
        "paths": {
            "/": _get("a page to chat on", "text/html", _TEXT),
            "/openapi.json": _get("this document", "application/json", {"type": "object"}),
            "/health": health,
            "/metrics": _get("numbers for Prometheus", "text/plain", _TEXT),
            "/v1/models": _get("the model", "application/json", listed, 401),
            "/v1/chat/completions": _post("Answer a conversation", "ChatRequest"),
            "/v1/completions": _post("Continue a text", "CompletionRequest"),
            "/v1/embeddings": _post("Turn texts and pictures into vectors", "EmbeddingRequest", "Vectors"),
        },
        "components": {"schemas": schemas},
    }
    if key:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in found["paths"].items():
            if path.startswith("/v1/"):
                for method in methods.values():
                    method["security"] = [{"key": []}]
    return found
