"""Features of a data set in a file, and an encoder as a program: what `a2mc_fast.embed` does.

The file holds `features` [n, F] float32 of the centre crops, `labels` [n] int64 (-1 where unknown) and, for
each protocol, `split_NAME` [n] bool, true for its training clips; the clips' `names`, `class_names`, and
`about`: run, data, stream, encoder, frames, steps (0 for the untrained encoder) and checkpoint_sha256. Its
suffix says how: .safetensors (format a2mc-features/1, the last three as JSON in the header), .npz (the same
as arrays, `about` as JSON), .csv (a row per clip: name, label, class, split_NAME, f0, f1, ...), or .npy (the
features alone).
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from a2mc_fast.data import Clips
from a2mc_fast.errors import tell
from a2mc_fast.evaluation.inference import ClipEncoder, embed_clips, load_encoder
from a2mc_fast.evaluation.program import export
from a2mc_fast.evaluation.protocols import class_names
from a2mc_fast.files import atomic_path, sha256
from a2mc_fast.run.opened import open_run

FORMAT = "a2mc-features/1"


def embed(
    source: Path, data: str, out: Path, *, untrained: bool, device: Literal["auto", "cpu", "cuda"]
) -> None:
    """Write the features of a run's encoder, or of the untrained one, for packed clips, and say so."""
    run = open_run(source, data, device=device)
    encoder = ClipEncoder(run.untrained() if untrained else run.trained(), run.saved)
    features = embed_clips(encoder, run.clips)
    about = {
        "run": str(source),
        "data": run.config.data or "synthetic",
        "stream": run.config.stream,
        "encoder": run.config.encoder.name,
        "frames": run.config.views.frames,
        "steps": 0 if untrained else run.saved.step,
        "checkpoint_sha256": sha256(run.saved.path),
    }
    save_features(out, features, run.clips, about)
    tell(f"wrote {out}: {len(features)} clips, {features.shape[1]} features each")


def save_features(path: Path, features: Tensor, clips: Clips, about: dict[str, Any]) -> None:
    """Write features [n, F] of all clips as the suffix says, whole or not at all."""
    tensors = {"features": features, "labels": clips.labels}
    tensors |= {f"split_{name}": mask for name, mask in clips.splits.items()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        if path.suffix == ".safetensors":
            header = {"names": clips.names, "class_names": clips.class_names, "about": about}
            metadata = {"format": FORMAT, **{name: json.dumps(value) for name, value in header.items()}}
            save_file(tensors, temporary, metadata=metadata)
        elif path.suffix == ".csv":
            _write_table(temporary, arrays, clips)
        else:  # to an open file, as numpy would add its suffix to the temporary name
            with temporary.open("wb") as file:
                if path.suffix == ".npy":
                    np.save(file, arrays["features"])
                else:
                    arrays |= {"names": clips.names, "class_names": np.array(clips.class_names, "U")}
                    np.savez(file, **arrays, about=json.dumps(about))


def _write_table(path: Path, arrays: dict[str, np.ndarray], clips: Clips) -> None:
    """A row per clip, splits as 0 and 1, features with as many digits as give them back."""
    classes = [*class_names(clips), ""]  # of label -1
    features, labels = arrays.pop("features"), arrays.pop("labels").tolist()
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("name", "label", "class", *arrays, *(f"f{i}" for i in range(features.shape[1]))))
        for number, (name, label, row) in enumerate(zip(clips.names, labels, features)):
            masks = [int(mask[number]) for mask in arrays.values()]
            table.writerow((name, label, classes[label], *masks, *(f"{value:.9g}" for value in row)))


def export_encoder(source: Path, out: Path, *, untrained: bool) -> None:
    """Write a run's encoder as a program, and say what it takes and gives."""
    encoder = load_encoder(source, untrained=untrained)
    export(encoder, out)
    joints = f"[T, {encoder.persons}, {encoder.skeleton.num_joints}, 3]"
    tell(f"wrote {out}: joints {joints} of a recording -> its feature [{encoder.feature_dim}]")
