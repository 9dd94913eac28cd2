"""`compile`: compile the programs of a config ahead of time and say what they need."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mm_jax.cli.arguments import split_arguments
from mm_jax.errors import UserError, nearest

if TYPE_CHECKING:
    from mm_jax.train.ahead import Report

HELP = """usage: python -m mm_jax compile CONFIG.py [--topology NAME] [--mesh AXIS=N,...] [--any.field value ...]

Compiles the training step of every stage and says what it needs on one chip: memory, FLOPs, collectives. Nothing of the
model's size is ever allocated, and for TPUs no TPU is needed: their compiler is the package libtpu.

  --topology NAME    TPUs such as v5e:4x4, v5p:4x4x8, v6e:16x16 (default: the devices of this machine)
  --slices N         so many slices of that topology (1)
  --mesh AXES        sizes of axes, such as fsdp=64,tensor=4; what is not named is chosen
  --stage NAME       this stage alone
  --decode BxL       a decoding step of B rows over a cache of L tokens instead
  --json FILE        also write the numbers there; - for standard output

example: python -m mm_jax compile configs/llava_1_5_7b.py --topology v5e:8x8 --stage instruct"""

OPTIONS = ("topology", "slices", "mesh", "stage", "decode", "json")


def main(argv: Sequence[str]) -> int:
    parsed = split_arguments(argv, HELP, options=OPTIONS)
    if parsed is None:
        return 0
    options = parsed.options
    if "topology" in options:  # before jax: it must not look for TPUs here
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from mm_jax.parallel.mesh import parse_mesh
    from mm_jax.train.ahead import compile_decode, compile_train
    from mm_jax.train.config import load_config
    from mm_jax.train.start import planned_config

    config = planned_config(load_config(parsed.path, parsed.rest))
    if "mesh" in options:
        config = dataclasses.replace(config, mesh=parse_mesh(options["mesh"]))
    devices = find_devices(options.get("topology"), options.get("slices", "1"))
    if "decode" in options:
        reports = [compile_decode(config, *_decode(options["decode"]), devices)]
    else:
        names = [options["stage"]] if "stage" in options else list(config.stages)
        if unknown := [name for name in names if name not in config.stages]:
            raise UserError(f'the config has no stage "{unknown[0]}"{nearest(unknown[0], config.stages)}')
        reports = [compile_train(config, name, devices) for name in names]
    values = json.dumps([dataclasses.asdict(report) for report in reports], indent=1)
    if options.get("json") == "-":
        print(values)
        return 0
    for report in reports:
        print(describe(report))
    if "json" in options:
        try:
            with open(options["json"], "w") as file:
                file.write(values + "\n")
        except OSError as error:
            raise UserError(f"cannot write {options['json']}: {error.strerror}") from None
    return 0


def find_devices(topology: str | None, slices: str = "1") -> Sequence[Any]:
    """The devices of this machine, or those that a topology describes.

    Raises:
        UserError: no such topology, or no compiler for it.
    """
    import jax

    if topology is None:
        return jax.devices()
    if not slices.isdigit() or slices == "0":
        raise UserError(f"--slices is {slices}; a whole number from 1 is needed")
    from jax.experimental import topologies

    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UserError("compiling for TPUs needs the package libtpu: pip install 'mm_jax[tpu]'") from None
    extra = {"num_slices": int(slices)} if slices != "1" else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **extra).devices
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f'there is no topology "{topology}" ({reason}); names are like v5e:4x4, v5p:2x2x4, v6e:16x16'
        ) from None


def describe(report: Report) -> str:
    """The report as a table."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items()) or "one device"
    rows = [("chips", f"{report.chips} x {report.device}, {mesh}")]
    if report.arguments:
        rows += [
            ("arguments", _gb(report.arguments) + f" ({_gb(report.aliased)} given back in place)"),
            ("temporaries", _gb(report.temporaries)),
        ]
    if report.peak:
        rows.append(("peak", f"{_gb(report.peak)} of {_gb(report.memory)}"))
    if report.flops:
        ratio = f", {report.flops / report.model_flops:.2f} x model" if report.model_flops else ""
        rows.append(("FLOPs", f"{report.flops:.3g}{ratio}"))
    rows += [(f"{name} kernels", f"{count:.0f}") for name, count in report.kernels.items()]
    for kind, (calls, size) in sorted(report.collectives.items()):
        rows.append((kind, f"{calls:.0f} calls, {_gb(size)}"))
    rows.append(("compiled in", f"{report.seconds:.0f} s"))
    rows.append(("verdict", "fits" if report.fits else f"does not fit; try {report.advice}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join([report.program, *(f"  {name:{width}}  {value}" for name, value in rows)])


def _gb(size: float) -> str:
    return f"{size / 1e9:.3f} GB" if size < 1e10 else f"{size / 1e9:.1f} GB"


def _decode(text: str) -> tuple[int, int]:
    rows, _, length = text.partition("x")
    if not (rows.isdigit() and length.isdigit() and int(rows) and int(length)):
        raise UserError(f'--decode is "{text}"; rows x cache length is needed, such as 8x4096')
    return int(rows), int(length)
