"""The skeleton: its joints and bones, left and right, and what normalises its clips.

A `Skeleton` travels inside the data file, so every room works for any set of joints. `NTU25` (Kinect v2) is
built in. Joint numbers are 0-based. Legend: N clips · C coordinates (3) · T frames · V joints · M persons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from a2mc_fast.errors import require

if TYPE_CHECKING:
    from torch import Tensor

MAX_JOINTS = 1000
"""Joints V of any skeleton; the checks below take V^2 steps."""
MAX_FRAMES = 300
"""Frames kept of a clip unless told otherwise: the length of the arrays that the public conversion writes."""
Rotation = Literal["first frame", "none"]
TREE = ("parents", "mirror", "center", "axis_z", "axis_x")
"""The fields that archives and packed files hold as arrays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """A tree of V joints with its mirror image, and how its clips are normalised."""

    parents: tuple[int, ...]
    """The joint each bone leads to, towards the root; the root is its own parent."""
    mirror: tuple[int, ...]
    """The joint on the other side of the body; an involution, middle joints map to themselves."""
    center: int
    """Joint subtracted from every frame."""
    axis_z: tuple[int, int]
    """(from, to): this vector of the first frame is turned parallel to +z."""
    axis_x: tuple[int, int]
    """(from, to): this vector of the first frame is then turned parallel to +x."""
    joint_names: tuple[str, ...] = ()
    """One name per joint, or none."""
    rotation: Rotation = "first frame"
    """Whether clips are turned by the axes of their first frame, or stay as they stand."""
    max_frames: int = MAX_FRAMES
    """Longer clips are cut to this many frames."""

    def __post_init__(self) -> None:
        joints = range(len(self.parents))
        count, named = len(self.parents), (self.center, *self.axis_z, *self.axis_x)
        require(0 < count <= MAX_JOINTS, f"a skeleton has 1 to {MAX_JOINTS:,} joints, got {count:,} parents")
        known, rotations = f"joints 0..{count - 1}", get_args(Rotation)
        require(all(p in joints for p in self.parents), f"parents must name {known}: {self.parents}")
        require(len(self.mirror) == count, f"mirror has {len(self.mirror)} joints, parents {count}")
        require(
            all(m in joints and self.mirror[m] == j for j, m in enumerate(self.mirror)),
            f"mirror must swap joints in pairs (an involution of 0..{count - 1}): {self.mirror}",
        )
        roots = [j for j in joints if self.parents[j] == j]
        require(len(roots) == 1, f"exactly one joint must be its own parent (the root), got {roots}")
        above = list(joints)
        for _ in joints:
            above = [self.parents[j] for j in above]
        require(above == roots * count, f"parents contain a cycle: {self.parents}")
        require(len(self.axis_z) == len(self.axis_x) == 2, "axis_z and axis_x must be two joints each")
        require(all(j in joints for j in named), f"center and axes must name {known}: {named}")
        names = len(self.joint_names)
        require(names in (0, count), f"{names} joint names for {count} joints")
        require(
            self.rotation in rotations,
            f"rotation must be {' or '.join(rotations)}, got {self.rotation!r:.40}",
        )
        require(
            type(self.max_frames) is int and self.max_frames >= 1,
            f"max_frames must be an integer of 1 or more, got {self.max_frames!r:.40}",
        )

    @property
    def root(self) -> int:
        """The joint that is its own parent."""
        return next(j for j, p in enumerate(self.parents) if j == p)

    @property
    def num_joints(self) -> int:
        """V."""
        return len(self.parents)

    @property
    def bones(self) -> tuple[tuple[int, int], ...]:
        """(joint, parent) for every joint but the root."""
        return tuple((j, p) for j, p in enumerate(self.parents) if j != p)


NTU25 = Skeleton(
    parents=(1, 20, 20, 2, 20, 4, 5, 6, 20, 8, 9, 10, 0, 12, 13, 14, 0, 16, 17, 18, 20, 22, 7, 24, 11),
    mirror=(0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 20, 23, 24, 21, 22),
    center=1,
    axis_z=(0, 1),
    axis_x=(4, 8),
    joint_names=(
        "base of spine", "middle of spine", "neck", "head",
        "left shoulder", "left elbow", "left wrist", "left hand",
        "right shoulder", "right elbow", "right wrist", "right hand",
        "left hip", "left knee", "left ankle", "left foot",
        "right hip", "right knee", "right ankle", "right foot",
        "spine", "left hand tip", "left thumb", "right hand tip", "right thumb",
    ),
)  # fmt: skip
"""The 25 joints of NTU RGB+D and PKU-MMD (Kinect v2)."""


def bone_stream(x: Tensor, parents: Tensor) -> Tensor:
    """Joint minus its parent. x [N, T, C, V, M] metres, parents [V] -> same shape; the root's bone is zero.

    (2s-AGCN, sec. 3.3)
    """
    return x - x[:, :, :, parents]


def motion_stream(x: Tensor) -> Tensor:
    """Next frame minus this one. x [N, T, C, V, M] metres -> metres per frame; the last frame is zero."""
    later = x.roll(-1, 1)
    later[:, -1] = x[:, -1]
    return later - x
