"""Videos in requests: films, animations and lists of pictures, within limits."""

import base64
import io

import numpy as np
import PIL.Image
import pytest

from mm_jax.data.media import MediaError, container_of, decode_video
from mm_jax.serve.errors import ApiError
from mm_jax.serve.options import ServeOptions
from mm_jax.serve.schema import chat_request
from tests.serve.conftest import data_url, text_part
from tests.tiny import picture

av = pytest.importorskip("av")
CODECS = {"mp4": ("mp4", "mpeg4"), "webm": ("matroska", "libvpx"), "avi": ("avi", "mpeg4")}


def film(container: str = "mp4", count: int = 21, rate: int = 10, size: tuple[int, int] = (64, 48)) -> bytes:
    """Frame k is 10 * k bright."""
    file, (_, codec) = io.BytesIO(), CODECS[container]
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for k in range(count):
            array = np.full((size[1], size[0], 3), 10 * k, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(array, "rgb24")))
        out.mux(stream.encode())
    return file.getvalue()


def url(data: bytes) -> str:
    return "data:video/mp4;base64," + base64.b64encode(data).decode()


def ask(*parts: dict) -> dict:
    return {"messages": [{"role": "user", "content": [*parts, text_part("what")]}]}


def video(source: str) -> dict:
    return {"type": "video_url", "video_url": {"url": source}}


@pytest.mark.parametrize("container", CODECS)
def test_films(container):
    data = film(container)
    assert container_of(data) == CODECS[container][0]
    frames, rate = decode_video(data)
    assert frames.shape == (21, 48, 64, 3) and rate == 10
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), 10 * np.arange(21), atol=4)
    thin, rate = decode_video(url(data), max_frames=8)
    assert rate == 2.5 and np.array_equal(thin, frames[::4])


def test_what_cannot_be_decoded():
    data = film()
    for wrong in (data[:400], data[:-300], data[:12] + b"\xff" * 500):
        with pytest.raises(MediaError, match="damaged or truncated video") as found:
            decode_video(wrong)
        assert "\n" not in str(found.value)
    with pytest.raises(MediaError, match="64 x 48 pixels, at most 100"):
        decode_video(data, 100)
    with pytest.raises(MediaError, match="more than 30000 pixels together"):
        decode_video(data, max_total=30_000)
    # what names other files is no container that is opened
    assert container_of(b"#EXTM3U\n/etc/passwd\n") is container_of(b"ffconcat version 1.0") is None


def test_requests():
    """The frames take the place of the video."""
    options = ServeOptions(max_frames=8)
    parts = [video(url(film())), {"type": "video", "video": [data_url(0), {"url": data_url(1)}], "fps": 2}]
    found = chat_request(ask(*parts), options, True).messages[0]["content"]
    assert [part["type"] for part in found] == ["video", "video", "text"]
    assert len(found[0]["video"]) == 6 and found[0]["fps"] == 2.5
    assert found[1]["fps"] == 2 and np.array_equal(found[1]["video"][1], np.asarray(picture(1)))


def gif(count: int) -> str:
    file = io.BytesIO()
    frames = [PIL.Image.new("RGB", (16, 12), (k * 9, 0, 0)) for k in range(count)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100)
    return "data:image/gif;base64," + base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    "parts, message",
    [
        ([video("http://example.org/x.mp4")], "fetches none"),
        ([video("/etc/passwd")], "data URLs"),
        ([video(url(b"hello"))], "not an image|not a"),
        ([{"type": "video_url"}], "needs video_url.url"),
        ([{"type": "video", "video": "x.mp4"}], "a list of pictures"),
        ([{"type": "video", "video": []}], "a list of pictures"),
        ([{"type": "video", "video": [data_url(0)] * 13}], "more than 12 frames"),
        ([{"type": "video", "video": [data_url(0)], "fps": -1}], "fps"),
        ([{"type": "video", "video": [data_url(0), gif(1)]}], "one size"),
        ([{"type": "video", "video": [data_url(0)] * 12}, video(gif(3))], "more than 12 frames"),
        ([video(url(film(size=(640, 480))))], "pixels together"),
    ],
)
def test_refused(parts, message):
    with pytest.raises(ApiError, match=message) as found:
        chat_request(ask(*parts), ServeOptions(max_frames=12, max_video_pixels=500_000), True)
    assert found.value.status == 400 and found.value.param == "messages"


def test_a_model_without_videos():
    with pytest.raises(ApiError, match="takes no videos"):
        chat_request(ask(video(gif(2))), ServeOptions())


def test_the_prompt_is_that_of_python(tmp_path):
    """Qwen2-VL: thinned out by us, then read as any video."""
    pytest.importorskip("transformers")
    import mm_jax
    from tests.parity import test_qwen_chat

    test_qwen_chat.build(tmp_path)
    lm = mm_jax.load(tmp_path)
    assert lm.takes_videos
    messages = chat_request(ask(video(url(film()))), ServeOptions(max_frames=8), True).messages
    found = lm.prompt(messages)
    frames, rate = decode_video(film(), max_frames=8)
    expected = lm.prompt(
        [
            {
                "role": "user",
                "content": [{"type": "video", "video": list(frames), "fps": rate}, text_part("what")],
            }
        ]
    )
    assert found.length > 20 and np.array_equal(found.tokens, expected.tokens)
    assert np.array_equal(found.slots["patches"], expected.slots["patches"])
