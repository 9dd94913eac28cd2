"""Real encoded files, whole and damaged, through the decoders."""

import base64
import io
import pickle
import struct
import tracemalloc
import zlib

import numpy as np
import PIL.Image
import pytest
import soundfile

from mm_jax.data.media import MediaError, decode_audio, decode_image, image_size

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encode(image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def wav(samples, rate, kind="WAV", subtype=None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, subtype, format=kind)
    return buffer.getvalue()


def png_header(width, height) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + data + chunk(b"IEND", b"")


@pytest.fixture
def picture():
    rng = np.random.default_rng(0)
    return PIL.Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8))


def test_sources(tmp_path, picture):
    data = encode(picture)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (data, str(path), path, url, picture, np.asarray(picture)):
        image = decode_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture))
        assert image_size(source) == (60, 40) if source is not path else True


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF"])
def test_formats(picture, kind):
    assert decode_image(encode(picture, kind)).size == (60, 40)


def test_exif_rotation():
    image = PIL.Image.new("RGB", (4, 2), WHITE)
    image.putpixel((0, 0), RED)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    for kind in ("PNG", "TIFF"):
        data = encode(image, kind, exif=exif)
        upright = decode_image(data)
        assert upright.size == image_size(data) == (2, 4)
        assert upright.getpixel((1, 0)) == RED


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (PIL.Image.new("L", (2, 2), 7), (7, 7, 7)),
        (PIL.Image.new("1", (2, 2), 1), WHITE),
        (PIL.Image.new("RGBA", (2, 2), (255, 0, 0, 0)), WHITE),
        (PIL.Image.new("RGBA", (2, 2), (255, 0, 0, 51)), (255, 204, 204)),
        (PIL.Image.new("LA", (2, 2), (0, 0)), WHITE),
        (PIL.Image.new("I;16", (2, 2), 257 * 9), (9, 9, 9)),
        (PIL.Image.new("RGB", (2, 2), RED).convert("P"), RED),
    ],
)
def test_modes_become_rgb(image, expected):
    decoded = decode_image(encode(image))
    assert decoded.mode == "RGB"
    assert decoded.getpixel((0, 0)) == expected


def test_more_modes():
    assert decode_image(encode(PIL.Image.new("CMYK", (2, 2), (0, 0, 0, 255)), "TIFF")).getpixel((0, 0)) == (
        0,
        0,
        0,
    )
    transparent = PIL.Image.new("P", (2, 2), 0)
    transparent.putpalette([255, 0, 0])
    assert decode_image(encode(transparent, transparency=0)).getpixel((0, 0)) == WHITE


def test_arrays():
    assert decode_image(np.full((2, 3), 5, np.uint8)).getpixel((0, 0)) == (5, 5, 5)
    assert decode_image(np.full((2, 3, 1), 5, np.uint8)).size == (3, 2)
    assert decode_image(np.full((2, 3, 4), 0, np.uint8)).getpixel((0, 0)) == WHITE
    assert decode_image(np.full((2, 3, 3), 514, np.uint16)).getpixel((0, 0)) == (2, 2, 2)
    assert decode_image(np.full((2, 3), 0.2)).getpixel((0, 0)) == (51, 51, 51)


def fails(decode, *args, reason, text="", **options):
    with pytest.raises(MediaError, match="^[^\n]*$") as error:
        decode(*args, **options)
    assert error.value.reason == reason
    assert text in str(error.value)


def test_bad_images(tmp_path, picture):
    jpeg = encode(picture, "JPEG")
    fails(decode_image, jpeg[: len(jpeg) // 2], reason="unreadable_image", text="truncated")
    fails(decode_image, encode(picture)[:-300], reason="unreadable_image", text="truncated")
    fails(decode_image, b"", reason="unreadable_image", text="empty (0 bytes)")
    (tmp_path / "empty.png").touch()
    fails(
        decode_image,
        str(tmp_path / "empty.png"),
        reason="unreadable_image",
        text="empty.png: the file is empty",
    )
    fails(decode_image, b"GIF? no, just text", reason="unreadable_image", text="not an image")
    fails(decode_image, str(tmp_path / "no.png"), reason="missing_file", text="no.png: no such file")
    fails(decode_image, str(tmp_path), reason="missing_file", text="directory")
    fails(decode_image, "data:image/png,abc", reason="unreadable_image", text="must look like")
    fails(decode_image, "data:image/png;base64,?", reason="unreadable_image", text="base64")
    fails(decode_image, "https://example.com/a.png", reason="unsupported_source", text="downloaded")
    fails(decode_image, 7, reason="unsupported_source", text="int")
    fails(decode_image, np.zeros((2, 2, 2), np.uint8), reason="unreadable_image", text="[2, 2, 2]")
    fails(decode_image, np.zeros((0, 2), np.uint8), reason="unreadable_image", text="2 x 0")
    fails(decode_image, np.full((2, 2), 7.0), reason="unreadable_image", text="0..1")
    fails(decode_image, np.zeros((2, 2), np.int64), reason="unreadable_image", text="int64")


@pytest.mark.parametrize("size", [(20_000, 20_000), (10_000, 5_001)])
def test_a_bomb_is_refused_by_its_header(size):
    data = png_header(*size)
    tracemalloc.start()
    for function in (decode_image, image_size):
        fails(function, data, reason="image_bomb", text="pixels")
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_max_pixels(picture):
    assert decode_image(picture, 2400)
    fails(decode_image, encode(picture), 2399, reason="image_bomb", text="60 x 40 pixels, at most 2399")


def test_errors_cross_processes():
    error = pickle.loads(pickle.dumps(MediaError("a line", "image_bomb")))
    assert (str(error), error.reason) == ("a line", "image_bomb")


TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)).astype(np.float32)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_audio_formats(kind):
    samples = decode_audio(wav(TONE, 16000, kind), 16000)
    assert samples.dtype == np.float32
    assert samples.shape[0] >= 16000
    spectrum = np.abs(np.fft.rfft(samples[:16000]))
    assert spectrum.argmax() == 440


def test_audio_sources(tmp_path):
    data = wav(TONE, 16000, subtype="FLOAT")
    path = tmp_path / "a.wav"
    path.write_bytes(data)
    url = "data:audio/wav;base64," + base64.b64encode(data).decode()
    for source in (data, str(path), url):
        np.testing.assert_array_equal(decode_audio(source, 16000), TONE)
    np.testing.assert_array_equal(decode_audio(TONE, 16000, 16000), TONE)
    np.testing.assert_array_equal(decode_audio(np.array([16384, -32768], np.int16), 8000, 8000), [0.5, -1.0])


def test_stereo_becomes_mono_and_the_rate_changes():
    stereo = np.stack([TONE, np.zeros_like(TONE)], axis=1)
    np.testing.assert_allclose(decode_audio(stereo, 16000, 16000), TONE / 2)
    long = np.sin(2 * np.pi * 440 * np.arange(44100) / 44100)
    samples = decode_audio(wav(long, 44100), 16000)
    assert samples.shape == (16000,)
    np.testing.assert_allclose(samples[2000:-2000], 2 * TONE[2000:-2000], atol=1e-3)


def test_bad_audio(tmp_path):
    def bad(source, *args, reason, text, **options):
        fails(decode_audio, source, 16000, *args, reason=reason, text=text, **options)

    bad(TONE, reason="bad_sample_rate", text="needs its sample_rate")
    bad(TONE, 3999, reason="bad_sample_rate", text="3999 Hz")
    bad(TONE, 384001, reason="bad_sample_rate", text="384001 Hz")
    bad(TONE, "16000", reason="bad_sample_rate", text="'16000' Hz")
    bad(wav(TONE, 100), reason="bad_sample_rate", text="100 Hz")
    bad(TONE[:0], 16000, reason="unreadable_audio", text="no sample")
    bad(wav(TONE[:0], 16000), reason="unreadable_audio", text="no sample")
    bad(np.array([0.0, np.nan]), 16000, reason="unreadable_audio", text="NaN")
    bad(np.zeros((2, 16000)), 16000, reason="unreadable_audio", text="[2, 16000]")
    bad(np.zeros(3, np.int64), 16000, reason="unreadable_audio", text="int64")
    bad(b"", reason="unreadable_audio", text="empty (0 bytes)")
    bad(b"not a sound at all", reason="unreadable_audio", text="not a readable WAV")
    bad(wav(TONE, 16000)[:30], reason="unreadable_audio", text="not a readable WAV")
    bad(str(tmp_path / "no.wav"), reason="missing_file", text="no.wav: no such file")
    bad(wav(TONE, 16000), max_seconds=0.5, reason="audio_bomb", text="more than 0.5 s")
    bad(wav(np.zeros(40_000_000, np.int16), 16000, "FLAC"), reason="audio_bomb", text="more than 1800 s")
