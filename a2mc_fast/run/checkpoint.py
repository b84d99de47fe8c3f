"""Checkpoints: one safetensors file with every tensor of a run, and its step, configuration and data in the
header.

Nothing in a checkpoint is executed when it is read, and a checksum of all its content tells a damaged one.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from a2mc_fast.config import Config
from a2mc_fast.encoders.branch import Branch, Recurrence
from a2mc_fast.encoders.build import build_branch
from a2mc_fast.errors import Count, InputError, Range, os_reason, require
from a2mc_fast.files import atomic_path, parse_json, read_tensors, typed
from a2mc_fast.skeleton import Skeleton

if TYPE_CHECKING:
    from a2mc_fast.model import A2MC

FORMAT = "a2mc-checkpoint/5"
FILE = "checkpoint.safetensors"
# a model may need this many elements beside those in its checkpoint: small tables that it makes anew
_SPARE_ELEMENTS = 1 << 18
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory. One that was read is on the CPU."""

    path: Path = Path()
    """Where it was read."""
    step: Annotated[int, Range("[0, 1e12]")]
    """Steps done."""
    config: Config
    skeleton: Skeleton
    persons: Count
    classes: Count
    data: str
    """Which set it was trained on, as `Clips.identity` tells."""
    progress: dict[str, Annotated[float, Range("[-1e12, 1e12]")]]
    """Numbers that the run carries along: seconds so far, the latest loss and accuracies."""
    scaler: dict[str, int | float]
    """State of the fp16 loss scaler; empty in other precisions."""
    class_names: tuple[str, ...] = ()
    """The classes of the classifier behind the encoder, where there is one."""
    recurrence: Recurrence | None = None
    """What computed the recurrent layers, where there are any."""
    tensors: dict[str, Tensor]

    def branch(self, device: torch.device | str = "cpu", *, untrained: bool = False) -> Branch:
        """The query encoder and its heads, as trained or as before; heads that are not in the file are new.

        `InputError` if they would not fit the tensors of the file.
        """

        def new() -> Branch:
            torch.manual_seed(self.config.seed)  # as A2MC does before it makes them
            return build_branch(self.config, self.skeleton, self.persons)

        branch = self.fitting(new)
        if not untrained:
            heads = {n: t for n, t in branch.state_dict().items() if n.startswith("heads.")}
            self._copy(branch, "model.query.", heads)
        return branch.to(device)

    def fitting(self, build: Callable[[], Model], *sizes: int) -> Model:
        """What `build` makes of the header, which may claim any size, among them `sizes`.

        `InputError` if it would not fit the tensors of the file.
        """
        held = sum(tensor.numel() for tensor in self.tensors.values())
        options = [n for n in self.config.encoder.options.values() if type(n) is int]
        largest = max(*options, *sizes, self.config.encoder.projection, self.persons)
        try:
            # a layer, a row or a class has at least one element
            if largest > held:
                raise MemoryError(f"it asks for {largest} of something and holds {held} numbers in all")
            with _Allowance(2 * held + _SPARE_ELEMENTS):
                return build()
        except (RuntimeError, MemoryError, OverflowError) as error:
            raise InputError(f"{self.path} does not hold the model that it describes: {error}") from None

    def with_classifier(
        self, encoder: nn.Module, weight: Tensor, bias: Tensor, names: list[str]
    ) -> Checkpoint:
        """An encoder and the classifier behind it, trained after this. weight [classes, feature_dim]"""
        tensors = {f"model.query.encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
        tensors |= {"downstream.weight": weight, "downstream.bias": bias}
        plain = replace(self, progress={}, scaler={}, recurrence=None)
        return replace(plain, classes=len(names), class_names=tuple(names), tensors=tensors)

    def restore(self, model: nn.Module) -> None:
        """Copy the model's tensors."""
        self._copy(model, "model.", {})

    def _copy(self, module: nn.Module, prefix: str, others: Mapping[str, Tensor]) -> None:
        """Copy the tensors of this prefix into `module`; those that the file lacks may be among `others`."""
        held = {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}
        try:
            module.load_state_dict({**others, **held})
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise InputError(f"{self.path} does not hold this model: {reason}") from None

    def restore_optimizer(self, model: A2MC, optimizer: torch.optim.Optimizer) -> None:
        """Copy the optimizer's momentum."""
        for name, parameter in model.query.named_parameters():
            buffer = self.tensors.get(f"optimizer.{name}")
            if buffer is not None:
                require(
                    (buffer.shape, buffer.dtype) == (parameter.shape, parameter.dtype),
                    f"{self.path}: the momentum of {name} is {buffer.dtype} {list(buffer.shape)}, "
                    f"its parameter {parameter.dtype} {list(parameter.shape)}",
                )
                optimizer.state[parameter]["momentum_buffer"] = buffer.to(parameter.device, copy=True)


@functools.cache
def _header() -> dict[str, Any]:
    """Type of all that the header says beside format and checksum, by its name."""
    hints = typing.get_type_hints(Checkpoint, include_extras=True)
    return {name: hint for name, hint in hints.items() if name not in ("path", "tensors")}


class _Allowance(TorchFunctionMode):
    """Refuses new tensors once they are larger than `elements` in all: a header may claim any size."""

    _NEW = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.left = elements

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._NEW and args:
            sizes = args[0] if isinstance(args[0], tuple | list) else [a for a in args if isinstance(a, int)]
            self.left -= math.prod(sizes)
            if self.left < 0:
                raise MemoryError("it asks for more numbers than it holds")
        return func(*args, **(kwargs or {}))


def tensors_of(model: A2MC, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a run's checkpoint holds: the live tensors, not copies."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.query.named_parameters():
        buffer = optimizer.state[parameter].get("momentum_buffer")
        if buffer is not None:
            tensors[f"optimizer.{name}"] = buffer
    return tensors


def numbered(folder: Path, step: int) -> Path:
    """Name of an older checkpoint."""
    return folder / f"checkpoint-{step:09d}.safetensors"


def numbered_steps(folder: Path) -> list[int]:
    """Steps of the older checkpoints in a folder."""
    names = (path.stem.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*.safetensors"))
    return [int(name) for name in names if name.isdecimal() and len(name) >= 9]


# writing


def write(path: Path, saved: Checkpoint) -> None:
    """Write a checkpoint, whole or not at all. `InputError` if a weight is not finite."""
    with atomic_path(path) as temporary:
        write_content(temporary, saved)


def write_content(path: Path, saved: Checkpoint) -> None:
    """`write`, in place and with no promise about what an error leaves."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in saved.tensors.items()}
    wrong = _not_finite(tensors)
    require(not wrong, f"{wrong} is not finite after step {saved.step}: the state is not saved")
    held = {name: getattr(saved, name) for name in _header()}
    header = {"format": FORMAT, **{name: value for name, value in held.items() if value not in (None, ())}}
    text = {n: json.dumps(v, default=dataclasses.asdict, allow_nan=False) for n, v in header.items()}
    text["checksum"] = _checksum(text, tensors)
    save_file(tensors, path, metadata=text)


def _checksum(text: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """BLAKE2b of the header's values and of every tensor's name, type, shape and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps({k: v for k, v in text.items() if k != "checksum"}, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _not_finite(tensors: dict[str, Tensor]) -> str:
    """Name of the first tensor with a NaN or an infinity; empty if there is none."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            # in numpy, which stays in this thread and leaves torch's to the training; a NaN spreads to both
            values = (tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()).numpy()
            if not math.isfinite(values.min()) or not math.isfinite(values.max()):
                return name
    return ""


# reading


def load(path: Path) -> Checkpoint:
    """Read a checkpoint file, or the newest of a run folder. `InputError` says what is wrong with it."""
    path = Path(path)
    if path.is_dir():
        path = path / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: is this the folder of a run of a2mc_fast.train?")
    text, tensors = read_tensors(path, FORMAT, "a checkpoint")
    require(
        text.get("checksum") == _checksum(text, tensors),
        f"{path} is damaged: its checksum is wrong; use an older one beside it, if there is one",
    )
    wrong = _not_finite(tensors)
    require(not wrong, f"{path}: {wrong} is not finite")
    hints = _header()
    missing = [name for name in hints if name not in text and not hasattr(Checkpoint, name)]
    require(not missing, f"{path}: header has no {', '.join(missing)}")
    told = {name: parse_json(text[name], f"{path}: {name}") for name in hints if name in text}
    header = {name: typed(value, hints[name], f"{path}: header.{name}") for name, value in told.items()}
    return Checkpoint(path=path, tensors=tensors, **header)


def load_last_good(folder: Path) -> tuple[Checkpoint | None, str]:
    """The newest checkpoint of a run folder that is whole, and what to say of newer ones that are not.

    None if there is no checkpoint at all; `InputError` if there are some and none is whole.
    """
    older = [numbered(folder, step) for step in sorted(numbered_steps(folder), reverse=True)]
    damaged = ""
    for path in (folder / FILE, *older):
        if path.exists():
            try:
                require(path.is_file(), f"{path} is no file")
                found = load(path)
            except (InputError, OSError) as error:
                damaged = damaged or (os_reason(error) if isinstance(error, OSError) else str(error))
                continue
            return found, f"{damaged}: using {path.name}, of step {found.step}" if damaged else ""
    require(not damaged, f"{damaged}, and {folder} holds no older one that is whole: start another run")
    return None, ""
