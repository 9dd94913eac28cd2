"""How a server behaves."""

from __future__ import annotations

from dataclasses import dataclass

from mm_jax.errors import UserError
from mm_jax.serve.remote import Remote


@dataclass(frozen=True)
class ServeOptions:
    """Limits and names.

    Attributes:
      model: name of the model in answers, and the one that requests ask for.
      slots: answers under way at the same time.
      queue: requests that may wait; one more is answered with 429.
      max_length: most tokens of prompt and answer together; 0: what the model was made for.
      api_key: what clients must send as their key; "" for none.
      max_body: bytes of a request.
      max_pixels: of one picture.
      max_images, max_seconds: pictures, and seconds of sound, of one request.
      max_frames: frames that are looked at of the videos of one request; of longer ones some are left out.
      max_video_pixels: of all these frames together, three bytes each.
      remote: pictures that are fetched from other hosts; none by default.
      timeout: seconds that one request may take, waiting included.
      drain: seconds that answers under way get to end after SIGTERM.
    """

    model: str = "mm_jax"
    slots: int = 8
    queue: int = 64
    max_length: int = 0
    api_key: str = ""
    max_body: int = 32 * 2**20
    max_pixels: int = 50_000_000
    max_images: int = 64
    max_seconds: float = 600.0
    max_frames: int = 256
    max_video_pixels: int = 200_000_000
    remote: Remote = Remote()
    timeout: float = 600.0
    drain: float = 30.0

    def __post_init__(self) -> None:
        for name, least in (("slots", 1), ("queue", 1), ("max_length", 0), ("max_body", 1), ("max_pixels", 1),
                            ("max_images", 0), ("max_frames", 1), ("max_video_pixels", 1)):  # fmt: skip
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not (self.remote.max_bytes > 0 and self.remote.seconds > 0):
            raise UserError("fetching a picture needs bytes and seconds above 0")
        for name in ("max_seconds", "timeout", "drain"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be above 0")
