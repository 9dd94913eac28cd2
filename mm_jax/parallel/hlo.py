"""What a compiled program does: FLOPs and collectives, loops multiplied out, read off its HLO text.

XLA's own cost analysis counts the body of a loop once, whatever its trip count, so that a model of 32 scanned layers
looks like a model of one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Instruction:
    """One line: `%name = type opcode(operands), attributes`; those of a constant begin with its value."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


@dataclass
class Cost:
    """Of one device and one run of the program.

    flops: of matrix products and convolutions, each multiplication and addition counted.
    kernels: calls of kernels whose FLOPs are not known, by target.
    collectives: kind -> [calls, bytes], the larger of what goes in and what comes out of one device.
    channels: of the collectives that are counted already.
    """

    flops: float = 0.0
    kernels: dict[str, float] = field(default_factory=dict)
    collectives: dict[str, list[float]] = field(default_factory=dict)
    channels: set[str] = field(default_factory=set)


def analyse(text: str) -> Cost:
    """The cost of a program given as `compiled.as_text()`."""
    computations, entry = _parse(text)
    cost = Cost()
    _add(cost, computations, entry, 1.0)
    return cost


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            current = computations[found[2]] = {}
            entry = found[2] if found[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(found[1], found[2])
            if instruction is not None:
                current[instruction.name] = instruction
    return computations, entry


def _instruction(name: str, rest: str) -> Instruction | None:
    kind, rest = _split_type(rest)
    found = re.match(r"([\w\-]+)\(", rest)
    if not found:
        return None
    end = _closing(rest, found.end() - 1)
    operands = tuple(_NAME.findall(rest[found.end() : end]))
    return Instruction(
        name, kind, found[1], operands, rest[found.end() if found[1] == "constant" else end + 1 :]
    )


def _split_type(text: str) -> tuple[str, str]:
    """The type at the beginning, a tuple in brackets or one word, and what follows it."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    return text[:end], text[end:].lstrip()


def _closing(text: str, start: int) -> int:
    depth = 0
    for k in range(start, len(text)):
        depth += (text[k] == "(") - (text[k] == ")")
        if depth == 0:
            return k
    return len(text) - 1


def _arrays(kind: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(d, tuple(int(n) for n in dims.split(",") if n)) for d, dims in _ARRAY.findall(kind)]


def _bytes(kind: str) -> float:
    def bits(dtype: str) -> int:
        digits = re.search(r"\d+", dtype)
        return BITS[dtype] if dtype in BITS else int(digits[0]) if digits else 8

    return sum(bits(dtype) * math.prod(shape) / 8 for dtype, shape in _arrays(kind))


def _add(
    cost: Cost, computations: dict[str, dict[str, Instruction]], name: str, times: float, fused: bool = False
) -> None:
    table = computations.get(name, {})
    for one in table.values():
        kind = one.opcode.removesuffix("-start")
        if one.opcode == "dot":
            cost.flops += times * _dot_flops(one, table)
        elif one.opcode == "convolution":
            cost.flops += times * _convolution_flops(one, table)
        elif kind in COLLECTIVES:
            # one that runs beside products is written into the fusions of its beginning, middle and end; the steps of a
            # ring have one channel too, but are no part of fusions
            if channel := re.search(r"\bchannel_id=(\d+)", one.attributes):
                if channel[1] in cost.channels and (fused or kind != "collective-permute"):
                    continue
                cost.channels.add(channel[1])
            inputs = sum(_bytes(table[o].type) for o in one.operands if o in table)
            # an asynchronous start gives (inputs, outputs, ...)
            outputs = _bytes(one.type) - (
                inputs if one.opcode.endswith("-start") and kind != "all-reduce" else 0
            )
            calls = cost.collectives.setdefault(kind, [0.0, 0.0])
            calls[0] += times
            calls[1] += times * max(inputs, outputs)
        elif one.opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', one.attributes)
            flops = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', one.attributes)
            if flops:
                cost.flops += times * int(flops[1])
            elif target and target[1] == "tpu_custom_call":
                scope = re.search(r'op_name="([^"]*)"', one.attributes)
                what = scope[1].rsplit("/", 1)[-1] if scope else target[1]
                cost.kernels[what] = cost.kernels.get(what, 0.0) + times
        for inner, factor in _called(one, table, computations):
            _add(cost, computations, inner, times * factor, fused or one.opcode == "fusion")


def _called(
    one: Instruction, table: dict[str, Instruction], computations: dict[str, dict[str, Instruction]]
) -> Iterator[tuple[str, float]]:
    """(computation, how often it runs) of an instruction that calls others."""
    if one.opcode == "while":
        trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', one.attributes)
        body = re.search(r"body=%?([\w.\-]+)", one.attributes)
        if body:
            yield body[1], float(trips[1]) if trips else _trips(one, table, computations)
    elif one.opcode == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
        names = (
            _NAME.findall(branches[1])
            if branches
            else re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", one.attributes)
        )
        for name in names:
            yield name, 1.0 / len(names)
    elif one.opcode in ("fusion", "call", "async-start", "custom-call"):
        for attribute in ("calls", "to_apply", "called_computations"):
            if found := re.search(rf"\b{attribute}=\{{?%?([\w.\-]+)", one.attributes):
                yield found[1], 1.0


def _trips(
    loop: Instruction, table: dict[str, Instruction], computations: dict[str, dict[str, Instruction]]
) -> float:
    """How often a loop runs at most whose condition compares a counter with a constant, as the TPU compiler leaves it.

    The counter begins at 0 and goes up by 1 where no constants say otherwise; a loop of another kind counts once.
    """
    found = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
    condition = computations.get(found[1], {}) if found else {}
    for one in condition.values():
        if one.opcode != "compare" or "direction=LT" not in one.attributes:
            continue
        counter, limit = (condition.get(name) for name in one.operands[:2])
        end = _constant(limit)
        if end is None or counter is None or counter.opcode != "get-tuple-element":
            continue
        place = int(re.search(r"index=(\d+)", counter.attributes)[1])
        first = table.get(loop.operands[0])
        inputs = first.operands if first is not None and first.opcode == "tuple" else ()
        start = _constant(table.get(inputs[place])) if place < len(inputs) else None
        return float(max(-(-(end - (start or 0)) // _stride(loop, place, computations)), 0))
    return 1.0


def _stride(loop: Instruction, place: int, computations: dict[str, dict[str, Instruction]]) -> int:
    """By how much the body adds to the counter: XLA writes some loops with two rounds in one, adding 2, or 1 twice."""
    found = re.search(r"body=%?([\w.\-]+)", loop.attributes)
    body = computations.get(found[1], {}) if found else {}
    root = next(reversed(body.values()), None)
    if root is None or root.opcode != "tuple" or place >= len(root.operands):
        return 1
    total, one = 0, body.get(root.operands[place])
    while one is not None and one.opcode in ("add", "copy", "bitcast"):
        numbers = [_constant(body.get(name)) for name in one.operands]
        total += sum(number or 0 for number in numbers)
        before = [name for name, number in zip(one.operands, numbers, strict=True) if number is None]
        one = body.get(before[0]) if len(before) == 1 else None
    return max(total, 1)


def _constant(one: Instruction | None) -> int | None:
    """The value of a whole number that does not change."""
    found = re.match(r"(-?\d+)\)", one.attributes) if one is not None and one.opcode == "constant" else None
    return int(found[1]) if found else None


def _shape(name: str, table: dict[str, Instruction]) -> tuple[int, ...]:
    arrays = _arrays(table[name].type) if name in table else []
    return arrays[0][1] if arrays else ()


def _dot_flops(one: Instruction, table: dict[str, Instruction]) -> float:
    left = _shape(one.operands[0], table)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
    inner = math.prod(left[int(d)] for d in contracted[1].split(",") if d) if contracted else 1
    return 2.0 * math.prod(_arrays(one.type)[0][1]) * inner


def _convolution_flops(one: Instruction, table: dict[str, Instruction]) -> float:
    """Products with padding are not counted: TPUs write batched matrix products as convolutions with much of it."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    left, right = (_shape(name, table) for name in one.operands[:2])
    out = _arrays(one.type)[0][1]
    if not labels or len(left) != len(labels[1]) or len(right) != len(labels[2]):
        return 0.0
    window = _window(one.attributes)
    flops = 2.0 * right[labels[2].index("i")]
    flops *= out[labels[3].index("b")] * out[labels[3].index("f")]
    groups = re.search(r"batch_group_count=(\d+)", one.attributes)
    flops /= int(groups[1]) if groups else 1
    for k in range(len(left) - 2):
        sizes = (left[labels[1].index(str(k))], right[labels[2].index(str(k))], out[labels[3].index(str(k))])
        flops *= _pairs(
            *sizes, *(window[name][k] for name in ("stride", "low", "left_dilate", "right_dilate"))
        )
    return flops


def _window(attributes: str) -> dict[str, list[int]]:
    text = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in text[1].split()) if text else {}
    count = len(fields["size"].split("x")) if "size" in fields else 0

    def numbers(name: str, default: int) -> list[int]:
        return [int(n) for n in fields[name].split("x")] if name in fields else [default] * count

    low = [int(p.split("_")[0]) for p in fields["pad"].split("x")] if "pad" in fields else [0] * count
    return {
        "stride": numbers("stride", 1), "low": low,
        "left_dilate": numbers("lhs_dilate", 1), "right_dilate": numbers("rhs_dilate", 1),
    }  # fmt: skip


def _pairs(
    left: int, right: int, out: int, stride: int, low: int, left_dilate: int, right_dilate: int
) -> int:
    """(output, kernel) places of one spatial dimension that meet an input and no padding."""
    reach, count = (left - 1) * left_dilate + 1, 0
    for k in range(right):
        if left_dilate == 1:  # places o with 0 <= o * stride + k * right_dilate - low < left
            first = max(0, -(-(low - k * right_dilate) // stride))
            last = min(out - 1, (left - 1 + low - k * right_dilate) // stride)
            count += max(0, last - first + 1)
        else:
            places = (o * stride + k * right_dilate - low for o in range(out))
            count += sum(0 <= p < reach and p % left_dilate == 0 for p in places)
    return count
