"""The commands of `python -m mm_jax`, one file each."""
