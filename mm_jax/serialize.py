"""Configs as JSON and back: nested dataclasses, tuples, dicts, optionals; an unknown field is an error."""

import dataclasses
import types
import typing
from typing import Any

from mm_jax.errors import UserError, nearest


def to_json(value: Any) -> Any:
    """Dataclasses become objects, tuples become lists; everything else must be JSON already."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{value!r} has no place in a config")


def from_json(kind: Any, value: Any, where: str = "config") -> Any:
    """The value of type `kind` that `to_json` wrote.

    Raises:
        UserError: an unknown or missing field, or a value of another type, with its dotted path.
    """
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    if origin in (typing.Union, types.UnionType):
        return _union(typing.get_args(kind), value, where)
    if origin is typing.Literal:
        if value not in typing.get_args(kind):
            options = [str(v) for v in typing.get_args(kind)]
            raise UserError(f'{where} is "{value}"{nearest(str(value), options)}')
        return value
    if origin is dict:
        _expect(value, dict, where)
        item = typing.get_args(kind)[1]
        return {k: from_json(item, v, f"{where}.{k}") for k, v in value.items()}
    if origin in (tuple, list):
        _expect(value, list, where)
        args = typing.get_args(kind)
        if origin is tuple and Ellipsis not in args:
            if len(args) != len(value):
                raise UserError(f"{where} has {len(value)} values, {len(args)} are needed")
            return tuple(
                from_json(a, v, f"{where}.{i}") for i, (a, v) in enumerate(zip(args, value, strict=True))
            )
        return origin(from_json(args[0], v, f"{where}.{i}") for i, v in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Any:
        return value
    _expect(value, kind, where)
    return value


def first_difference(
    ours: Any, theirs: Any, where: str = "", ignore: tuple[str, ...] = ()
) -> tuple[str, Any, Any] | None:
    """The dotted path and both values where two JSON trees first differ, or None.

    >>> first_difference({"a": {"b": 1}}, {"a": {"b": 2}})
    ('a.b', 1, 2)
    """
    if where in ignore:
        return None
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in [*ours, *(k for k in theirs if k not in ours)]:
            path = f"{where}.{key}" if where else key
            if path in ignore:
                continue
            if key not in ours or key not in theirs:
                return path, ours.get(key, "(absent)"), theirs.get(key, "(absent)")
            found = first_difference(ours[key], theirs[key], path, ignore)
            if found:
                return found
        return None
    return None if ours == theirs else (where, ours, theirs)


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    _expect(value, dict, where)
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    for key in value:
        if key not in fields:
            raise UserError(f'{where} has an unknown field "{key}"{nearest(key, fields)}')
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise UserError(f'{where} lacks the field "{name}"')
    return kind(**{k: from_json(hints[k], v, f"{where}.{k}") for k, v in value.items()})


def _union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(o for o in options if o is not type(None))
    if isinstance(value, dict):
        names = set(value)
        for option in options:
            if dataclasses.is_dataclass(option) and names == {f.name for f in dataclasses.fields(option)}:
                return from_json(option, value, where)
    for option in options[:-1]:
        try:
            return from_json(option, value, where)
        except UserError:
            continue
    return from_json(options[-1], value, where)


def _expect(value: Any, kind: type, where: str) -> None:
    wrong_bool = isinstance(value, bool) and kind is not bool
    if not isinstance(value, kind) or wrong_bool:
        raise UserError(f"{where} is {value!r}, {kind.__name__} is needed")
