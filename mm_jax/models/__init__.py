"""Flax modules of the zoo: pure functions of (params, arrays)."""
