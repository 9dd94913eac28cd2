"""The document says what the server does."""

import re
from pathlib import Path

import pytest

from mm_jax.serve import app, schema
from mm_jax.serve.errors import ApiError
from mm_jax.serve.openapi import document
from mm_jax.serve.options import ServeOptions

ASK = {"messages": [{"role": "user", "content": "x"}]}
SCHEMAS = document("m", False)["components"]["schemas"]


def test_all_paths_are_in_it():
    found = dict(
        re.findall(r'Route\("([^"]+)", [^)]*?(?:methods=\["(\w+)"\])?\)', Path(app.__file__).read_text())
    )
    paths = document("m", True)["paths"]
    assert {path: method.lower() or "get" for path, method in found.items()} == {
        path: next(iter(methods)) for path, methods in paths.items()
    }
    assert [p for p, m in paths.items() if "security" in next(iter(m.values()))] == [
        p for p in paths if p.startswith("/v1/")
    ]
    assert not any("security" in next(iter(m.values())) for m in document("m", False)["paths"].values())


def test_all_fields_are_in_it():
    for name, known in (
        ("ChatRequest", schema.CHAT),
        ("CompletionRequest", schema.COMPLETION),
        ("EmbeddingRequest", schema.EMBEDDING),
    ):
        found = SCHEMAS[name]
        assert set(found["properties"]) == {*known, *schema.IGNORED} and not found["additionalProperties"]
        assert all(found["properties"][field] for field in known)


@pytest.mark.parametrize("name", schema.NUMBERS)
def test_the_bounds_are_those_of_the_server(name):
    more = {"logprobs": True} if name == "top_logprobs" else {}

    def taken(value) -> bool:
        try:
            schema.chat_request({**ASK, **more, name: value}, ServeOptions())
        except ApiError as error:
            assert error.param == name
            return False
        return True

    bounds = SCHEMAS["ChatRequest"]["properties"][name]
    for side, step in (("minimum", -1), ("maximum", 1)):
        if side in bounds:
            assert taken(bounds[side]) and not taken(bounds[side] + step)
    assert bounds["type"] == "number" or not taken(1.5)
