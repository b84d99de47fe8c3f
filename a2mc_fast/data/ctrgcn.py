"""CTR-GCN's archives, such as NTU60_CS.npz: both sets of one protocol in one `.npz` file.

It holds x_train, x_test [N, T, 150] (per frame 2 persons x 25 joints x (x, y, z), metres, zeros after the
clip) and one-hot y_train, y_test. CTR-GCN only subtracted a constant, so the clips go through the
pre-normalisation; it has ordered the bodies already.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from a2mc_fast.data.npy import Archive
from a2mc_fast.data.source import Recording, Source, until_null
from a2mc_fast.errors import require

_NUMBERS = 2 * 25 * 3  # per frame
_PROTOCOLS = {"CS": "xsub", "CV": "xview", "CSub": "xsub", "CSet": "xset"}


def open_ctrgcn(file: str | Path, protocol: str = "") -> Source:
    """The clips of an archive, the training set first, called after their set and place.

    The protocol is told by the ending of the file's name (CS, CV, CSub, CSet) or by `protocol`.
    """
    path = Path(file)
    archive = Archive(path)
    archive.need("x_train", "y_train", "x_test", "y_test")
    protocol = protocol or _PROTOCOLS.get(path.stem.rpartition("_")[2], "")
    require(bool(protocol), f"the name of {path} does not tell the protocol; give it with --protocol xsub")
    labels = {part: _one_hot(archive, f"y_{part}") for part in ("train", "test")}
    for part, classes in labels.items():
        with archive.rows(f"x_{part}") as rows:
            shape, dtype = rows.shape, rows.dtype
        require(
            dtype.kind == "f" and len(shape) == 3 and shape[1] > 0 and shape[2] == _NUMBERS,
            f"{path}: x_{part} is {dtype} {list(shape)}, expected floats [N, T, {_NUMBERS}]",
        )
        require(
            shape[0] == len(classes), f"{path}: x_{part} holds {shape[0]:,} clips, y_{part} {len(classes):,}"
        )
    return Source(
        name="ctrgcn",
        jobs=_clips(archive, labels, protocol),
        total=sum(map(len, labels.values())),
        protocols=(protocol,),
    )


def _clips(archive: Archive, labels: Mapping[str, np.ndarray], protocol: str) -> Iterator[Recording]:
    for part, classes in labels.items():
        with archive.rows(f"x_{part}") as rows:
            for row, label in enumerate(classes.tolist()):
                joints = until_null(rows.take(1).reshape(-1, 2, 25, 3))
                train_in = (protocol,) if part == "train" else ()
                yield Recording(name=f"{part}_{row:05d}", label=label, joints=joints, train_in=train_in)


def _one_hot(archive: Archive, name: str) -> np.ndarray:
    """Classes [N] from one-hot rows [N, classes]."""
    rows = archive.array(name, "fiub", ndim=2)
    require(
        rows.shape[1] > 0 and bool(((rows == 0) | (rows == 1)).all() and (rows.sum(1) == 1).all()),
        f"{archive.path}: the rows of {name} are not one-hot",
    )
    return rows.argmax(1)
