"""`Clips`: every frame of a data set on the training device, and the packed file it comes from.

Clips of different length lie one after another, so nothing is padded. A frame is [V, C] per person in files
and [C, V, M] in memory, so that spatial operations run over contiguous planes.

Legend: N clips · F frames of the whole set · C coordinates (3) · T frames read · V joints · M persons.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from a2mc_fast.data import memory, rules
from a2mc_fast.data.identity import differing, identity
from a2mc_fast.errors import InputError, require
from a2mc_fast.files import atomic_path, parse_json, read_tensors, typed
from a2mc_fast.skeleton import MAX_FRAMES, TREE, Rotation, Skeleton

FORMAT = "a2mc-clips/1"
_OPTIONAL = ("subjects", "cameras", "setups")  # one int64 per clip


@dataclass(kw_only=True)
class Clips:
    """A whole data set of skeleton clips, resident on one device. Made by `pack` or `load`."""

    frames: Tensor
    """[F, C, V, M] float32, metres; an absent person is all zeros."""
    lengths: Tensor
    """[N] int64, frames per clip."""
    labels: Tensor
    """[N] int64, class from 0, or -1 where unknown."""
    skeleton: Skeleton
    splits: Mapping[str, Tensor]
    """Protocol name -> [N] bool, True for training clips."""
    names: tuple[str, ...]
    class_names: tuple[str, ...] = ()
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Any of subjects, cameras, setups: [N] int64."""
    source: str = ""
    """Where the recordings came from."""
    command: str = ""
    """The command that made the file."""

    def __post_init__(self) -> None:
        self.offsets = torch.cumsum(self.lengths, 0) - self.lengths  # [N] first frame of each clip
        self._rows = self.frames.flatten(1)  # [F, C*V*M] view for gathers

    @classmethod
    def pack(
        cls,
        joints: np.ndarray | Tensor,
        lengths: Sequence[int] | np.ndarray,
        labels: Sequence[int] | np.ndarray,
        skeleton: Skeleton,
        *,
        splits: Mapping[str, np.ndarray] | None = None,
        names: Sequence[str] = (),
        class_names: Sequence[str] = (),
        extra: Mapping[str, np.ndarray] | None = None,
        source: str = "",
        command: str = "",
        device: torch.device | str = "cpu",
        where: str = "clips",
    ) -> Clips:
        """Check arrays in the archive's layout, joints [F, M, V, 3], and place them on `device`.

        `InputError`, beginning with `where`, for shapes that disagree and clips that break the rule.
        """
        frames = torch.as_tensor(joints)
        length, label = _integers(lengths, f"{where}: lengths"), _integers(labels, f"{where}: labels")
        count = len(length)
        require(count > 0, f"{where}: holds no clips")
        masks = {name: torch.as_tensor(mask) for name, mask in (splits or {}).items()}
        others = {n: _integers(values, f"{where}: {n}") for n, values in (extra or {}).items()}
        require(label.shape == length.shape, f"{where}: {len(label)} labels for {count} clips")
        require(len(names) in (0, count), f"{where}: {len(names)} names for {count} clips")
        for name, values in (*masks.items(), *others.items()):
            shape = list(values.shape)
            require(shape == [count], f"{where}: {name} has shape {shape} for {count} clips")
        masked = all(mask.dtype == torch.bool for mask in masks.values())
        require(masked, f"{where}: split masks must be boolean")
        names = tuple(names) or tuple(f"clip {i}" for i in range(count))
        rules.check_set(where, length.tolist(), label.tolist(), names, class_names, masks)
        _check_frames(where, frames, length, skeleton)
        clips = cls(
            frames=memory.placed(frames, torch.device(device), where),
            lengths=length.to(device),
            labels=label.to(device),
            skeleton=skeleton,
            splits={name: mask.to(device) for name, mask in masks.items()},
            names=names,
            class_names=tuple(class_names),
            extra=others,
            source=source,
            command=command,
        )
        clips._check_poses(where)
        return clips

    def _check_poses(self, where: str) -> None:
        """Refuse clips that are not poses."""

        def counted(mask: Tensor) -> list[int]:  # frames of each clip
            total = F.pad(mask.long().cumsum(0), (1, 0))
            return (total[self.offsets + self.lengths] - total[self.offsets]).tolist()

        lowest, highest = self._rows.aminmax(dim=1)
        outside = counted(~rules.within_bounds(lowest, highest))
        there = counted(rules.somebody(lowest, highest))
        rules.check_ranges(where, self.names, outside, there)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Clips:
        """Read a packed file and place every frame on `device`.

        Raises `FileNotFoundError` with the command that makes the file, `InputError` if it is damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} not found; name another with --data, or make it with: python -m a2mc_fast.prepare "
                f"SOURCE INPUT {path} (SOURCE is ntu60, ntu120, pku1, pku2, agcn, ctrgcn, pyskl, npz, "
                "openpose or csv)"
            )
        try:
            header, tensors = read_tensors(path, FORMAT, "a packed clips file")
            # any byte may be there, and torch counts on 0 and 1
            tensors = {
                n: t.view(torch.uint8) != 0 if t.dtype == torch.bool else t for n, t in tensors.items()
            }
            clips = cls.pack(
                tensors["joints"],
                tensors["lengths"],
                tensors["labels"],
                _skeleton(path, tensors, header),
                splits={n.removeprefix("split_"): t for n, t in tensors.items() if n.startswith("split_")},
                names=_texts(header, "names", path),
                class_names=_texts(header, "class_names", path),
                extra={n: tensors[n] for n in _OPTIONAL if n in tensors},
                source=header.get("source", ""),
                command=header.get("command", ""),
                device=device,
                where=str(path),
            )
        except KeyError as error:
            raise InputError(f"{path} holds no {error}; it is not a complete packed clips file") from None
        # while the frames are on the host
        clips.identity = identity(
            tensors["joints"], clips.lengths, clips.labels, clips.splits, clips.skeleton
        )
        changed = " and ".join(differing(clips.identity, header.get("identity", clips.identity)))
        require(
            not changed, f"{path} is damaged: its {changed} are not those that were packed; prepare it again"
        )
        return clips

    def save(self, path: str | Path) -> None:
        """Write the packed file, whole or not at all."""
        vars(self).pop("identity", None)  # what is written is what counts
        tensors = {
            "lengths": self.lengths.cpu().numpy(),
            "labels": self.labels.cpu().numpy(),
            **{name: np.asarray(getattr(self.skeleton, name), np.int64) for name in TREE},
            **{f"split_{name}": mask.cpu().numpy() for name, mask in self.splits.items()},
            **{name: values.cpu().numpy() for name, values in self.extra.items()},
        }
        header = {
            "format": FORMAT,
            "names": json.dumps(self.names),
            "class_names": json.dumps(self.class_names),
            "joint_names": json.dumps(self.skeleton.joint_names),
            "rotation": self.skeleton.rotation,
            "max_frames": str(self.skeleton.max_frames),
            "source": self.source,
            "command": self.command,
            "identity": self.identity,
        }
        with atomic_path(Path(path)) as temporary:
            memory.write(temporary, self.frames.permute(0, 3, 2, 1), tensors, header)

    def to(self, device: torch.device | str) -> Clips:
        """The same clips on another device; on this one, themselves."""
        if torch.device(device) == self.device:
            return self
        splits = {name: mask.to(device) for name, mask in self.splits.items()}
        moved = {name: getattr(self, name).to(device) for name in ("frames", "lengths", "labels")}
        clips = replace(self, splits=splits, **moved)
        clips.identity = self.identity
        return clips

    @cached_property
    def identity(self) -> str:
        """Which set this is, as `data.identity` tells it."""
        joints = self.frames.permute(0, 3, 2, 1)
        return identity(joints, self.lengths, self.labels, self.splits, self.skeleton)

    @cached_property
    def has_depth(self) -> Tensor:
        """Whether any z is not zero, bool [] on the device, which is not waited for. Flat clips have none."""
        return self.frames[:, 2].any()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        return self.frames.device

    @property
    def num_persons(self) -> int:
        """M."""
        return self.frames.shape[3]

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 when no clip is labelled."""
        return len(self.class_names) or int(self.labels.max()) + 1

    def split(self, name: str) -> tuple[Tensor, Tensor]:
        """Clip numbers of a protocol: (train_index, test_index), int64 on the clips' device."""
        if name not in self.splits:
            have = ", ".join(sorted(self.splits))
            known = f" (it has: {have}); choose one with --split"
            none = ", nor any other: add split_NAME to what was prepared (true for training clips)"
            wrong = known if have else f"{none}, and prepare it again"
            raise InputError(f"the data has no protocol {name!r}{wrong}")
        mask = self.splits[name]
        return mask.nonzero().flatten(), (~mask).nonzero().flatten()

    def labelled(self, name: str, side: Literal["training", "test"]) -> Tensor:
        """Clip numbers of one side of a protocol, labelled clips only. `InputError` if there are none."""
        index = self.split(name)[side == "test"]
        index = index[self.labels[index] >= 0]
        require(len(index) > 0, f"protocol {name!r} has no labelled {side} clips")
        return index

    def read(self, index: Tensor, position: Tensor) -> Tensor:
        """Frames at fractional times, interpolated linearly, as one gather.

        index [N] clip numbers, position [N, T] in frames within 0 .. length - 1 -> [N, T, C, V, M]
        """
        first = self.offsets[index]
        values = interpolate(self._rows, first, first + self.lengths[index] - 1, position)
        return values.unflatten(2, self.frames.shape[1:])


def _check_frames(where: str, frames: Tensor, lengths: Tensor, skeleton: Skeleton) -> None:
    """Refuse what is no array of this skeleton's joints, or of more or fewer frames."""
    require(
        frames.ndim == 4 and frames.shape[3] == 3 and frames.dtype == torch.float32,
        f"{where}: joints must be float32 [F, M, V, 3], got {frames.dtype} {list(frames.shape)}",
    )
    require(frames.shape[1] >= 1, f"{where}: joints hold no person (M = 0)")
    require(
        frames.shape[2] == skeleton.num_joints,
        f"{where}: joints have {frames.shape[2]} joints, the skeleton {skeleton.num_joints}",
    )
    require(
        int(lengths.max()) <= len(frames) and int(lengths.sum()) == len(frames),  # the sum alone may overflow
        f"{where}: lengths sum to {int(lengths.sum())}, joints hold {len(frames)} frames",
    )


def _integers(values: Any, where: str) -> Tensor:
    """`values` as int64 [N]; `InputError` for other types, other shapes, and what does not fit."""
    array = torch.as_tensor(values) if isinstance(values, Tensor) else np.asarray(values)
    kind = str(array.dtype).removeprefix("torch.")
    require(
        array.ndim == 1 and (len(array) == 0 or kind.startswith(("int", "uint"))),
        f"{where} must be integers [N], got {kind} {list(array.shape)}",
    )
    if kind == "uint64":  # beyond int64 it would become negative
        require(all(v < 1 << 63 for v in array.tolist()), f"{where} holds a number of 64 bits")
    return torch.as_tensor(array).long()


def _skeleton(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Skeleton:
    """The skeleton of a packed file; those written before it said how clips are normalised have the usual."""
    tree: dict[str, Any] = {
        name: tuple(_integers(torch.atleast_1d(tensors[name]), f"{path}: {name}").tolist()) for name in TREE
    }
    single = len(tree["center"]) == 1
    require(single, f"{path}: axis_z and axis_x must be two joints each, center one")
    return Skeleton(
        **tree | {"center": tree["center"][0]},
        joint_names=_texts(header, "joint_names", path),
        rotation=cast(Rotation, header.get("rotation", "first frame")),  # Skeleton checks it
        max_frames=parse_json(header.get("max_frames", str(MAX_FRAMES)), f"{path}: max_frames"),
    )


def _texts(header: Mapping[str, str], name: str, path: Path) -> tuple[str, ...]:
    """A list of strings that the header holds as JSON."""
    where = f"{path}: {name}"
    found: tuple[str, ...] = typed(parse_json(header.get(name, "[]"), where), tuple[str, ...], where)
    return found


def interpolate(rows: Tensor, first: Tensor, last: Tensor, position: Tensor) -> Tensor:
    """Linear interpolation between rows, as one weighted gather.

    rows [R, W]; item n owns the rows first[n] .. last[n] (int64 [N]), and position [N, T] counts from its
    first row, within 0 .. last - first -> [N, T, W].
    """
    before = position.floor()
    weight = position - before
    row = before.long() + first.unsqueeze(1)
    pair = torch.stack((row, torch.minimum(row + 1, last.unsqueeze(1))), 2).view(-1, 2)
    weights = torch.stack((1 - weight, weight), 2).view(-1, 2)
    return F.embedding_bag(pair, rows, per_sample_weights=weights, mode="sum").view(*position.shape, -1)
