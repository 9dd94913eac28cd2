"""What is wrong gets an error in OpenAI's shape, and the next request is answered."""

import base64
import json
import threading

import pytest

from tests.serve.conftest import Server, audio_part, data_url, image_part, text_part

BIG = (
    "data:image/png;base64,"
    + base64.b64encode(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\1\x86\xa0\0\1\x86\xa0\x08\2\0\0\0").decode()
)


def user(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}]}


def picture(url):
    return user({"type": "image_url", "image_url": {"url": url}}, text_part("x"))


MALFORMED = {
    "no messages": {"messages": None},
    "empty messages": {"messages": []},
    "messages of another type": {"messages": "hello"},
    "message of another type": {"messages": ["hello"]},
    "unknown role": {"messages": [{"role": "wizard", "content": "x"}]},
    "no content": {"messages": [{"role": "user"}]},
    "content of another type": {"messages": [{"role": "user", "content": 5}]},
    "part of another type": user("x"),
    "unknown part": user({"type": "smell", "smell": "x"}),
    "text part without text": user({"type": "text"}),
    "last message is an answer": {"messages": [{"role": "assistant", "content": "x"}]},
    "picture without address": user({"type": "image_url"}),
    "remote picture": picture("http://169.254.169.254/latest"),
    "file": picture("file:///etc/passwd"),
    "path": picture("/etc/passwd"),
    "wrong base64": picture("data:image/png;base64,@@@@"),
    "letters that are not ASCII": picture("data:image/png;base64,aGVs\u00e9bG8="),
    "no base64": picture("data:image/png,hello"),
    "no picture": picture("data:image/png;base64,aGVsbG8="),
    "cut picture": picture(data_url()[:-40]),
    "huge picture": picture(BIG),
    "video to a model that takes none": user(
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    ),
    "wrong sound": user({"type": "input_audio", "input_audio": {"data": "aGVsbG8="}}, text_part("x")),
    "sound without data": user({"type": "input_audio", "input_audio": 5}),
    "negative temperature": {"temperature": -1},
    "temperature of another type": {"temperature": "hot"},
    "huge number": {"temperature": 10**400},
    "top_p": {"top_p": 2},
    "n": {"n": 0},
    "large n": {"n": 1000},
    "true is no number": {"n": True},
    "max_tokens": {"max_tokens": -5},
    "max_tokens over the limit": {"max_tokens": 100000},
    "seed": {"seed": 1.5},
    "stop": {"stop": [""]},
    "many stops": {"stop": ["a"] * 99},
    "logit_bias": {"logit_bias": {"x": 1}},
    "logit_bias of no token": {"logit_bias": {"99999": 1}},
    "top_logprobs without logprobs": {"top_logprobs": 3},
    "too many logprobs": {"logprobs": True, "top_logprobs": 100},
    "unknown field": {"temprature": 1},
    "stream": {"stream": "yes"},
    "tools": {"tools": [{"type": "function"}]},
    "tools of another type": {"tools": {}},
    "tool_choice without tools": {"tool_choice": "required"},
    "tool_choice": {"tool_choice": {"type": "function", "function": {"name": "x"}}},
    "result of no call": {"messages": [{"role": "tool", "tool_call_id": "x", "content": "y"}]},
    "result of a call without a name": {"messages": [{"role": "tool", "tool_call_id": [], "content": "y"}]},
    "tool calls of a user": {"messages": [{"role": "user", "content": "x", "tool_calls": []}]},
    "response_format": {"response_format": {"type": "poem"}},
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 7}}}},
    "attention": {"attention": "yes"},
    "words of attention": {"attention": {"words": [-1]}},
    "pictures of attention": {"attention": {"pictures": 1}},
    "unknown field of attention": {"attention": {"layers": [1]}},
    "too long": {"messages": [{"role": "user", "content": "red " * 1200}]},
    "another model": {"model": "gpt-4"},
    "model of another type": {"model": 4},
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(server, name):
    status, body = server.chat(**MALFORMED[name])
    assert status == (404 if name == "another model" else 400), body
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert error["message"] and "Traceback" not in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"messages": NaN}',
        b"[" * 100_000,
        b'{"a":' * 60 + b"1" + b"}" * 60,
    ],
)
def test_bodies_that_are_no_request(server, body):
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
        status, text = server.send(path, body)
        assert status == 400 and json.loads(text)["error"]["type"] == "invalid_request_error"


def test_halves_of_characters(server):
    """JSON may hold them; whoever repeats them must be able to write them."""
    messages = [{"role": "user", "content": [{"type": "\ud800"}]}]
    status, text = server.send("/v1/chat/completions", json.dumps({"messages": messages}).encode())
    assert status == 400 and 'unknown part type "?"' in json.loads(text)["error"]["message"]
    status, text = server.send(
        "/v1/completions", b'{"prompt": "a \\uDC00\\ud83d\\ude00", "echo": true, "max_tokens": 1}'
    )
    assert status == 200 and json.loads(text)["choices"][0]["text"].startswith("a ?\N{GRINNING FACE}")
    assert server.send("/v1/completions", b'{"prompt": "\xed\xa0\x80"}')[0] == 400


@pytest.mark.parametrize("prompt", [None, "", [], [[]], ["x", 5], {"a": 1}, [10**9], [-1], [True]])
def test_malformed_completions(server, prompt):
    status, text = server.send("/v1/completions", json.dumps({"prompt": prompt}).encode())
    assert status == 400, text


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input": None},
        {"input": ""},
        {"input": []},
        {"input": [""]},
        {"input": " "},
        {"input": [[]]},
        {"input": ["x", 5]},
        {"input": [5, "x"]},
        {"input": [10**9]},
        {"input": [True]},
        {"input": {"a": 1}},
        {"input": [{"type": "smell"}]},
        {"input": [[{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]]},
        {"input": [{"type": "image_url", "image_url": {"url": BIG}}]},
        {"input": "x", "encoding_format": "int8"},
        {"input": "x", "dimensions": 0},
        {"input": "x", "dimensions": 16},
        {"input": "red " * 1200},
        {"input": ["x"] * 3000},
        {"input": "x", "temperature": 1},
    ],
)
def test_malformed_embeddings(server, body):
    status, text = server.send("/v1/embeddings", json.dumps(body).encode())
    error = json.loads(text)["error"]
    assert status == 400 and error["type"] == "invalid_request_error" and "\n" not in error["message"]


def test_still_answers(server):
    """After everything above."""
    status, body = server.chat(**user(image_part(), audio_part(), text_part("what")))
    assert status == 200 and body["choices"][0]["finish_reason"] in ("stop", "length")


def test_limits_of_the_body(server):
    for headers in ({}, {"Transfer-Encoding": "chunked"}):
        body = b" " * 300_000
        status, text = server.send("/v1/chat/completions", iter([body]) if headers else body, headers)
        assert status == 413 and json.loads(text)["error"]["code"] == "body_too_large"


def test_key(server):
    for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": ""}):
        status, text = server.send("/v1/models", None, headers)
        assert status == 401 and json.loads(text)["error"]["code"] == "invalid_api_key"
    assert server.send("/health", None, {"Authorization": ""})[0] == 200


def test_unknown_paths_and_methods(server):
    for path, body, status in (
        ("/v2", None, 404),
        ("/v1/models", b"{}", 405),
        ("/v1/chat/completions", None, 405),
    ):
        found, text = server.send(path, body)
        assert found == status and json.loads(text)["error"]["message"]


def test_the_queue_has_an_end(server):
    """Two rows and six places to wait: of twelve at once some are refused, the others answered."""
    found = []

    def ask():
        found.append(server.chat(max_tokens=120, ignore_eos=True))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [body for status, body in found if status == 429]
    assert refused and all(body["error"]["code"] == "queue_full" for body in refused)
    answered = [body["choices"][0]["message"]["content"] for status, body in found if status == 200]
    assert len(answered) + len(refused) == 12 and len(answered) >= 8
    assert server.chat()[0] == 200


def test_metrics(server):
    before = server.metric("generated_tokens"), server.metric("requests_total")
    assert server.chat(max_tokens=5, ignore_eos=True)[0] == 200
    assert server.metric("generated_tokens") == before[0] + 5
    assert server.metric("requests_total") > before[1]
    assert server.metric("slots ") == 2 and server.metric("ready") == 1 and server.metric("encoded_media") > 0


def test_the_page_needs_no_network(server):
    status, text = server.get("/")
    assert status == 200 and "<title>" in text
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text


def test_sigterm_lets_answers_end(run_dir):
    """No API key, one row: the answer under way arrives whole, then the process is gone."""
    server = Server(run_dir, "--max-length", "256", "--slots", "2", "--timeout", "100").wait()
    try:
        found = []
        thread = threading.Thread(target=lambda: found.append(server.chat(max_tokens=200, ignore_eos=True)))
        thread.start()
        while server.metric("slots_used ") != 1:
            pass
        assert server.stop() == 0
        thread.join()
        status, body = found[0]
        assert status == 200 and body["usage"]["completion_tokens"] == 200
        assert "Traceback" not in server.said()
    finally:
        server.process.kill()


def test_requests_that_take_too_long(run_dir):
    server = Server(run_dir, "--max-length", "256", "--slots", "2", "--timeout", "0.05").wait()
    try:
        for stream in (False, True):
            body = {"messages": [{"role": "user", "content": "how many"}], "max_tokens": 200, "n": 8}
            body |= {"ignore_eos": True, "stream": stream}
            status, text = server.send("/v1/chat/completions", json.dumps(body).encode())
            assert status == (200 if stream else 504)
            error = json.loads(text.removeprefix("data: ").split("data: ")[-1])["error"]
            assert error["code"] == "timeout" and error["type"] == "server_error"
        assert server.stop() == 0
    finally:
        server.process.kill()
