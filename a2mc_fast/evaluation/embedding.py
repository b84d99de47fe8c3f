"""Features of a data set in a file, and an encoder as a program: what `a2mc_fast.embed` does.

The file (format a2mc-features/1, safetensors) holds `features` [n, F] float32 of the centre crops, `labels`
[n] int64 (-1 where unknown) and, for each protocol, `split_NAME` [n] bool, true for its training clips. Its
header holds, as JSON, the clips' `names`, `class_names`, and `about`: run, data, stream, encoder, frames,
steps (0 for the untrained encoder) and checkpoint_sha256.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor

from a2mc_fast.data import Clips
from a2mc_fast.errors import tell
from a2mc_fast.evaluation.inference import ClipEncoder, embed_clips, export, load_encoder
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
    """Write features [n, F] of all clips in the format above, whole or not at all."""
    tensors = {"features": features, "labels": clips.labels}
    tensors |= {f"split_{name}": mask for name, mask in clips.splits.items()}
    header = {"names": clips.names, "class_names": clips.class_names, "about": about}
    metadata = {"format": FORMAT, **{name: json.dumps(value) for name, value in header.items()}}
    with atomic_path(path) as temporary:
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, temporary, metadata=metadata)


def export_encoder(source: Path, out: Path, *, untrained: bool) -> None:
    """Write a run's encoder as a program, and say what it takes and gives."""
    encoder = load_encoder(source, untrained=untrained)
    export(encoder, out)
    joints = encoder.skeleton.num_joints
    tell(
        f"wrote {out}: clips [N, 3, {encoder.frames}, {joints}, {encoder.persons}] -> "
        f"features [N, {encoder.feature_dim}]"
    )
