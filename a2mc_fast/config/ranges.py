"""Ranges of numbers, declared in the type of a setting: `gamma: Annotated[float, Range("[0, 1]")]`.

A settings class calls `check_ranges(self)` in `__post_init__`; NaN, infinities and numbers of any size fail
there. Nothing imports torch.
"""

from __future__ import annotations

import functools
import typing
from dataclasses import dataclass
from typing import Annotated, Any

from a2mc_fast.errors import require


@dataclass(frozen=True)
class Range:
    """An interval as it is written: "[0, 1)" has 0 and not 1. The ends are finite."""

    interval: str

    @property
    def ends(self) -> tuple[float, float]:
        """Lower and upper end, whether or not they belong to it."""
        low, high = map(float, self.interval[1:-1].split(","))
        return low, high

    def __contains__(self, value: float) -> bool:
        low, high = self.ends
        above = value >= low if self.interval[0] == "[" else value > low
        return above and (value <= high if self.interval[-1] == "]" else value < high)


Share = Annotated[float, Range("[0, 1]")]
Rate = Annotated[float, Range("[1e-9, 1000]")]
Temperature = Annotated[float, Range("[0.001, 1000]")]
Momentum = Annotated[float, Range("[0, 1)")]
Count = Annotated[int, Range("[1, 1e6]")]
CountOrNone = Annotated[int, Range("[0, 1e6]")]
Seed = Annotated[int, Range("[0, 9223372036854775808)")]


@functools.cache
def ranges(kind: type) -> dict[str, Range | None]:
    """The range of every number, and of every number of a tuple, among a dataclass's fields."""
    found = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        if typing.get_origin(hint) is tuple:
            hint = typing.get_args(hint)[0]
        inner, *extras = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        if inner in (int, float):
            found[name] = next((extra for extra in extras if isinstance(extra, Range)), None)
    return found


def check_ranges(settings: Any, prefix: str = "") -> None:
    """`InputError`, naming the field after `prefix`, for a number outside its range."""
    for name, inside in ranges(settings.__class__).items():
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else (value,):
            require(
                inside is None or number in inside,
                f"{prefix}{name} must be in {inside and inside.interval}, got {number!r:.40}",
            )
