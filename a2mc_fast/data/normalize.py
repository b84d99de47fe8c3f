"""The pre-normalisation of 2s-AGCN that ISC, CMD and A²MC train on, one clip at a time, in numpy.

The README beside states it. The public conversion takes for null whatever sums to zero, joint by joint; here
a person is absent from a frame if all of its joints are exactly zero, and a single joint that is exactly zero
was not detected. On clips without such joints and frames, the result is that of the public conversion.

Legend: T frames · M persons · B bodies seen by the sensor · V joints; coordinates in metres.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from a2mc_fast.data.rules import UnusableError, check_poses

if TYPE_CHECKING:
    from a2mc_fast.skeleton import Skeleton

PARALLEL = 1e-6  # below this rotation axis (1-norm) or angle (radians) nothing is turned
MARGIN = 0.1  # of the body's diagonal, by which the origin may lie outside a body counted from its joint
_UP, _RIGHT = np.array([0.0, 0.0, 1.0]), np.array([1.0, 0.0, 0.0])

NO_CENTRE = "the centre joint is missing; centred as the nearest frame that has it"
OTHER_CENTRE = "the centre joint is never there; centred on the one on the other side"
LATER_AXIS = "{axis} lacks a joint in the first frame; turned by a later one"
NO_LENGTH = "{axis} has no length; not turned by it"


class Normalized(NamedTuple):
    """A clip, and what had to be done that a whole recording does not need -> frames concerned."""

    joints: np.ndarray
    remarks: dict[str, int]


def usable(
    joints: np.ndarray, skeleton: Skeleton, persons: int, *, ranked: bool = False, normalize: bool = True
) -> Normalized:
    """Joints [T, M, V, 3] of `persons`, normalised or only cut, and held to the rule for clips before and
    after (`UnusableError`). If M is another number, or they are to be `ranked`, those that spread most come
    first."""
    joints = np.asarray(joints, np.float32)
    check_poses(joints, skeleton.num_joints)
    if ranked or joints.shape[1] != persons:
        joints = choose_bodies(joints, persons)
    made = normalized(joints, skeleton) if normalize else Normalized(joints[: skeleton.max_frames], {})
    # the choice and the cut may have removed every body, centring may have left the bounds
    check_poses(made.joints, skeleton.num_joints)
    return made


def normalize_clip(joints: np.ndarray, skeleton: Skeleton) -> np.ndarray:
    """The joints of `normalized`, float32 [min(T, skeleton.max_frames), M, V, 3]."""
    return normalized(joints, skeleton).joints


def normalized(joints: np.ndarray, skeleton: Skeleton) -> Normalized:
    """The clip filled, centred and turned. joints float32 [T, M, V, 3] metres.

    The second rotation is the smallest one, hence the spine is only nearly vertical afterwards. Raises
    `UnusableError` for a clip in which no frame has the centre or the joints of an axis.
    """
    joints = np.array(joints[: skeleton.max_frames], np.float32)
    there = _not_zero(joints)
    _fill_null_frames(joints, there)
    seen: np.ndarray = np.asarray(there.any(2))  # [T, M]
    if not seen.any():
        return Normalized(joints, {})
    for person in np.flatnonzero(seen.any(0) & ~np.all(there.any(0), 1)):
        frames = np.flatnonzero(seen[:, person])
        for joint in _counted_from(joints[frames, person], skeleton):
            there[frames, person, joint] = True
    remarks: dict[str, int] = {}
    center = skeleton.center
    if not there[:, 0, center].any() and there[:, 0, skeleton.mirror[center]].any():
        center = skeleton.mirror[center]
        remarks[OTHER_CENTRE] = len(joints)
    origin = joints[:, 0, center].copy()
    has = there[:, 0, center]
    if lacking := int((seen.any(1) & ~has).sum()):
        remarks[NO_CENTRE] = lacking
        origin = origin[_nearest(has, f"no frame has joint {center} of person 0, the centre")]
    joints = np.where(there[..., None], joints - origin[:, None, None], np.float32(0))
    if skeleton.rotation == "none" or not (joints[0, ..., 2].any() or joints[..., 2].any()):
        return Normalized(joints, remarks)
    turn = np.eye(3)
    for name, target in (("axis_z", _UP), ("axis_x", _RIGHT)):
        start, end = getattr(skeleton, name)
        vectors = joints[:, 0, end].astype(np.float64) - joints[:, 0, start]
        vector, remark = _axis(vectors, there[:, 0, start] & there[:, 0, end], name)
        remarks |= remark
        turn = _rotation_onto(turn @ vector, target) @ turn
    return Normalized(joints @ turn.T.astype(np.float32), remarks)


def choose_bodies(joints: np.ndarray, keep: int = 2) -> np.ndarray:
    """The `keep` bodies that spread most, most first. joints [T, B, V, 3] -> [T, keep, V, 3]; zeros where B
    < keep.

    Spread, the public conversion's "energy", is the sum over x, y and z of the standard deviation over all
    joints of all frames, null joints apart.
    """
    bodies = joints.shape[1]
    if bodies > 1:
        seen = (joints[:, body][_not_zero(joints[:, body])] for body in range(bodies))
        spread = [float(points.std(0).sum()) if len(points) else 0.0 for points in seen]
        joints = joints[:, np.argsort(spread, kind="stable")[::-1][:keep]]
    return np.pad(joints, ((0, 0), (0, keep - bodies), (0, 0), (0, 0))) if bodies < keep else joints


def _not_zero(joints: np.ndarray) -> np.ndarray:
    """Whether each joint is another point than the origin. [..., 3] -> [...]; faster than any() over so short
    an axis."""
    return (joints[..., 0] != 0) | (joints[..., 1] != 0) | (joints[..., 2] != 0)


def _counted_from(body: np.ndarray, skeleton: Skeleton) -> list[int]:
    """The joint that the body's coordinates are counted from, if any: a pose relative to its root has an
    exact zero there in every frame, as a joint that is never detected has.

    The origin then lies within the body, while a camera is away from it. Of several such joints one named by
    the skeleton counts. body [T, V, 3], in every frame of which somebody is there.
    """
    there = _not_zero(body)
    never = np.flatnonzero(~there.any(0)).tolist()
    named = (skeleton.root, skeleton.center, *skeleton.axis_z, *skeleton.axis_x)
    found = [joint for joint in named if joint in never][:1] or (never if len(never) == 1 else [])
    if not found:
        return []
    low = np.where(there[..., None], body, np.inf).min(1)  # [T, 3]
    high = np.where(there[..., None], body, -np.inf).max(1)
    margin = MARGIN * np.linalg.norm(high - low, axis=1, keepdims=True)
    inside = ((low <= margin) & (high >= -margin)).all(1)
    return found if inside.mean() > 0.5 else []


def _nearest(has: np.ndarray, otherwise: str) -> np.ndarray:
    """The nearest frame that has it, for every frame [T]; of two the earlier. `UnusableError` if none has."""
    frames, steps = np.flatnonzero(has), np.arange(len(has))
    if not len(frames):
        raise UnusableError("no centre", otherwise)
    place = np.searchsorted(frames, steps)
    before, after = frames[np.maximum(place - 1, 0)], frames[np.minimum(place, len(frames) - 1)]
    return np.where(np.abs(steps - before) <= np.abs(steps - after), before, after)


def _axis(vectors: np.ndarray, has: np.ndarray, name: str) -> tuple[np.ndarray, dict[str, int]]:
    """The first of vectors [T, 3] whose joints are there and apart, and what is to be said of it.

    Zeros if they are never apart; `UnusableError` if no frame `has` [T] both.
    """
    if not has.any():
        raise UnusableError("no axes", f"no frame has both joints of {name} of person 0")
    usable = has & (np.linalg.norm(vectors, axis=1) > PARALLEL)
    if not usable.any():
        return np.zeros(3), {NO_LENGTH.format(axis=name): len(vectors)}
    first = int(usable.argmax())
    return vectors[first], {LATER_AXIS.format(axis=name): 1} if first else {}


def _fill_null_frames(joints: np.ndarray, there: np.ndarray) -> None:
    """Each person's frames repeated in a cycle over the null frames at the end. joints [T, M, V, 3] and
    whether they are not zero [T, M, V], both changed in place.

    A person who comes late, null in frame 0, first has all null frames removed; otherwise gaps in the middle
    stay.
    """
    seen: np.ndarray = np.asarray(there.any(2))  # [T, M]
    steps = np.arange(len(joints))
    for person in np.flatnonzero(seen.any(0) & ~seen.all(0)):
        frames = np.flatnonzero(seen[:, person])
        if seen[0, person]:
            frames = steps[: frames[-1] + 1]
        cycle = frames[steps % len(frames)]
        joints[:, person], there[:, person] = joints[cycle, person], there[cycle, person]


def _rotation_onto(vector: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The smallest rotation that makes `vector` parallel to the unit vector `target`: float64 [3, 3]
    (Rodrigues). The identity if they are parallel, opposite (there is no smallest), or `vector` is zero."""
    (a, b, c), (x, y, z) = vector.tolist(), target.tolist()
    axis = np.array([b * z - c * y, c * x - a * z, a * y - b * x])
    angle = math.atan2(math.hypot(*axis), a * x + b * y + c * z)
    if np.abs(axis).sum() < PARALLEL or angle < PARALLEL:
        return np.eye(3)
    p, q, r = (axis / math.hypot(*axis)).tolist()
    cross = np.array([[0.0, -r, q], [r, 0.0, -p], [-q, p, 0.0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * (cross @ cross)
