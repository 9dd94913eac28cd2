"""Requests of OpenAI's API as checked objects."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mm_jax.agents.tools import Function, functions_from_json
from mm_jax.data.media import MediaError, audio_seconds, decode_video, image_size
from mm_jax.errors import UserError, nearest
from mm_jax.inference.sampling import ALTERNATIVES, Sampling
from mm_jax.serve.errors import ApiError
from mm_jax.serve.options import ServeOptions

# what other servers and clients send and what changes no answer here
IGNORED = ("user", "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
            "modalities", "reasoning_effort", "verbosity")  # fmt: skip
_SHARED = ("model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
           "frequency_penalty", "logit_bias", "seed", "stop", "n", "max_tokens", "ignore_eos", "logprobs", "stream",
           "stream_options")  # fmt: skip
CHAT = (
    "messages",
    "max_completion_tokens",
    "top_logprobs",
    "response_format",
    "tools",
    "tool_choice",
    "attention",
    *_SHARED,
)
COMPLETION = ("prompt", "echo", *_SHARED)
EMBEDDING = ("model", "input", "encoding_format", "dimensions")
# name -> type, least and largest value
NUMBERS: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 0, 2),
    "top_p": (float, 0, 1),
    "top_k": (int, -1, 2**31 - 1),
    "min_p": (float, 0, 1),
    "repetition_penalty": (float, 0.01, 100),
    "presence_penalty": (float, -2, 2),
    "frequency_penalty": (float, -2, 2),
    "seed": (int, -math.inf, math.inf),
    "n": (int, 1, 16),
    "max_tokens": (int, 1, math.inf),
    "max_completion_tokens": (int, 1, math.inf),
    "top_logprobs": (int, 0, ALTERNATIVES),
}
STOPS = 16  # texts that end an answer
INPUTS = 2048  # of one request for vectors
_LEVELS = 32  # of nested JSON; nothing that is asked for needs more


@dataclass(frozen=True)
class Settings:
    """What chat and plain completions have in common.

    Attributes:
      max_tokens: None for as many as there is room for.
      top_logprobs: None for no log-probabilities, else how many alternatives.
    """

    sampling: Sampling
    n: int = 1
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    ignore_eos: bool = False
    top_logprobs: int | None = None
    stream: bool = False
    usage: bool = False


@dataclass(frozen=True)
class Attention:
    """What is wanted of where the model looked.

    Attributes:
      words: numbers of words of the answer; None for all.
      pictures: heat maps as PNG as well.
    """

    words: tuple[int, ...] | None = None
    pictures: bool = False


@dataclass(frozen=True)
class ChatRequest:
    """POST /v1/chat/completions.

    Attributes:
      choice: "none", "auto", "required", or the name of a function behind "=".
      form: JSON schema that the answer must follow; None for text.
    """

    messages: list[dict[str, Any]]
    settings: Settings
    functions: list[Function] = field(default_factory=list)
    choice: str = "auto"
    form: Mapping[str, Any] | None = None
    attention: Attention | None = None


@dataclass(frozen=True)
class CompletionRequest:
    """POST /v1/completions. prompts: texts or token ids."""

    prompts: list[str | list[int]]
    settings: Settings
    echo: bool = False


@dataclass(frozen=True)
class EmbeddingRequest:
    """POST /v1/embeddings.

    Attributes:
      inputs: each a text, token ids, or parts of a message.
      packed: vectors as base64.
    """

    inputs: list[str | list[int] | list[dict[str, Any]]]
    packed: bool = False


def read_json(body: bytes) -> dict[str, Any]:
    """Raises ApiError: not JSON, not an object, or nested too deep."""
    try:
        text = body.decode("utf-8-sig")
        found = json.loads(text, parse_constant=_no_constant)
        if (
            "\\ud" in text.lower()
        ):  # halves of characters, which no answer could repeat, become question marks
            found = json.loads(json.dumps(found, ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON") from None
    if not isinstance(found, dict):
        raise ApiError(400, "the body must be a JSON object")
    level, layer = 0, [found]
    while layer:
        level += 1
        if level > _LEVELS:
            raise ApiError(400, f"the body is nested deeper than {_LEVELS} levels")
        inner = [list(v.values()) if isinstance(v, dict) else v for v in layer]
        layer = [v for values in inner for v in values if isinstance(v, dict | list)]
    return found


def _no_constant(name: str) -> None:
    raise ValueError(name)


class _Body:
    """Fields of a request, taken by type."""

    def __init__(self, body: Mapping[str, Any], known: tuple[str, ...]):
        for key in body:
            if key not in known and key not in IGNORED:
                raise ApiError(400, f'unknown field "{key}"{nearest(key, known)}', param=key)
        self._body = body

    def __call__(
        self, name: str, kind: type, default: Any = None, low: float = -math.inf, high: float = math.inf
    ):
        """A number, text, flag, list or object; null is the default."""
        value = self._body.get(name)
        if value is None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 2**53 else math.inf
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            names = {float: "a number", int: "a whole number", str: "a text", bool: "true or false", list: "a list",
                     dict: "an object"}  # fmt: skip
            raise ApiError(400, f"{name} must be {names[kind]}", param=name)
        if kind in (int, float) and not low <= value <= high:
            raise ApiError(400, f"{name} is {value}; it must be {_between(low, high)}", param=name)
        return value

    def number(self, name: str, default: float | None = None):
        """One of NUMBERS."""
        kind, low, high = NUMBERS[name]
        return self(name, kind, default, low, high)

    def raw(self, name: str) -> Any:
        return self._body.get(name)


def _between(low: float, high: float) -> str:
    if high == math.inf:
        return f"at least {low}"
    return f"{low} to {high}"


def _settings(take: _Body, top_logprobs: int | None, max_tokens: int | None) -> Settings:
    stop = take.raw("stop")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > STOPS or not all(isinstance(s, str) and s for s in stop):
        raise ApiError(400, f"stop must be a text or a list of at most {STOPS} texts", param="stop")
    bias = {}
    for token, value in take("logit_bias", dict, {}).items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (token.isascii() and token.isdigit() and len(token) < 10 and number and abs(value) <= 100):
            raise ApiError(
                400, "logit_bias must map token ids to numbers from -100 to 100", param="logit_bias"
            )
        bias[int(token)] = float(value)
    seed = take.number("seed")
    options = take("stream_options", dict, {})
    try:
        sampling = Sampling(
            temperature=take.number("temperature", 1.0),
            top_k=max(take.number("top_k", 0), 0),
            top_p=take.number("top_p", 1.0) or 1e-6,
            seed=secrets.randbits(32) if seed is None else seed % 2**32,
            min_p=take.number("min_p", 0.0),
            repetition_penalty=take.number("repetition_penalty", 1.0),
            presence_penalty=take.number("presence_penalty", 0.0),
            frequency_penalty=take.number("frequency_penalty", 0.0),
            logit_bias=bias,
        )
    except UserError as error:
        raise ApiError(400, str(error)) from None
    return Settings(
        sampling=sampling,
        n=take.number("n", 1),
        stop=tuple(stop),
        max_tokens=max_tokens,
        ignore_eos=take("ignore_eos", bool, False),
        top_logprobs=top_logprobs,
        stream=take("stream", bool, False),
        usage=bool(options.get("include_usage")),
    )


def chat_request(body: Mapping[str, Any], options: ServeOptions, videos: bool = False) -> ChatRequest:
    """Raises ApiError naming the field that is wrong. videos: the model takes some."""
    take = _Body(body, CHAT)
    top = take.number("top_logprobs", 0)
    wanted = take("logprobs", bool, False)
    if top and not wanted:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    most = take.number("max_completion_tokens", take.number("max_tokens"))
    messages = take("messages", list)
    if not messages:
        raise ApiError(400, "messages must be a list with at least one message", param="messages")
    check_messages(messages, options, videos=videos)
    try:
        functions = functions_from_json(body["tools"]) if body.get("tools") is not None else []
    except UserError as error:
        raise ApiError(400, str(error), param="tools") from None
    return ChatRequest(
        messages, _settings(take, top if wanted else None, most), functions,
        _choice(take.raw("tool_choice"), functions), _form(take("response_format", dict)),
        _attention(take.raw("attention")),
    )  # fmt: skip


def _choice(choice: Any, functions: list[Function]) -> str:
    names = [function.name for function in functions]
    if isinstance(choice, dict):
        inner = choice.get("function")
        name = inner.get("name") if isinstance(inner, dict) else None
        if choice.get("type") != "function" or name not in names:
            raise ApiError(400, "tool_choice names no function of tools", param="tool_choice")
        return f"={name}"
    if choice is None:
        return "auto"
    if choice not in ("none", "auto", "required"):
        raise ApiError(
            400, 'tool_choice must be "none", "auto", "required" or a function', param="tool_choice"
        )
    if choice == "required" and not names:
        raise ApiError(400, 'tool_choice "required" needs tools', param="tool_choice")
    return choice


def _form(wanted: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    kind = "text" if wanted is None else wanted.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        text = 'response_format.type must be "text", "json_object" or "json_schema"'
        raise ApiError(400, text, param="response_format")
    inner = wanted.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
        raise ApiError(400, "response_format.json_schema needs a schema", param="response_format")
    return schema


def _attention(wanted: Any) -> Attention | None:
    if wanted is None or isinstance(wanted, bool):
        return Attention() if wanted else None
    if not isinstance(wanted, dict) or not wanted.keys() <= {"words", "pictures"}:
        text = 'attention must be true, false or an object with "words" and "pictures"'
        raise ApiError(400, text, param="attention")
    words, pictures = wanted.get("words"), wanted.get("pictures", False)
    if words is not None and not (isinstance(words, list) and all(type(k) is int and k >= 0 for k in words)):
        raise ApiError(400, "attention.words must be a list of numbers of words, from 0", param="attention")
    if not isinstance(pictures, bool):
        raise ApiError(400, "attention.pictures must be true or false", param="attention")
    return Attention(None if words is None else tuple(sorted(set(words))), pictures)


def completion_request(body: Mapping[str, Any], options: ServeOptions) -> CompletionRequest:
    """Raises ApiError naming the field that is wrong."""
    take = _Body(body, COMPLETION)
    prompt = take.raw("prompt")
    prompts = [prompt] if isinstance(prompt, str) or _list_of(prompt, int) else prompt
    if (
        not isinstance(prompts, list)
        or not prompts
        or not all(_list_of(p, int) or (isinstance(p, str) and p) for p in prompts)
    ):
        raise ApiError(400, "prompt must be a text, a list of token ids, or a list of those", param="prompt")
    if len(prompts) > options.queue:
        raise ApiError(400, f"{len(prompts)} prompts in one request; at most {options.queue}", param="prompt")
    settings = _settings(take, take("logprobs", int, None, 0, ALTERNATIVES), take.number("max_tokens", 16))
    return CompletionRequest(prompts, settings, take("echo", bool, False))


def _list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is kind for each in value)


def inputs_of(body: Mapping[str, Any]) -> list[Any]:
    """The "input" of a request for vectors as a list: one text, list of token ids or list of parts is one input."""
    found = body.get("input")
    single = isinstance(found, str) or _list_of(found, int) or _list_of(found, dict)
    return [found] if single else found if isinstance(found, list) else []


def embedding_request(
    body: Mapping[str, Any], options: ServeOptions, size: int, videos: bool = False
) -> EmbeddingRequest:
    """Raises ApiError naming the field that is wrong. size: numbers in a vector; videos: the model takes some."""
    take = _Body(body, EMBEDDING)
    inputs = inputs_of(body)
    if not inputs or not all(
        (isinstance(one, str) and one) or _list_of(one, int) or _list_of(one, dict) for one in inputs
    ):
        text = "input must be a text, a list of token ids, a list of parts, or a list of those; none may be empty"
        raise ApiError(400, text, param="input")
    if len(inputs) > INPUTS:
        raise ApiError(400, f"{len(inputs)} inputs in one request; at most {INPUTS}", param="input")
    form = take("encoding_format", str, "float")
    if form not in ("float", "base64"):
        raise ApiError(400, 'encoding_format must be "float" or "base64"', param="encoding_format")
    wanted = take("dimensions", int, size, 1)
    if wanted != size:
        text = f"the vectors of this model have {size} numbers, and it was not trained to have them cut"
        raise ApiError(400, f"dimensions is {wanted}; {text}", param="dimensions")
    asked = [{"role": "user", "content": one} for one in inputs if _list_of(one, dict)]
    check_messages(asked, options, "input", videos)
    return EmbeddingRequest(inputs, form == "base64")


def check_messages(
    messages: list[Any], options: ServeOptions, name: str = "messages", videos: bool = False
) -> None:
    """Roles, parts and media: nothing may name a file, and no medium may be larger than allowed.

    Videos are decoded, and their frames take their place.

    Args:
      name: of the field, for errors.
      videos: the model takes some.
    """
    pictures, seconds, films = 0, 0.0, _Films(options)
    for k, message in enumerate(messages):
        where = f"{name}.{k}"

        def bad(text: str, where: str = where) -> ApiError:
            return ApiError(400, f"{where}: {text}", param=name)

        if not isinstance(message, dict):
            raise bad("a message is an object")
        role, content = message.get("role"), message.get("content")
        if role == "developer":
            role = message["role"] = "system"
        roles = ("system", "user", "assistant", "tool")
        if role not in roles:
            raise bad(f'unknown role "{role}"{nearest(str(role), roles)}')
        if role == "tool" and not isinstance(message.get("tool_call_id"), str):
            raise bad("a tool's message needs the tool_call_id of a call")
        calls = message.get("tool_calls")
        if calls is not None:
            _check_calls(role, calls, bad)
        if content is None and role == "assistant" and calls:
            continue
        if isinstance(content, str):
            continue
        if not isinstance(content, list):
            raise bad("content must be a text or a list of parts")
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text":
                if not isinstance(part.get("text"), str):
                    raise bad("a text part needs text")
            elif kind == "image_url":
                pictures += 1
                if pictures > options.max_images:
                    raise bad(f"more than {options.max_images} pictures")
                _check_picture(part, options, bad)
            elif kind == "input_audio":
                seconds += _check_audio(part, options, bad)
                if seconds > options.max_seconds:
                    raise bad(f"more than {options.max_seconds:g} s of sound")
            elif kind in ("video_url", "video"):
                if not videos:
                    raise bad("this model takes no videos")
                films.decode(part, bad)
            else:
                known = ("text", "image_url", "input_audio", "video_url", "video")
                raise bad(f'unknown part type "{kind}"{nearest(str(kind), known)}')


def _check_calls(role: Any, calls: Any, bad: Any) -> None:
    def is_call(call: Any) -> bool:
        function = call.get("function") if isinstance(call, dict) else None
        return (
            isinstance(function, dict)
            and isinstance(call.get("id"), str)
            and isinstance(function.get("name"), str)
            and isinstance(function.get("arguments"), str)
        )

    if role != "assistant":
        raise bad("only an assistant's message has tool_calls")
    if not isinstance(calls, list) or not all(map(is_call, calls)):
        raise bad("tool_calls must be a list of calls with id, function.name and function.arguments")


def _check_picture(part: dict, options: ServeOptions, bad: Any) -> None:
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str):
        raise bad("an image_url part needs image_url.url")
    if not url.startswith("data:"):
        others = "only addresses of its hosts" if options.remote.hosts else "nothing"
        raise bad(f"pictures come as data URLs (data:image/png;base64,...); this server fetches {others}")
    try:
        image_size(url, options.max_pixels)
    except MediaError as error:
        raise bad(str(error)) from None


class _Films:
    """The videos of one request, which share the limits."""

    def __init__(self, options: ServeOptions):
        self._options = options
        self._frames, self._pixels = options.max_frames, options.max_video_pixels

    def decode(self, part: dict, bad: Any) -> None:
        """Puts the frames in the place of a video, and their rate."""
        rate = part.get("fps")
        if rate is not None and (type(rate) not in (int, float) or not 0 < rate < 10_000):
            raise bad('"fps" is frames a second, a number above 0')
        source = self._frames_of(part, bad) if part["type"] == "video" else self._file_of(part, bad)
        if self._frames < 1:
            raise bad(f"more than {self._options.max_frames} frames of video")
        try:
            frames, found = decode_video(source, self._options.max_pixels, self._frames, self._pixels)
        except UserError as error:
            raise bad(str(error)) from None
        self._frames -= len(frames)
        self._pixels -= frames.shape[0] * frames.shape[1] * frames.shape[2]
        part.clear()
        part.update(type="video", video=list(frames), fps=found or rate)

    def _file_of(self, part: dict, bad: Any) -> str:
        url = part.get("video_url")
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str):
            raise bad("a video_url part needs video_url.url")
        if not url.startswith("data:"):
            raise bad("videos come as data URLs (data:video/mp4;base64,...); this server fetches none")
        return url

    def _frames_of(self, part: dict, bad: Any) -> list[str]:
        frames = part.get("video")
        if not isinstance(frames, list) or not frames:
            raise bad("a video part needs video: a list of pictures, or use video_url for a file")
        if len(frames) > self._frames:
            raise bad(f"more than {self._options.max_frames} frames of video")
        urls, pixels = [], 0
        for frame in frames:
            frame = frame.get("url") if isinstance(frame, dict) else frame
            _check_picture({"image_url": frame}, self._options, bad)
            urls.append(frame)
            width, height = image_size(frame, self._options.max_pixels)
            pixels += width * height
        if pixels > self._pixels:
            raise bad(f"the frames of videos have more than {self._options.max_video_pixels} pixels together")
        return urls


def _check_audio(part: dict, options: ServeOptions, bad: Any) -> float:
    data = part.get("input_audio")
    data = data.get("data") if isinstance(data, dict) else None
    if not isinstance(data, str):
        raise bad("an input_audio part needs input_audio.data")
    try:
        return audio_seconds(f"data:audio;base64,{data}")
    except MediaError as error:
        raise bad(str(error)) from None
