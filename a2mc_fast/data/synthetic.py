"""The built-in set: NTU-25 clips of named actions, made by forward kinematics of joint-angle trajectories.

What the actions are is in `actions`. Everything else (resting posture, idle limbs, side, tempo, repetitions,
onset, amplitude, body, camera, sensor) is drawn independently of the class and covers it up, so telling
actions apart needs the trajectory.

Performer's axes: x right, y forward, z up; angles in degrees, lengths in metres, 30 frames/s.
Legend: N clips · B bodies (a clip has one or two) · F frames of all bodies · A angles · V joints.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from a2mc_fast.data.actions import ACTIONS, ANGLES, BONES, HINGES, INDEX, LIMBS, PARTS, PROGRAMS, mirrored
from a2mc_fast.data.clips import Clips
from a2mc_fast.data.normalize import normalize_clip
from a2mc_fast.errors import require
from a2mc_fast.skeleton import NTU25

FRAMES_PER_SECOND = 30
PERFORMERS = 30
CAMERAS = 3
_LENGTHS = (60, 140)  # frames, both included; crops of at least 64 frames then differ
_SKEW = 0.05  # spread of what cameras, and again clips, do to the axes
_DRIFT, _JITTER = 0.012, 0.006  # metres a joint is off: slowly (the median joint), and anew in every frame
_KNOT = 8  # frames between independent values of the slow error
_CHUNK = 128  # clips simulated at once: the working set stays near the cache
_F32 = np.float32
Array = NDArray[np.float32]

# resting arms (f, a, t, e) and their shares
_ARM_RESTS = {
    "hanging": ((5, 8, 10, 15), 0.44), "on the hip": ((-20, 40, 60, 85), 0.08),
    "folded": ((25, 5, 60, 100), 0.1), "in a pocket": ((-12, 22, 5, 45), 0.08),
    "forearm raised": ((20, 10, 20, 85), 0.1), "at the chin": ((40, 12, 45, 128), 0.08),
    "behind the head": ((125, 30, 40, 120), 0.06), "held out": ((10, 70, -70, 75), 0.06),
}  # fmt: skip
_IS_ARM = np.array([name in LIMBS and name[1] in "fate" for name in ANGLES])[:, None]
# which limb an angle belongs to: two arms, two legs, the trunk; and how far idle gestures move it, degrees
_LIMB = np.array(["lr".index(n[0]) + 2 * (n[1] in "hok") if n in LIMBS else 4 for n in ANGLES])
_GESTURE = np.where(_IS_ARM, 30, np.where(_LIMB < 4, 22, 10)[:, None])


class _Cast:
    """Body and style of every performer, and the distortion of every camera."""

    def __init__(self, rng: np.random.Generator) -> None:
        size = rng.uniform(0.87, 1.1, (1, PERFORMERS)) * rng.uniform(0.92, 1.08, (len(PARTS), PERFORMERS))
        bones = np.zeros((NTU25.num_joints, 3))
        part = np.zeros(NTU25.num_joints, int)
        for joint, (_, bone, name) in BONES.items():
            bones[joint], part[joint] = bone, PARTS.index(name)
        self.bones = bones.T[:, :, None] * size[part]  # [3, V, performer] metres
        self.habit = rng.normal(0, 5, (len(ANGLES), PERFORMERS))  # degrees added to the resting posture
        self.tempo = np.exp(rng.normal(0, 0.12, PERFORMERS))
        self.vigour = rng.uniform(0.85, 1.1, PERFORMERS)  # factor of every angle an action sets
        self.skew = rng.normal(0, _SKEW, (3, 3, CAMERAS))


@dataclass
class _Bodies:
    """Everyone in a chunk of clips: first persons, then the second ones of those clips that have one."""

    clip: NDArray  # [B] clip of the chunk
    second: NDArray  # [B] 1 for the second person of a clip
    label: NDArray  # [B]
    performer: NDArray  # [B]
    lengths: NDArray  # [B] frames

    def __post_init__(self) -> None:
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.frame = np.arange(self.lengths.sum()) - self.repeat(self.starts)  # [F] within the clip
        self.seconds = (self.frame / FRAMES_PER_SECOND).astype(_F32)  # [F]

    def repeat(self, values: NDArray) -> NDArray:
        """A body's values for each of its frames. [..., B] -> [..., F]."""
        return np.repeat(values, self.lengths, axis=-1)

    def spread(self, values: NDArray) -> Array:
        return self.repeat(values.astype(_F32))


def _clock(rng: np.random.Generator, label: NDArray, total: NDArray, tempo: NDArray) -> NDArray:
    """When a clip's action starts, how long one takes, how often it comes, and its sway of tempo: [6, N].
    total: seconds of each clip [N]. Repeated actions may be under way in the first frame and in the last."""
    clips = len(label)
    span = np.minimum(PROGRAMS.seconds[label] / (tempo * rng.uniform(0.75, 1.4, clips)), 0.8 * total)
    repeats = PROGRAMS.repeats[label]
    start = np.where(
        repeats,
        rng.uniform(-0.6, 0.25, clips) * np.minimum(span, 0.6 * total),
        rng.uniform(0.38, 0.62, clips) * total - span / 2,
    )
    times = np.where(repeats, np.round((total - start) / span * rng.uniform(0.55, 1.2, clips)), 1)
    # depth times rate of the sway stays below 1, so time never runs backwards
    sway = rng.uniform(0, 0.2, clips), rng.uniform(1, 4, clips), rng.uniform(0, 7, clips)
    return np.stack((start, span, np.maximum(times, 1), *sway))


def _resting(rng: np.random.Generator, bodies: _Bodies, habit: NDArray, seated: NDArray) -> NDArray:
    """Resting posture, degrees [A, B]."""
    count = len(seated)
    arms, shares = zip(*_ARM_RESTS.values())
    rest = habit[:, bodies.performer] + rng.normal(0, 4, (len(ANGLES), count))
    for side in "lr":
        style = rng.choice(len(arms), count, p=shares)
        rest[[INDEX[side + angle] for angle in "fate"]] += np.array(arms)[style].T
        rest[INDEX[side + "h"]] += np.where(seated, 82, 3)
        rest[INDEX[side + "k"]] += np.where(seated, 85, 8)
        rest[INDEX[side + "o"]] += rng.uniform(0, 12, count)
    for name, spread in (("turn", 12), ("lean", 5), ("bend", 8), ("facing", 10)):
        rest[INDEX[name]] += rng.normal(0, spread, count)
    rest[INDEX["gap"]] = rng.uniform(90, 220, count)
    return rest


def _act(bodies: _Bodies, clock: Array) -> tuple[Array, Array]:
    """Angles that the actions set and how far they set them (0 at rest .. 1): each [A, F]. clock [6, F]."""
    start, span, times, sway, beat, phase = clock
    seconds = bodies.seconds
    done = (seconds - start + sway * np.sin(beat * seconds + phase)) / span
    # before the first and after the last repetition the action stands still
    done = np.clip(done - np.clip(np.floor(done), 0, times - 1), 0, 1)
    kind = bodies.repeat(bodies.label)
    local = done * PROGRAMS.seconds[kind].astype(_F32)
    begins = PROGRAMS.time[kind]  # [F, key]
    move = (local[:, None] >= begins[:, 1:]).sum(1)
    frames = np.arange(len(kind))
    begun = begins[frames, move]
    share = ((local - begun) / (begins[frames, move + 1] - begun)).astype(_F32)
    share = share * share * (3 - 2 * share)
    rows = np.ravel_multi_index((kind, bodies.repeat(bodies.second), move), PROGRAMS.key.shape[1:])
    table = PROGRAMS.key.reshape(len(PROGRAMS.key), -1)
    angles = table[:, rows]
    angles += share * (table[:, rows + 1] - angles)
    return angles[: len(ANGLES)], angles[len(ANGLES) :]


def _idle(rng: np.random.Generator, bodies: _Bodies) -> Array:
    """What a body does whatever the action: it sways, and moves half of its limbs once; degrees [A, F]."""
    shape = len(ANGLES), len(bodies.clip)
    reach = rng.normal(0, 1, shape) * np.where(_IS_ARM, 8, 3)
    rate, phase = rng.uniform(0.6, 4, shape), rng.uniform(0, 7, shape)
    sway = bodies.spread(reach) * np.sin(bodies.spread(rate) * bodies.seconds + bodies.spread(phase))
    limbs = _LIMB.max() + 1
    when = rng.uniform(0, 1, (limbs, shape[1])) * bodies.lengths / FRAMES_PER_SECOND
    width = rng.uniform(0.15, 0.5, (limbs, shape[1]))
    bump = np.exp(-(((bodies.seconds - bodies.spread(when)) / bodies.spread(width)) ** 2))
    gesture = rng.normal(0, 1, shape) * _GESTURE * (rng.random((limbs, shape[1])) < 0.5)[_LIMB]
    return sway + bodies.spread(gesture) * bump[_LIMB]


def _pose(angles: Array, bones: Array) -> Array:
    """Forward kinematics. angles [A, F] degrees, bones [3, V, F] metres, which become the joints, the lowest
    at z = 0."""
    for name, axis, factor, joints in HINGES:
        radians = angles[INDEX[name]] * _F32(np.deg2rad(factor))
        s, c = np.sin(radians), np.cos(radians)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        u, v = bones[i, joints], bones[j, joints]
        bones[i, joints] = c * u - s * v
        bones[j, joints] = s * u + c * v
    for joint, (root, _, _) in BONES.items():
        bones[:, joint] += bones[:, root]
    bones[2] -= bones[2].min(0)
    return bones


def _sense(rng: np.random.Generator, bodies: _Bodies, joints: Array, lens: NDArray, noise: float) -> Array:
    """Joints [3, V, F] as a sensor reports them: seen from somewhere, skewed, trembling. lens [3, 3, N]. Most
    joints of a clip are a centimetre off and drift slowly, some are badly tracked."""
    clips = lens.shape[-1]
    yaw, tilt = rng.uniform(-1.7, 1.7, clips), rng.normal(-0.1, 0.1, clips)
    one, zero = np.ones(clips), np.zeros(clips)
    s, c = np.sin(yaw), np.cos(yaw)
    turned = np.array([[c, -s, zero], [s, c, zero], [zero, zero, one]])
    s, c = np.sin(tilt), np.cos(tilt)
    tipped = np.array([[one, zero, zero], [zero, c, -s], [zero, s, c]])
    skew = np.eye(3)[..., None] + noise * (lens + rng.normal(0, _SKEW, lens.shape))
    view = bodies.spread(np.einsum("ijn,jkn,kln->iln", skew, tipped, turned)[..., bodies.clip])
    joints = np.stack([a * joints[0] + b * joints[1] + c * joints[2] for a, b, c in view])

    knots = bodies.lengths // _KNOT + 2
    size = noise * np.exp(rng.normal(np.log(_DRIFT), 1, (NTU25.num_joints, len(knots)))).astype(_F32)
    drift = rng.standard_normal((3, NTU25.num_joints, knots.sum()), _F32) * np.repeat(size, knots, axis=1)
    knot = bodies.frame // _KNOT + bodies.repeat(np.cumsum(knots) - knots)
    share = (bodies.frame % _KNOT / _KNOT).astype(_F32)
    joints += drift[..., knot] * (1 - share) + drift[..., knot + 1] * share
    return joints + rng.standard_normal(joints.shape, _F32) * _F32(noise * _JITTER)


def _simulate(rng: np.random.Generator, cast: _Cast, clips: dict[str, NDArray], noise: float) -> Array:
    """The clips one after another, joints [F, 2, V, 3] metres as sensed; an absent person is all zeros."""
    label, lengths = clips["label"], clips["length"]
    count = len(label)
    pairs = np.flatnonzero(PROGRAMS.two_persons[label])
    clip = np.concatenate((np.arange(count), pairs))
    bodies = _Bodies(
        clip=clip,
        second=np.repeat((0, 1), (count, len(pairs))),
        label=label[clip],
        performer=np.concatenate((clips["performer"], clips["partner"][pairs])),
        lengths=lengths[clip],
    )
    # the two persons of a clip keep one clock and act with the same hand; both sit or stand
    clock = _clock(rng, label, lengths / FRAMES_PER_SECOND, cast.tempo[clips["performer"]])
    left = rng.random(count)[clip] < 0.5
    seated = (PROGRAMS.may_sit[label] & (rng.random(count) < 0.35))[clip]

    value, gate = _act(bodies, bodies.spread(clock[:, clip]))
    shape = len(ANGLES), len(clip)
    vigour = np.tile(cast.vigour[bodies.performer] * rng.uniform(0.8, 1.15, shape[1]), (shape[0], 1))
    vigour[INDEX["gap"]] = 1
    angles = value * bodies.spread(vigour) + gate * bodies.spread(rng.normal(0, 6, shape))
    angles += (1 - gate) * bodies.spread(_resting(rng, bodies, cast.habit, seated))
    angles += (1 - 0.6 * gate) * _idle(rng, bodies)
    bent = [INDEX[side + angle] for side in "lr" for angle in "ek"]
    angles[bent] = np.maximum(angles[bent], 0)  # elbows and knees bend one way
    angles = np.where(bodies.repeat(left), mirrored(angles), angles)

    # second persons face the first across the gap, which the first person's angles hold
    second = bodies.repeat(bodies.second)
    angles[INDEX["facing"]] += 180 * second
    joints = _pose(angles, bodies.spread(cast.bones[:, :, bodies.performer]))
    row = bodies.repeat(bodies.starts[bodies.clip]) + bodies.frame  # in the first persons' frames
    joints[1] += second * angles[INDEX["gap"], row] / 100

    out = np.zeros((lengths.sum(), 2, NTU25.num_joints, 3), _F32)
    seen = _sense(rng, bodies, joints, cast.skew[..., clips["camera"]], noise)
    out[row, second] = seen.transpose(2, 1, 0)
    return out


def _recorded(rng: np.random.Generator, cast: _Cast, every: dict[str, NDArray], noise: float) -> Array:
    """The same normalised, chunk by chunk."""
    joints = np.empty((every["length"].sum(), 2, NTU25.num_joints, 3), _F32)
    at = 0
    for first in range(0, len(every["label"]), _CHUNK):
        chunk = {name: values[first : first + _CHUNK] for name, values in every.items()}
        seen = _simulate(rng, cast, chunk, noise)
        for clip in np.split(seen, np.cumsum(chunk["length"])[:-1]):
            joints[at : at + len(clip)] = normalize_clip(clip, NTU25)
            at += len(clip)
    return joints


def synthetic_clips(
    *,
    clips: int = 2000,
    classes: int = 20,
    seed: int = 0,
    noise: float = 1.0,
    device: torch.device | str = "cpu",
) -> Clips:
    """Normalised clips of the first `classes` actions, with the protocols `xsub` and `xview`.

    Two persons, 60 to 140 frames a clip at 30 per second; the same arguments give the same set. Classes,
    performers and cameras are balanced; xsub trains on two thirds of the performers, xview of the cameras.
    `noise` scales what the sensor adds (0: rigid bones). Raises `InputError` outside 2..26 classes.
    """
    most, least = len(ACTIONS), CAMERAS * classes  # clips in every split
    require(2 <= classes <= most, f"synthetic: classes must be 2 to {most}, got {classes}")
    require(
        clips >= least, f"synthetic: {classes} classes need at least {least} clips (every split), got {clips}"
    )
    require(seed >= 0, f"synthetic: seed must not be negative, got {seed}")
    require(noise >= 0, f"synthetic: noise must not be negative, got {noise}")
    rng = np.random.default_rng(seed)
    cast = _Cast(rng)
    order = rng.permutation(clips)
    turn = order // classes  # how many clips of the class come before
    performer = turn % PERFORMERS
    every = {
        "label": order % classes,
        "length": rng.integers(_LENGTHS[0], _LENGTHS[1] + 1, clips),
        "performer": performer,
        # a partner from the same side of xsub
        "partner": (performer + 3 * rng.integers(1, PERFORMERS // 3, clips)) % PERFORMERS,
        "camera": (turn + turn // CAMERAS) % CAMERAS,
    }
    joints = _recorded(rng, cast, every, noise)
    names = list(ACTIONS)[:classes]
    return Clips.pack(
        joints,
        every["length"],
        every["label"],
        NTU25,
        splits={"xsub": performer % 3 != 0, "xview": every["camera"] != CAMERAS - 1},
        names=[
            f"{names[c]} {t} (performer {p}, camera {k})"
            for c, t, p, k in zip(every["label"], turn, performer, every["camera"])
        ],
        class_names=names,
        extra={"subjects": performer, "cameras": every["camera"]},
        source=f"synthetic, {clips} clips of {classes} classes, seed {seed}, noise {noise:g}",
        device=device,
        where="synthetic",
    )
