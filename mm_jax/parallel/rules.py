"""Where parameters go: regular expressions on their paths."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mm_jax.errors import UserError

Rules = Sequence[tuple[str, PartitionSpec]]


def place(mesh: Mesh, rules: Rules) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """(path, shape) -> sharding by the first rule whose pattern is found in the path; a copy everywhere without one.

    >>> rules = [("mlp/(gate|up)/kernel", PartitionSpec(None, None, "tensor"))]     # [layers, in, out]

    The returned function raises UserError where a mesh axis does not divide the dimension that it should split.
    """

    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
        spec = next((spec for pattern, spec in rules if re.search(pattern, path)), PartitionSpec())
        if len(spec) > len(shape):
            raise UserError(f"{path} has the shape {list(shape)}; {spec} has too many axes")
        for size, axes in zip(shape, spec, strict=False):
            names = axes if isinstance(axes, tuple) else () if axes is None else (axes,)
            parts = math.prod(mesh.shape[name] for name in names)
            if size % parts:
                raise UserError(f"{path} has the shape {list(shape)}; {spec} would split {size} into {parts}")
        return NamedSharding(mesh, spec)

    return sharding
