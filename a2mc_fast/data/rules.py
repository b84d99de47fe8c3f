"""The one rule of what a clip must be to be trained on.

A clip has

- a name of 1 to 255 printable characters that no other clip of the set has,
- a label from 0 to 65,535 and below the number of class names, or -1 where it is unknown,
- at least one frame, as many joints as the skeleton (1 to 1,000) and the persons of the set,
- coordinates that are finite and within 1,000 m, not all of them zero.

A protocol has such a name too, and a set has at most 64 of them. `prepare` skips a clip that breaks the rule
and names it in the report (of several clips with one name it keeps the first); `Clips` refuses the whole set.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

Reason = Literal[
    "unreadable", "name not understood", "listed twice", "excluded by the list", "no label",
    "no skeleton data", "label out of range", "no frames", "wrong joint count", "wrong number of persons",
    "not finite", "beyond 1,000 m", "no body",
]  # fmt: skip
"""Why a recording is left out, as the report says it."""

MAX_COORDINATE = 1e3
"""Metres; anything beyond is not a pose."""
MAX_LABEL = 65_535
"""The class layer and every count per class are made for the largest label."""
MAX_NAME = 255
"""Characters, as in a file's name."""
MAX_PROTOCOLS = 64
NAME_RULE = f"a name is 1 to {MAX_NAME} printable characters"


def is_name(text: Any) -> bool:
    """Whether `text` is a string that may be called a name: no control characters, no broken Unicode."""
    return isinstance(text, str) and 0 < len(text) <= MAX_NAME and text.isprintable()


def is_label(label: int, classes: int = 0) -> bool:
    """Whether `label` is -1 or a class, of `classes` named ones if there are any."""
    return -1 <= label <= MAX_LABEL and (classes == 0 or label < classes)


def twice(names: Iterable[str]) -> str | None:
    """The first name that comes a second time."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
