"""Checkpoints: one safetensors file with every tensor of a run, and its step, configuration and data in the
header.

Nothing in a checkpoint is executed when it is read. The file is written beside the old one and renamed over
it, so `checkpoint.safetensors` is always whole. Batch order and views are functions of (seed, step), so there
is no generator or loader state to keep.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from a2mc_fast.config import Config, from_dict, to_dict
from a2mc_fast.data.clips import Clips
from a2mc_fast.errors import InputError, require
from a2mc_fast.files import atomic_path
from a2mc_fast.model import A2MC
from a2mc_fast.skeleton import Skeleton

FORMAT = "a2mc-checkpoint/1"
FILE = "checkpoint.safetensors"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory, on the CPU."""

    path: Path
    step: int
    """Steps done."""
    config: Config
    skeleton: Skeleton
    persons: int
    classes: int
    data: dict[str, int]
    """Clips and frames of the set it was trained on."""
    progress: dict[str, float]
    """Numbers that the run carries along: seconds so far, the untrained encoder's accuracy."""
    scaler: dict[str, Any]
    """State of the fp16 loss scaler; empty in other precisions."""
    tensors: dict[str, Tensor]

    def build(self, device: torch.device | str = "cpu") -> A2MC:
        """The model with its trained tensors."""
        model = self.build_untrained(device)
        self.restore(model)
        return model

    def build_untrained(self, device: torch.device | str = "cpu") -> A2MC:
        """The model as it was before training."""
        return A2MC(self.config, self.skeleton, self.persons, self.classes).to(device)

    def restore(self, model: nn.Module) -> None:
        """Copy the model's tensors."""
        state = {n.removeprefix("model."): t for n, t in self.tensors.items() if n.startswith("model.")}
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise InputError(f"{self.path} does not hold this model: {reason}") from None

    def restore_optimizer(self, model: A2MC, optimizer: torch.optim.Optimizer) -> None:
        """Copy the optimizer's momentum."""
        for name, parameter in model.query.named_parameters():
            buffer = self.tensors.get(f"optimizer.{name}")
            if buffer is not None:
                optimizer.state[parameter]["momentum_buffer"] = buffer.to(parameter.device, copy=True)


def data_identity(clips: Clips) -> dict[str, int]:
    """What tells one data set from another at a glance."""
    return {"clips": len(clips), "frames": len(clips.frames)}


def save(
    path: Path,
    *,
    step: int,
    config: Config,
    model: A2MC,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    clips: Clips,
    classes: int,
    progress: dict[str, float],
) -> None:
    """Write a checkpoint, whole or not at all."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.query.named_parameters():
        buffer = optimizer.state[parameter].get("momentum_buffer")
        if buffer is not None:
            tensors[f"optimizer.{name}"] = buffer
    header = {
        "format": FORMAT,
        "step": step,
        "config": to_dict(config),
        "skeleton": dataclasses.asdict(clips.skeleton),
        "persons": clips.num_persons,
        "classes": classes,
        "data": data_identity(clips),
        "progress": progress,
        "scaler": scaler.state_dict(),
    }
    with atomic_path(path) as temporary:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary,
            metadata={name: json.dumps(value) for name, value in header.items()},
        )


def load(path: Path) -> Checkpoint:
    """Read a checkpoint file, or the one of a run folder. `InputError` says what is wrong with it."""
    path = Path(path)
    if path.is_dir():
        path = path / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: is this the folder of a run of a2mc_fast.train?")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header: dict[str, Any] = {k: _parse(v) for k, v in (file.metadata() or {}).items()}
            require(header.get("format") == FORMAT, f"{path} is not a checkpoint ({FORMAT})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        # JSON has lists where the skeleton has tuples
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in header["skeleton"].items()
        }
        return Checkpoint(
            path=path,
            step=int(header["step"]),
            config=from_dict(header["config"], where=f"{path}: config"),
            skeleton=Skeleton(**fields),
            persons=int(header["persons"]),
            classes=int(header["classes"]),
            data=dict(header["data"]),
            progress=dict(header["progress"]),
            scaler=dict(header["scaler"]),
            tensors=tensors,
        )
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or not a safetensors file ({error})") from None
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a complete checkpoint ({error!r})") from None


def _parse(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
