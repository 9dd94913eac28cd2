"""mm_jax: multimodal large language models in JAX.

>>> import mm_jax
>>> lm = mm_jax.load("runs/quickstart")                                  # doctest: +SKIP
>>> lm.chat([{"role": "user", "content": "what is red?"}])               # doctest: +SKIP

Importing it is cheap: names are fetched when they are first used.
"""

from typing import Any

_NAMES = {
    "load": "mm_jax.lm",
    "save": "mm_jax.lm",
    "LanguageModel": "mm_jax.lm",
    "Tower": "mm_jax.tower",
    "families": "mm_jax.families",
    "Sampling": "mm_jax.inference.sampling",
    "Conversation": "mm_jax.data.messages",
    "Message": "mm_jax.data.messages",
    "Text": "mm_jax.data.messages",
    "Image": "mm_jax.data.messages",
    "Audio": "mm_jax.data.messages",
    "Box": "mm_jax.data.messages",
    "UserError": "mm_jax.errors",
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f'module "mm_jax" has no attribute "{name}"')
    import importlib

    return getattr(importlib.import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
