"""What text files of recordings say, read line by line: slow, and apart from the readers of the package.

An exception of any kind where a file does not say it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np

PLACES = 4  # bodies of a frame that are read


def skeleton(text: bytes) -> np.ndarray:
    """The bodies of a `.skeleton` file at their places: [T, PLACES, 25, 3], zeros where nobody is."""
    lines = iter(text.decode("latin1").split("\n"))
    frames = [[_body(lines) for _ in range(int(next(lines)))] for _ in range(int(next(lines)))]
    assert not any(line.strip() for line in lines), "lines beyond the last frame"
    known = all(len({name for name, _ in bodies}) == len(bodies) for bodies in frames)
    out = np.zeros((len(frames), PLACES, 25, 3))
    holders: dict[int, str | None] = dict.fromkeys(range(PLACES))
    for frame, bodies in enumerate(frames):
        here = [name for name, _ in bodies]
        for position, (name, joints) in enumerate(bodies):
            its = [place for place in holders if holders[place] == name]
            free = [place for place in holders if holders[place] not in here]
            for place in (its + free)[:1] if known else [position]:
                if place < PLACES:
                    holders[place], out[frame, place] = name, joints
    return out


def _body(lines: Iterator[str]) -> tuple[str, list[list[float]]]:
    """The id of the next body, and its joints [25][3]."""
    name = "".join(next(lines).split()[:1])
    assert int(next(lines)) == 25, "not 25 joints"
    joints = [next(lines).split() for _ in range(25)]
    assert {len(values) for values in joints} == {12}, "a joint is not 12 values"
    return name, [[float(value) for value in values[:3]] for values in joints]


def actions(video: bytes, labels: bytes) -> dict[int, tuple[int, np.ndarray, int]]:
    """By label line of a video of PKU-MMD: class from 0, frames [T, 2, 25, 3], how many more were named."""
    rows = [[float(value) for value in line.split()] for line in video.decode("latin1").rstrip().split("\n")]
    frames = np.array(rows, np.float32).reshape(len(rows), 2, 25, 3)
    found = {}
    for number, line in enumerate(labels.decode("latin1").split("\n")):
        values = line.split(",") if "," in line else line.split()
        if len(values) in (3, 4):
            with contextlib.suppress(ValueError, OverflowError):
                action, start, end = (int(float(value)) for value in values[:3])
                inside = [row for row in range(len(rows)) if start <= row < end]
                found[number] = (action - 1, frames[inside], max(0, end - len(rows)))
    return found
