"""Stages, losses, the optimizer, the one step and the one loop."""
