"""`python -m a2mc_fast.predict RUN DATA OUT.csv`: the classes of clips or recordings.

`evaluation.prediction` says what OUT holds. From Python, `evaluation.inference` does the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from a2mc_fast.config.settings import Device
from a2mc_fast.errors import Count, CountOrNone, check_ranges, exit_on_error, require
from a2mc_fast.evaluation.settings import Classifying


@dataclass(frozen=True, kw_only=True)
class Predict:
    """The most probable classes of every clip, by the classifier that a protocol trained."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Folder of the run, or a classifier's file (RUN/linear.classifier.safetensors)."""
    data: Annotated[Positional[Path], arg(metavar="DATA")]
    """Packed clips, with labels or without; a recording (.npz or .npy, joints [T, M, V, 3] in metres); a clip
    archive; or a folder of recordings."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """The .csv or .json file to write."""
    protocol: Classifying = "linear"
    """Whose classifier to take from the folder of the run."""
    window: CountOrNone = 0
    """Frames of a window that slides over each recording; 0 = each as one clip."""
    stride: CountOrNone = 0
    """Frames from one window to the next; 0 = half a window."""
    top: Count = 5
    """How many classes to list."""
    device: Device = "auto"
    """auto = the GPU if there is one."""

    def __post_init__(self) -> None:
        require(self.out.suffix in (".csv", ".json"), f"OUT must be a .csv or .json file, got {self.out}")
        check_ranges(self)
        require(self.window > 0 or self.stride == 0, "stride needs window")


def main(args: list[str] | None = None) -> None:
    """The command line: RUN DATA OUT [--FLAG VALUE ...]."""
    with exit_on_error():
        asked = tyro.cli(Predict, args=args, prog="python -m a2mc_fast.predict")
        from a2mc_fast.evaluation.prediction import predict

        predict(**vars(asked))


if __name__ == "__main__":
    main()
