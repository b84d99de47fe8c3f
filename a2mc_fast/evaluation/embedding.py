"""Features of a data set in a file, and an encoder as a program: what `a2mc_fast.embed` does.

README.md says what the file holds; its suffix how.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from a2mc_fast.config.settings import Device
from a2mc_fast.data import Clips
from a2mc_fast.errors import require, tell
from a2mc_fast.evaluation.inference import ClipEncoder, embed_clips, load_encoder
from a2mc_fast.evaluation.program import export
from a2mc_fast.evaluation.protocols import classes_of
from a2mc_fast.evaluation.scores import write_tensors
from a2mc_fast.evaluation.tables import write_csv
from a2mc_fast.files import atomic_path, format_of, sha256
from a2mc_fast.run.opened import open_run

FORMAT = "a2mc-features/1"


def embed(source: Path, data: str, out: Path, *, untrained: bool, device: Device) -> None:
    """Write the features of a run's encoder, or of the untrained one, for packed clips, and say so."""
    there = format_of(out)
    require(
        there in ("", FORMAT),
        f"{out} holds {there}, not features, and is not written over: give RUN [DATA] OUT with another OUT",
    )
    run = open_run(source, data, device=device)
    encoder = ClipEncoder(run.untrained() if untrained else run.trained(), run.saved)
    features = embed_clips(encoder, run.clips)
    about = {
        "run": str(source),
        **{name: run.config.about[name] for name in ("data", "stream", "encoder")},
        "frames": run.config.views.frames,
        "steps": 0 if untrained else run.saved.step,
        "checkpoint_sha256": sha256(run.saved.path),
    }
    tensors = {"features": features, "labels": run.clips.labels}
    _write(
        out, tensors | {f"split_{name}": mask for name, mask in run.clips.splits.items()}, run.clips, about
    )
    tell(f"wrote {out}: {len(features)} clips, {features.shape[1]} features each")


def _write(path: Path, tensors: dict[str, Tensor], clips: Clips, about: dict[str, Any]) -> None:
    """What there is of all clips as the suffix says, whole or not at all."""
    arrays: dict[str, Any] = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        header = {"names": clips.names, "class_names": clips.class_names, "about": about}
        write_tensors(path, FORMAT, header, tensors)
    elif path.suffix == ".csv":
        write_csv(path, _lines(arrays, clips))
    else:
        # to an open file, as numpy would add its suffix to the temporary name
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            if path.suffix == ".npy":
                np.save(file, arrays["features"])
            else:
                arrays |= {"names": clips.names, "class_names": np.array(clips.class_names, "U")}
                np.savez(file, **arrays, about=json.dumps(about))


def _lines(arrays: dict[str, np.ndarray], clips: Clips) -> Iterator[Sequence[Any]]:
    """A head, then a row per clip, splits as 0 and 1, features with as many digits as give them back."""
    features, labels = arrays.pop("features"), arrays.pop("labels").tolist()
    yield ("name", "label", "class", *arrays, *(f"f{i}" for i in range(features.shape[1])))
    masks = [mask.astype(int).tolist() for mask in arrays.values()]
    for *told, row, mask in zip(clips.names, labels, classes_of(clips), features, zip(*masks)):
        yield (*told, *mask, *(f"{value:.9g}" for value in row))


def export_encoder(source: Path, out: Path, *, untrained: bool) -> None:
    """Write a run's encoder as a program, and say what it takes and gives."""
    encoder = load_encoder(source, untrained=untrained)
    export(encoder, out)
    joints = f"[T, {encoder.persons}, {encoder.skeleton.num_joints}, 3]"
    tell(f"wrote {out}: joints {joints} of a recording -> its feature [{encoder.feature_dim}]")
