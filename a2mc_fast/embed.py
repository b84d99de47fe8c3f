"""`python -m a2mc_fast.embed RUN [DATA] OUT`: the features of a data set, or the encoder as a program.

`evaluation.embedding` says what OUT holds. From Python, `evaluation.inference` does the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from a2mc_fast.config.settings import Device
from a2mc_fast.errors import exit_on_error, require

_FEATURES, _PROGRAMS = (".safetensors", ".npz", ".csv", ".npy"), (".pt2", ".onnx")


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Features of every clip of a data set by a trained encoder, or the encoder itself as a program."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Folder of the run, or a checkpoint."""
    files: Annotated[Positional[tuple[Path, ...]], arg(metavar="[DATA] OUT")] = ()
    """Packed clips, by default those of the run, and the file to write: .safetensors, .npz, .csv or .npy."""
    export: str = ""
    """Write the encoder instead, as a program of recordings [T, M, V, 3]: .pt2 (torch.export) or .onnx."""
    untrained: bool = False
    """The encoder as it was before training."""
    device: Device = "auto"
    """auto = the GPU if there is one."""

    def __post_init__(self) -> None:
        require(
            len(self.files) in (1, 2) if not self.export else not self.files,
            "give RUN [DATA] OUT.safetensors for features, or RUN --export OUT.pt2 for the encoder, "
            f"not {len(self.files)} files" + (" and --export" if self.export else ""),
        )
        out, known = (Path(self.export), _PROGRAMS) if self.export else (self.files[-1], _FEATURES)
        require(out.suffix in known, f"{out}: the suffix must be {', '.join(known)}")


def main(args: list[str] | None = None) -> None:
    """The command line: RUN [DATA] OUT, or RUN --export OUT."""
    with exit_on_error():
        asked = tyro.cli(Embed, args=args, prog="python -m a2mc_fast.embed")
        from a2mc_fast.evaluation.embedding import embed, export_encoder

        if asked.export:
            export_encoder(asked.run, Path(asked.export), untrained=asked.untrained)
            return
        data = str(asked.files[0]) if len(asked.files) == 2 else ""
        embed(asked.run, data, asked.files[-1], untrained=asked.untrained, device=asked.device)


if __name__ == "__main__":
    main()
