"""The pre-normalisation of 2s-AGCN that ISC, CMD and A²MC train on, one clip at a time, in numpy.

Null frames are filled, every frame is centred on person 0, and one rotation per clip turns the spine of the
first frame to +z and then the shoulders to +x. "Null" means that the coordinates sum to exactly zero, as in
the public conversion.

Legend: T frames · M persons · B bodies seen by the sensor · V joints; coordinates in metres, joints [T, M, V,
3].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from a2mc_fast.skeleton import Skeleton

MAX_FRAMES = 300
"""Frames kept of a clip: the length of the arrays that the public conversion writes."""
_PARALLEL = 1e-6  # below this rotation axis (1-norm) or angle (radians) nothing is turned
_UP, _RIGHT = np.array([0.0, 0.0, 1.0]), np.array([1.0, 0.0, 0.0])


def normalize_clip(joints: np.ndarray, skeleton: Skeleton, *, limit: int = MAX_FRAMES) -> np.ndarray:
    """The clip filled, centred and turned. joints float32 [T, M, V, 3] metres -> float32 [min(T, limit), M,
    V, 3].

    Person 0 at `skeleton.center` is the origin of every frame, so the path through the room is removed. The
    second rotation is the smallest one, hence the spine is only nearly vertical afterwards. A person that is
    absent all the time stays all zeros; when person 0 is absent, nothing is centred or turned.
    """
    joints = _fill_null_frames(np.array(joints[:limit], np.float32))
    if not len(joints):
        return joints
    seen = _joint_sums(joints) != 0
    origin = joints[:, :1, skeleton.center, None].copy()
    joints = np.where(seen[..., None], joints - origin, np.float32(0))
    first = joints[0, 0].astype(np.float64)
    upright = _rotation_onto(first[skeleton.axis_z[1]] - first[skeleton.axis_z[0]], _UP)
    frontal = _rotation_onto(upright @ (first[skeleton.axis_x[1]] - first[skeleton.axis_x[0]]), _RIGHT)
    return joints @ (frontal @ upright).T.astype(np.float32)  # the origin, and with it a null frame, stays


def choose_bodies(joints: np.ndarray, keep: int = 2) -> np.ndarray:
    """The `keep` bodies that spread most, most first. joints [T, B, V, 3] -> [T, keep, V, 3]; zeros where B
    < keep.

    Spread, the public conversion's "energy", is the sum over x, y and z of the standard deviation over all
    joints of all frames in which the body is not null.
    """
    bodies = joints.shape[1]
    if bodies > 1:
        spread = [_spread(joints[:, body]) for body in range(bodies)]
        joints = joints[:, np.argsort(spread, kind="stable")[::-1][:keep]]
    if bodies < keep:
        joints = np.pad(joints, ((0, 0), (0, keep - bodies), (0, 0), (0, 0)))
    return joints


def _spread(body: np.ndarray) -> float:
    """Sum of the standard deviations of x, y and z, null frames apart; 0 if all are null. body [T, V, 3]."""
    seen = body[_joint_sums(body).sum(-1) != 0]
    return float(seen.reshape(-1, 3).std(0).sum()) if len(seen) else 0.0


def _joint_sums(joints: np.ndarray) -> np.ndarray:
    """x + y + z of each joint. [..., 3] -> [...]; additions beat a reduction over so short an axis."""
    return joints[..., 0] + joints[..., 1] + joints[..., 2]


def _fill_null_frames(joints: np.ndarray) -> np.ndarray:
    """Each person's frames repeated in a cycle over the null frames at the end. joints [T, M, V, 3],
    changed in place.

    A person who comes late, null in frame 0, first has all null frames removed; otherwise gaps in the middle
    stay.
    """
    seen = _joint_sums(joints).sum(-1) != 0  # [T, M]
    steps = np.arange(len(joints))
    for person in np.flatnonzero(seen.any(0) & ~seen.all(0)):
        frames = np.flatnonzero(seen[:, person])
        if seen[0, person]:
            frames = steps[: frames[-1] + 1]
        joints[:, person] = joints[frames[steps % len(frames)], person]
    return joints


def _rotation_onto(vector: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The smallest rotation that makes `vector` parallel to the unit vector `target`: float64 [3, 3]
    (Rodrigues).

    The identity when they are parallel already, when they are opposite (no smallest rotation) or `vector` is
    zero.
    """
    (a, b, c), (x, y, z) = vector.tolist(), target.tolist()
    axis = np.array([b * z - c * y, c * x - a * z, a * y - b * x])
    angle = math.atan2(math.hypot(*axis), a * x + b * y + c * z)
    if np.abs(axis).sum() < _PARALLEL or angle < _PARALLEL:
        return np.eye(3)
    p, q, r = (axis / math.hypot(*axis)).tolist()
    cross = np.array([[0.0, -r, q], [r, 0.0, -p], [-q, p, 0.0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * (cross @ cross)
