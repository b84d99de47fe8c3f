"""`python -m a2mc_fast.embed RUN [DATA] OUT.safetensors`: the features of a data set.

OUT (format a2mc-features/1, safetensors) holds `features` [n, F] float32 of the centre crops, `labels` [n]
int64 (-1 where unknown) and, for each protocol, `split_NAME` [n] bool, true for its training clips. Its
header holds, as JSON, the clips' `names`, `class_names`, and `about`: run, data, stream, encoder, frames,
steps (0 for the untrained encoder) and checkpoint_sha256. From Python, `inference` does the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from a2mc_fast.errors import exit_on_error, require
from a2mc_fast.evaluate import check_skeleton, sha256
from a2mc_fast.files import atomic_path

if TYPE_CHECKING:  # --help does not wait for torch
    from torch import Tensor

    from a2mc_fast.data import Clips

FORMAT = "a2mc-features/1"


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Features of every clip of a data set by a trained encoder, or the encoder itself as a program."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Folder of the run, or a checkpoint."""
    files: Annotated[Positional[tuple[Path, ...]], arg(metavar="[DATA] OUT")] = ()
    """Packed clips, by default those of the run, and the .safetensors file to write."""
    export: str = ""
    """Write the encoder as a torch.export program (.pt2), for any number of clips, instead."""
    untrained: bool = False
    """The encoder as it was before training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = the GPU if there is one."""

    def __post_init__(self) -> None:
        require(
            len(self.files) in (1, 2) if not self.export else not self.files,
            "give RUN [DATA] OUT.safetensors for features, or RUN --export OUT.pt2 for the encoder, "
            f"not {len(self.files)} files" + (" and --export" if self.export else ""),
        )


def embed(options: Embed) -> None:
    """Write the features, or the program, and say so."""
    from a2mc_fast.evaluation import inference
    from a2mc_fast.run import checkpoint
    from a2mc_fast.run.machine import pick_device
    from a2mc_fast.run.opened import load_clips

    if options.export:
        encoder = inference.load_encoder(options.run, untrained=options.untrained)
        inference.export(encoder, Path(options.export))
        joints = encoder.skeleton.num_joints
        print(
            f"wrote {options.export}: clips [N, 3, {encoder.frames}, {joints}, {encoder.persons}] -> "
            f"features [N, {encoder.feature_dim}]"
        )
        return
    loaded = checkpoint.load(options.run)
    data = str(options.files[0]) if len(options.files) == 2 else loaded.config.data
    run = replace(loaded.config.run, device=options.device)
    config = replace(loaded.config, data=data, run=run)
    device = pick_device(config)
    clips = load_clips(config, device)
    check_skeleton(loaded, clips, data or "the built-in set")
    encoder = inference.load_encoder(options.run, untrained=options.untrained, device=device)
    features = inference.embed_clips(encoder, clips)
    about = {
        "run": str(options.run),
        "data": data or "synthetic",
        "stream": config.stream,
        "encoder": config.encoder.name,
        "frames": config.views.frames,
        "steps": 0 if options.untrained else loaded.step,
        "checkpoint_sha256": sha256(loaded.path),
    }
    save_features(options.files[-1], features, clips, about)
    print(f"wrote {options.files[-1]}: {len(features)} clips, {features.shape[1]} features each")


def save_features(path: Path, features: Tensor, clips: Clips, about: dict[str, Any]) -> None:
    """Write features [n, F] of all clips in the format above, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {"features": features, "labels": clips.labels}
    tensors |= {f"split_{name}": mask for name, mask in clips.splits.items()}
    header = {"names": clips.names, "class_names": clips.class_names, "about": about}
    metadata = {"format": FORMAT, **{name: json.dumps(value) for name, value in header.items()}}
    with atomic_path(path) as temporary:
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, temporary, metadata=metadata)


def main(args: list[str] | None = None) -> None:
    """The command line: RUN [DATA] OUT.safetensors, or RUN --export OUT.pt2."""
    with exit_on_error():
        embed(tyro.cli(Embed, args=args, prog="python -m a2mc_fast.embed"))


if __name__ == "__main__":
    main()
