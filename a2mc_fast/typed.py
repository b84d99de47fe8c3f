"""What files say, as types of our own: one reader for every JSON that this package writes and reads again.

`typed(value, hint, where)` checks a value as JSON gives it against a type and gives it that type, down to
the numbers' ranges. Nothing imports torch.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
import typing
from typing import Annotated, Any, Literal, NotRequired

from a2mc_fast.config.ranges import Range
from a2mc_fast.errors import InputError, require

_LARGEST = sys.float_info.max


def typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`; `InputError`, naming `where` it is, for anything else.

    Types are dataclasses, which refuse fields that they do not have, TypedDicts, which leave them out, lists,
    tuples, dictionaries, unions, literals, text, numbers (finite, in their `Range`), bool, None and Any.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) or typing.is_typeddict(hint):
        return _record(value, typing.cast(type, hint), where)
    if hint is Any:
        return value
    if origin is Annotated:
        value = typed(value, args[0], where)
        for extra in args[1:]:
            inside = not isinstance(extra, Range) or value in extra
            require(inside, f"{where} must be in {getattr(extra, 'interval', '')}, got {value!r}")
        return value
    if origin is Literal:
        require(value in args, f"{where} must be one of {', '.join(map(str, args))}, got {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, args, where)
    if origin in (list, tuple):
        return _sequence(value, hint, where)
    if origin is dict:
        require(isinstance(value, dict), f"{where} must be an object, got {type(value).__name__}")
        return {name: typed(item, args[1], f"{where}.{name}") for name, item in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        # false for NaN too, and for whole numbers of any size
        require(abs(value) <= _LARGEST, f"{where} must be a finite number, got {value!r:.40}")
        return float(value)
    matches = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    require(matches, f"{where} must be {hint.__name__}, got {value!r}")
    return value


@functools.cache
def _hints(kind: Any) -> dict[str, tuple[Any, bool]]:
    """Type of every field of a dataclass or TypedDict, and whether it must be there."""
    if dataclasses.is_dataclass(kind):
        # its own checks know the ranges
        hints = typing.get_type_hints(kind)
        return {f.name: (hints[f.name], f.default is f.default_factory) for f in dataclasses.fields(kind)}
    found = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        optional = typing.get_origin(hint) is NotRequired
        found[name] = (typing.get_args(hint)[0] if optional else hint, not optional)
    return found


def _record(value: Any, kind: type, where: str) -> Any:
    """An object with the fields of a dataclass or a TypedDict."""
    require(isinstance(value, dict), f"{where} must be an object, got {type(value).__name__}")
    hints = _hints(kind)
    missing = [name for name, (_, needed) in hints.items() if needed and name not in value]
    require(not missing, f"{where} has no {', '.join(missing)}")
    if dataclasses.is_dataclass(kind):
        unknown = sorted(set(value) - set(hints))
        require(not unknown, f"{where} has unknown fields: {', '.join(unknown)}")
    fields = {n: typed(value[n], hint, f"{where}.{n}") for n, (hint, _) in hints.items() if n in value}
    return kind(**fields)


def _sequence(value: Any, hint: Any, where: str) -> Any:
    """A list, or a tuple of one type or of a type per place."""
    require(isinstance(value, list | tuple), f"{where} must be a list, got {value!r}")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and args[-1] is not Ellipsis:
        require(len(value) == len(args), f"{where} must hold {len(args)} values, got {len(value)}")
        return tuple(typed(item, arg, where) for item, arg in zip(value, args))
    if args[0] in (int, str) and all(type(item) is args[0] for item in value):
        return typing.cast(type, origin)(value)  # a matrix has millions
    return typing.cast(type, origin)(typed(item, args[0], where) for item in value)


def _one_of(value: Any, hints: tuple[Any, ...], where: str) -> Any:
    """The first of a union's types that fits."""
    for hint in hints:
        try:
            return value if value is None and hint is types.NoneType else typed(value, hint, where)
        except InputError as error:
            refused = error
    raise refused
