"""Recordings in folders, INPUT[/train|val|test][/CLASS]/RECORDING: what the folders tell of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from a2mc_fast.data.source import Recording, Skip, Source
from a2mc_fast.skeleton import Skeleton

_PARTS = ("train", "val", "test")
_SPLIT = "split"  # what their protocol is called


Read = Callable[..., Iterable[Recording]]
"""Takes a job, of which the joints are the recording's path, and `skeleton`."""


def open_recordings(
    name: str, folder: Path, paths: Sequence[Path], skeleton: Skeleton, read: Read, *, ranked: bool = False
) -> Source:
    """The recordings at `paths` below `folder` (or `folder` itself), in the order of their names.

    They are called after their path. A class is called after its folder; without one it is unknown. If there
    is a folder called train, those in it are the training clips.
    """
    known: dict[Path, tuple[str, str]] = {}  # (train, val or test; class), both "" where not told
    skipped: list[Skip] = []
    for path in paths:
        *above, _ = path.relative_to(folder).parts or ("",)
        part = above.pop(0) if above and above[0] in _PARTS else ""
        if len(above) > 1:
            detail = "expected INPUT[/train|val|test][/CLASS]/RECORDING"
            skipped.append(Skip(str(path.relative_to(folder)), "name not understood", detail))
        else:
            known[path] = part, "".join(above)
    classes = sorted({label for _, label in known.values() if label})
    number = {label: place for place, label in enumerate(classes)} | {"": -1}
    jobs = [
        Recording(
            joints=path,
            # a recording that lies alone is called after itself
            name=path.stem if path == folder else path.relative_to(folder).with_suffix("").as_posix(),
            label=number[label],
            train_in=(_SPLIT,) if part == "train" else (),
        )
        for path, (part, label) in known.items()
    ]
    return Source(
        name=name,
        jobs=jobs,
        total=len(jobs),
        read=partial(read, skeleton=skeleton),
        protocols=(_SPLIT,) if any(part == "train" for part, _ in known.values()) else (),
        ranked=ranked,
        skeleton=skeleton,
        class_names=tuple(classes),
        skipped=tuple(skipped),
    )
