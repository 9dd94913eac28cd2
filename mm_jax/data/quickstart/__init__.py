"""Quickstart data: real handwriting, rendered words, charts, tables, scenes and speech as chat messages."""

from mm_jax.data.quickstart.generate import prepare
from mm_jax.data.quickstart.sizes import SIZES

__all__ = ["SIZES", "prepare"]
