"""Encoded pictures and sound to arrays, with one clear line for everything that can be wrong with them."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import soundfile
import soxr

from mm_jax.data.messages import BadSample
from mm_jax.errors import UserError

MAX_PIXELS = 50_000_000
# a small file may expand to gigabytes of silence
MAX_SECONDS = 1800.0
MAX_SAMPLES = 200_000_000  # of all channels together
MAX_VIDEO_PIXELS = 1_000_000_000  # of all frames of a video together, three bytes each
MAX_DECODED = 100_000  # frames that are read of a video, most of them to be left out
# nothing that runs a program to decode (EPS), and one format less is one attack less
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF")
_EXIF_ORIENTATION = 0x0112


class MediaError(BadSample):
    """A picture, clip or video that cannot be used. `reason` is one of missing_file, unreadable_image, image_bomb,
    unreadable_audio, bad_sample_rate, audio_bomb, unreadable_video, video_bomb, unsupported_source."""


def _read(source: bytes | str | os.PathLike, reason: str) -> tuple[bytes, str]:
    """The encoded bytes of a source and its name for messages."""
    if isinstance(source, bytes | bytearray | memoryview):
        data, name = bytes(source), "the data"
    elif isinstance(source, str) and source.startswith("data:"):
        name = "the data URL"
        head, comma, body = source.partition(",")
        if not comma or not head.endswith(";base64"):
            raise MediaError(f"{name} must look like data:image/png;base64,...", reason)
        try:
            data = base64.b64decode(body, validate=True)
        except ValueError:  # letters that are not ASCII as well
            raise MediaError(f"{name} is not valid base64", reason) from None
    elif isinstance(source, str) and source.startswith(("http://", "https://")):
        text = f"{source[:80]}: give a file path or a data URL, nothing is downloaded"
        raise MediaError(text, "unsupported_source")
    elif isinstance(source, str | os.PathLike):
        name = str(source)
        if len(name) > 4096 or "\0" in name:
            raise MediaError(f"{name[:40]!r}... is not a path nor a data URL", "unsupported_source")
        try:
            data = Path(source).read_bytes()
        except FileNotFoundError:
            raise MediaError(f"{name}: no such file", "missing_file") from None
        except OSError as error:
            raise MediaError(f"{name}: cannot be read ({error.strerror})", "missing_file") from None
    else:
        raise MediaError(f"cannot read media from {type(source).__name__}", "unsupported_source")
    if not data:
        raise MediaError(f"{name}: the file is empty (0 bytes)", reason)
    return data, name


def decode_image(source, max_pixels: int = MAX_PIXELS, plain: bool = False) -> PIL.Image.Image:
    """Anything picture-like to an upright RGB image.

    source: encoded bytes, a path, a data URL, a PIL image, or an array [H, W], [H, W, 1], [H, W, 3] or
    [H, W, 4] of uint8, uint16 or floats in 0..1. EXIF rotation is applied (boxes count pixels after it),
    transparency is pasted on white, 16-bit is scaled to 8-bit, of an animation the first frame is taken.
    plain: 16-bit is left to Pillow's `convert`, as in transformers.

    Raises MediaError; more than max_pixels is refused from the header, before any pixel is decoded.
    """
    if isinstance(source, np.ndarray):
        image = _image_from_array(source, max_pixels)
        return _rgb(image, plain)
    image, name = _open_image(source, max_pixels)
    try:
        image.load()
        # reading EXIF costs more than decoding a small PNG, so only where a file carries some
        if image.format in ("JPEG", "MPO", "TIFF", "WEBP") or "exif" in image.info:
            if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
                image = PIL.ImageOps.exif_transpose(image)
        return _rgb(image, plain)
    except Exception as error:  # decoders raise nearly anything on damaged data
        text = " ".join(str(error).split())
        raise MediaError(f"{name}: damaged or truncated image ({text})", "unreadable_image") from None


def decode_video(
    source,
    max_pixels: int = MAX_PIXELS,
    max_frames: int | None = None,
    max_total: int = MAX_VIDEO_PIXELS,
) -> tuple[np.ndarray, float | None]:
    """Anything video-like to frames uint8 [T, H, W, 3] and, where the source says, frames a second.

    source: a film (MP4, MOV, WebM, MKV, AVI; needs PyAV) or an animation (GIF, WebP, APNG) as encoded bytes, path or
    data URL; frames [T, H, W, 3], or a list of what `decode_image` takes, all of one size.
    max_frames: of a longer film or animation every second, fourth, ... frame is kept, and frames a second are those of
    what is kept; None: all are. max_total: pixels of all kept frames together.

    Raises MediaError; UserError where PyAV is needed and not installed.
    """
    if isinstance(source, list | tuple | np.ndarray):
        frames = [np.asarray(decode_image(frame, max_pixels)) for frame in source]
        if not frames or len({frame.shape for frame in frames}) > 1:
            raise MediaError(
                "the frames of a video need one size, and there must be some", "unreadable_video"
            )
        return np.stack(frames), None
    kept = _Kept(max_frames, max_total)
    if not isinstance(source, PIL.Image.Image):
        source, kept.name = _read(source, "unreadable_video")
        if (container := container_of(source)) is not None:
            _decode_film(source, container, max_pixels, kept)
            return kept.frames_and_rate()
    image, _ = _open_image(source, max_pixels)
    try:
        seconds, count = 0.0, getattr(image, "n_frames", 1)
        for k in range(count):
            image.seek(k)
            image.load()
            kept.add(lambda: np.asarray(_rgb(image.copy())))
            seconds += image.info.get("duration", 0) / 1000
    except MediaError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged data
        text = " ".join(str(error).split())
        raise MediaError(
            f"{kept.name}: damaged or truncated animation ({text})", "unreadable_video"
        ) from None
    kept.rate = count / seconds if seconds else None
    return kept.frames_and_rate()


class _Kept:
    """Frames of a video as they are decoded. Attributes: rate: frames a second of the whole, where it is known."""

    def __init__(self, most: int | None, pixels: int):
        self._most, self._pixels = most, pixels
        self._frames: list[np.ndarray] = []
        self._step, self._seen = 1, 0
        self.name, self.rate = "the video", None

    def add(self, make: Callable[[], np.ndarray]) -> None:
        """The next frame, which is made where it is kept."""
        self._seen += 1
        if self._seen > MAX_DECODED:
            raise MediaError(f"{self.name}: more than {MAX_DECODED} frames", "video_bomb")
        if (self._seen - 1) % self._step:
            return
        frame = make()
        if self._frames and frame.shape != self._frames[0].shape:
            raise MediaError(f"{self.name}: its frames have different sizes", "unreadable_video")
        self._frames.append(frame)
        if self._most is not None and len(self._frames) > self._most:
            self._frames, self._step = self._frames[::2], 2 * self._step
        if sum(frame.shape[0] * frame.shape[1] for frame in self._frames) > self._pixels:
            text = f"{self.name}: its frames have more than {self._pixels} pixels together"
            raise MediaError(text, "video_bomb")

    def frames_and_rate(self) -> tuple[np.ndarray, float | None]:
        if not self._frames:
            raise MediaError(f"{self.name}: there is no frame in it", "unreadable_video")
        return np.stack(self._frames), self.rate / self._step if self.rate else None


def _decode_film(data: bytes, container: str, max_pixels: int, kept: _Kept) -> None:
    """Adds the frames of a film. Nothing but the data is read, whatever it says."""
    try:
        import av
    except ImportError:
        raise UserError(f"{kept.name}: films need PyAV: pip install 'mm_jax[video]'") from None
    try:
        closed = {"protocol_whitelist": "none"}  # a container may name other files
        with av.open(io.BytesIO(data), format=container, options=closed, metadata_errors="replace") as file:
            if not file.streams.video:
                raise MediaError(f"{kept.name}: there is no video in it", "unreadable_video")
            stream = file.streams.video[0]
            context = stream.codec_context
            _check_size((context.width, context.height), max_pixels, kept.name)
            kept.rate = float(stream.average_rate) if stream.average_rate else None
            for frame in file.decode(stream):
                _check_size((frame.width, frame.height), max_pixels, kept.name)
                kept.add(partial(_upright, frame))
    except MediaError:
        raise
    except Exception as error:  # ffmpeg raises nearly anything on damaged data
        text = " ".join(str(error).split())
        raise MediaError(f"{kept.name}: damaged or truncated video ({text})", "unreadable_video") from None


def _upright(frame) -> np.ndarray:
    """A frame of a film uint8 [H, W, 3], turned as its file says."""
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))


def container_of(data: bytes) -> str | None:
    """The name that ffmpeg has for the container of a film, by its first bytes; None for anything else. Only these are
    opened: among the other formats are lists of files to be read."""
    if data[4:8] in (b"ftyp", b"moov", b"mdat"):
        return "mp4"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    return "avi" if data[:4] == b"RIFF" and data[8:12] == b"AVI " else None


def image_size(source, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) after EXIF rotation. Raises MediaError.

    Of a JPEG only the header is read; a PNG may carry its EXIF after the pixels, so it is decoded.
    """
    if isinstance(source, np.ndarray):
        return _image_from_array(source, max_pixels).size
    image, name = _open_image(source, max_pixels)
    width, height = image.size
    if image.format == "TIFF":
        # before loading, versions of Pillow differ in whether the size is that after rotation
        return decode_image(image, max_pixels).size
    try:
        turned = image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception as error:
        text = " ".join(str(error).split())
        raise MediaError(f"{name}: damaged or truncated image ({text})", "unreadable_image") from None
    return (height, width) if turned else (width, height)


def _open_image(source, max_pixels: int) -> tuple[PIL.Image.Image, str]:
    if isinstance(source, PIL.Image.Image):
        image, name = source, "the image"
    else:
        data, name = _read(source, "unreadable_image")
        try:
            image = PIL.Image.open(io.BytesIO(data), formats=_FORMATS)
        except PIL.Image.DecompressionBombError as error:
            # Pillow gives the size in its sentence only
            pixels = str(error).partition("(")[2].partition(" ")[0]
            text = f"{name}: {pixels} pixels, at most {max_pixels} are read"
            raise MediaError(text, "image_bomb") from None
        except PIL.UnidentifiedImageError:
            raise MediaError(
                f"{name}: not an image ({', '.join(_FORMATS)} are read)", "unreadable_image"
            ) from None
        except Exception as error:
            text = " ".join(str(error).split())
            raise MediaError(f"{name}: damaged image header ({text})", "unreadable_image") from None
    _check_size(image.size, max_pixels, name)
    return image, name


def _check_size(size: tuple[int, int], max_pixels: int, name: str) -> None:
    width, height = size
    if width * height > max_pixels:
        raise MediaError(f"{name}: {width} x {height} pixels, at most {max_pixels} are read", "image_bomb")
    if width * height == 0:
        raise MediaError(f"{name}: {width} x {height} pixels", "unreadable_image")


def _image_from_array(array: np.ndarray, max_pixels: int) -> PIL.Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        text = f"an image array must be [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], not {list(array.shape)}"
        raise MediaError(text, "unreadable_image")
    _check_size((array.shape[1], array.shape[0]), max_pixels, "the array")
    if array.dtype == np.uint16:
        array = np.round(array / 257).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            text = "a float image array must lie in 0..1; give uint8 for 0..255"
            raise MediaError(text, "unreadable_image")
        array = np.round(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        text = f"an image array must be uint8, uint16 or float, not {array.dtype}"
        raise MediaError(text, "unreadable_image")
    return PIL.Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _rgb(image: PIL.Image.Image, plain: bool = False) -> PIL.Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if not plain and (image.mode.startswith("I") or image.mode == "F"):
        array = np.nan_to_num(np.asarray(image).astype(np.float32))
        high = float(array.max())
        # 16-bit greyscale opens as I;16 or, from some formats, as I; smaller values are 8-bit already
        scale = 1 / 257 if image.mode.startswith("I;16") or high > 255 else 255.0 if high <= 1.0 else 1.0
        grey = np.clip(np.round(array * scale), 0, 255).astype(np.uint8)
        return PIL.Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        return PIL.Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def decode_audio(
    source, rate: int, sample_rate: int | None = None, max_seconds: float = MAX_SECONDS
) -> np.ndarray:
    """Anything sound-like to float32 mono samples [T] at `rate` Hz, in -1..1.

    source: encoded bytes, a path or a data URL (WAV, FLAC, OGG, MP3: what libsndfile reads), or samples [T]
    or [T, channels], int16 or float, which need their `sample_rate` (Hz). Channels are averaged.

    Raises MediaError: unreadable, empty, not finite, longer than max_seconds, rate outside 4000..384000 Hz.
    """
    if isinstance(source, np.ndarray):
        name = "the audio array"
        if sample_rate is None:
            raise MediaError(f"{name} needs its sample_rate (Hz)", "bad_sample_rate")
        if source.ndim not in (1, 2) or (source.ndim == 2 and source.shape[1] > 16):
            text = f"{name} must be [T] or [T, channels], not {list(source.shape)}"
            raise MediaError(text, "unreadable_audio")
        if source.dtype == np.int16:
            samples = source.astype(np.float32) / 32768.0
        elif np.issubdtype(source.dtype, np.floating):
            samples = source.astype(np.float32)
        else:
            raise MediaError(f"{name} must be int16 or float, not {source.dtype}", "unreadable_audio")
        _check_rate(sample_rate, name)
    else:
        samples, sample_rate, name = _read_audio(source, max_seconds)
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if samples.size == 0:
        raise MediaError(f"{name}: the clip holds no sample", "unreadable_audio")
    if samples.size > max_seconds * sample_rate:
        raise MediaError(f"{name}: more than {max_seconds:g} s of audio", "audio_bomb")
    if not np.isfinite(samples).all():
        raise MediaError(f"{name}: some samples are NaN or infinite", "unreadable_audio")
    if sample_rate != rate:
        samples = soxr.resample(samples, sample_rate, rate)
        if samples.size == 0:
            text = f"{name}: too short to resample from {sample_rate} to {rate} Hz"
            raise MediaError(text, "unreadable_audio")
    return np.ascontiguousarray(samples, np.float32)


def audio_seconds(source) -> float:
    """Seconds of an encoded clip by its header. Raises MediaError."""
    data, name = _read(source, "unreadable_audio")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            return file.frames / file.samplerate
    except (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError, ZeroDivisionError) as error:
        raise _unreadable_audio(name, error) from None


def _unreadable_audio(name: str, error: Exception) -> MediaError:
    text = f"{name}: not a readable WAV, FLAC, OGG or MP3 ({' '.join(str(error).split())})"
    return MediaError(text, "unreadable_audio")


def _check_rate(rate: int, name: str) -> None:
    if isinstance(rate, bool) or not isinstance(rate, int | np.integer) or not 4000 <= rate <= 384000:
        text = f"{name}: sample rate {rate!r} Hz, must be a whole number 4000..384000"
        raise MediaError(text, "bad_sample_rate")


def _read_audio(source, max_seconds: float) -> tuple[np.ndarray, int, str]:
    data, name = _read(source, "unreadable_audio")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate = file.samplerate
            _check_rate(rate, name)
            if file.frames * file.channels > MAX_SAMPLES:
                text = f"{name}: {file.frames} frames of {file.channels} channels are too many"
                raise MediaError(text, "audio_bomb")
            # one frame over the limit shows the excess without trusting the header's length
            samples = file.read(int(max_seconds * rate) + 1, dtype="float32")
    except (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError) as error:
        raise _unreadable_audio(name, error) from None
    return samples, rate, name
