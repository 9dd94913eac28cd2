"""Which frames of a video are looked at, how large and when, against the reference's video processors.

As a whole those need torchvision; the functions that decide these things do not.
"""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers.video_utils import VideoMetadata  # noqa: E402

from mm_jax.data.media import decode_video  # noqa: E402
from mm_jax.data.native_video import NativeVideo, patch_times  # noqa: E402
from mm_jax.families.qwen2_vl import VIDEO_PROCESSOR as TWO  # noqa: E402
from mm_jax.families.qwen3_vl import VIDEO_PROCESSOR as THREE  # noqa: E402


def reference(name: str):
    """A module of a video processor, imported with an empty torchvision: no function that is used here needs it."""
    names = ["torchvision"]
    for child in ("transforms", "v2", "functional"):
        names.append(f"{names[-1]}.{child}")
    names = [name for name in names if name not in sys.modules]
    sys.modules.update({name: ModuleType(name) for name in names})
    for child in names[1:]:
        parent, _, last = child.rpartition(".")
        setattr(sys.modules[parent], last, sys.modules[child])
    try:
        return importlib.import_module(f"transformers.models.{name}")
    finally:
        for name in names:
            del sys.modules[name]


two, three = (reference(f"{name}.video_processing_{name}") for name in ("qwen2_vl", "qwen3_vl"))
LENGTHS = [(7, 3.0), (30, 10.0), (31, 24.0), (100, 30.0), (2001, 29.97), (5, 60.0)]


@pytest.mark.parametrize("settings", [{}, {"fps": 5, "max_frames": 16}, {"fps": None, "num_frames": 4}])
def test_even_frames(settings):
    values = dict(fps=2, num_frames=None, min_frames=4, max_frames=768) | settings
    ours = NativeVideo.read(settings, THREE | settings, True, 16, 2, 2)
    for total, rate in LENGTHS:
        expected = three.Qwen3VLVideoProcessor.sample_frames(
            SimpleNamespace(**values),
            VideoMetadata(total_num_frames=total, fps=rate),
            num_frames=values["num_frames"],
        )
        assert ours.choose(total, rate).tolist() == expected.tolist()


@pytest.mark.parametrize("settings", [{"fps": 2}, {"fps": 7.5, "max_frames": 12}, {"num_frames": 5}, {}])
def test_frames_in_steps(settings):
    values = dict(fps=None, num_frames=None, min_frames=4, max_frames=768, temporal_patch_size=2) | settings
    ours = NativeVideo.read(settings | {"do_sample_frames": True}, TWO, False, 14, 2, 2)
    for total, rate in LENGTHS:
        if settings:
            expected = two.Qwen2VLVideoProcessor.sample_frames(
                SimpleNamespace(**values), VideoMetadata(total_num_frames=total, fps=rate)
            )
            assert ours.choose(total, rate).tolist() == expected.tolist()
        else:
            assert ours.choose(total, rate).tolist() == list(range(total))


def test_sizes():
    ours = NativeVideo.read({}, THREE, True, 16, 2, 2)
    bounds = dict(zip(("min_pixels", "max_pixels"), ours.bounds, strict=True))
    for frames, height, width in ((2, 100, 200), (8, 20, 300), (5, 720, 1280), (64, 31, 33), (3, 640, 480)):
        expected = three.smart_resize(frames, height, width, 2, 32, **bounds)
        assert ours.size(frames, height, width) == expected


def test_times():
    expected = importlib.import_module("transformers.models.qwen3_vl.processing_qwen3_vl").Qwen3VLProcessor
    for indices in ([0, 4, 9], [0, 1, 2, 3], [5]):
        assert np.allclose(
            patch_times(indices, 4.0, 2), expected._calculate_timestamps(None, list(indices), 4.0, 2)
        )


def test_animations(tmp_path):
    frames = [np.full((6, 8, 3), 40 * k, np.uint8) for k in range(4)]
    images = [PIL.Image.fromarray(frame) for frame in frames]
    path = tmp_path / "a.png"
    images[0].save(path, save_all=True, append_images=images[1:], duration=250)
    found, rate = decode_video(str(path))
    assert rate == 4.0 and np.array_equal(found, frames)
    again, rate = decode_video(images)
    assert rate is None and np.array_equal(again, frames)
