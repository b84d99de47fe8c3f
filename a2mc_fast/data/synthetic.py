"""The built-in set: NTU-25 clips of named actions, made by forward kinematics of joint-angle trajectories.

An action is a list of moves: seconds and the joint angles reached by then, eased in between. Everything else
(resting posture, idle limbs, side, tempo, repetitions, onset, amplitude, body, camera, sensor) is drawn
independently of the class and covers it up: actions share limbs and postures, and some are each other's time
reversal, so telling them apart needs the trajectory.

Performer's axes: x right, y forward, z up; angles in degrees, lengths in metres, 30 frames/s.
Legend: N clips · B bodies (a clip has one or two) · F frames of all bodies · A angles · V joints.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

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

# -- the body --

# r is the acting side, l the other. arm: f forward raise, a outward raise, t inward twist of the upper arm,
# e elbow; leg: h hip forward, o hip outward, k knee; trunk: bend forward, lean to the acting side, turn away
# from it; nod of the head; facing of the whole body; gap between two persons in centimetres
_LIMBS = tuple(f"{side}{angle}" for side in "lr" for angle in "fatehok")
_ANGLES = _LIMBS + ("bend", "lean", "turn", "nod", "facing", "gap")
_INDEX = {name: i for i, name in enumerate(_ANGLES)}
_MIRROR = [_INDEX[{"l": "r", "r": "l"}[n[0]] + n[1:] if n in _LIMBS else n] for n in _ANGLES]
_MIRROR_SIGN = np.array([-1 if n in ("lean", "turn", "facing") else 1 for n in _ANGLES], _F32)[:, None]

# joint -> (joint it hangs from, bone in the standing pose, proportion it follows), from the base of the spine
_LEFT = {
    4: (20, (-0.17, 0.0, -0.02), "width"), 5: (4, (-0.02, 0.0, -0.28), "arm"),
    6: (5, (0.0, 0.0, -0.25), "arm"), 7: (6, (0.0, 0.0, -0.08), "arm"),
    21: (7, (0.0, 0.01, -0.09), "arm"), 22: (7, (0.03, 0.04, -0.03), "arm"),
    12: (0, (-0.09, 0.0, -0.03), "width"), 13: (12, (0.0, 0.0, -0.42), "leg"),
    14: (13, (0.0, 0.0, -0.40), "leg"), 15: (14, (0.0, 0.13, -0.06), "leg"),
}  # fmt: skip
_RIGHT = {
    NTU25.mirror[joint]: (NTU25.mirror[root], (-x, y, z), part)
    for joint, (root, (x, y, z), part) in _LEFT.items()
}
_BONES = {
    1: (0, (0.0, 0.0, 0.22), "trunk"), 20: (1, (0.0, 0.0, 0.25), "trunk"),
    2: (20, (0.0, 0.0, 0.07), "trunk"), 3: (2, (0.0, 0.03, 0.16), "trunk"), **_LEFT, **_RIGHT,
}  # fmt: skip
_PARTS = ("trunk", "width", "arm", "leg")

# hinges from the hands and feet inwards: (angle, axis it turns about, factor, joints whose bones turn)
_ARM = {"l": [5, 6, 7, 21, 22], "r": [9, 10, 11, 23, 24]}
_LEG = {"l": [13, 14, 15], "r": [17, 18, 19]}
_CHEST = [20, 2, 3, 4, 8, *_ARM["l"], *_ARM["r"]]
_Hinge = tuple[str, int, float, list[int]]


def _limb_hinges(side: str, out: float) -> list[_Hinge]:
    arm, leg = _ARM[side], _LEG[side]
    return [
        (side + "e", 0, 1.0, arm[1:]), (side + "t", 2, -out, arm[1:]), (side + "a", 1, out, arm),
        (side + "f", 0, 1.0, arm),
        # the foot makes up for most of what hip and knee tilt it
        (side + "k", 0, 0.7, leg[2:]), (side + "h", 0, -0.7, leg[2:]),
        (side + "k", 0, -1.0, leg[1:]), (side + "o", 1, out, leg), (side + "h", 0, 1.0, leg),
    ]  # fmt: skip


_HINGES: list[_Hinge] = [
    *_limb_hinges("l", 1.0),
    *_limb_hinges("r", -1.0),
    ("nod", 0, -1.0, [3]),
    # half of each trunk angle at the middle of the spine, half at its base
    *(
        (angle, axis, factor, joints)
        for joints in (_CHEST, [1, *_CHEST])
        for angle, axis, factor in (("turn", 2, 0.5), ("lean", 1, 0.5), ("bend", 0, -0.5))
    ),
    ("facing", 2, 1.0, list(_BONES)),
]

# -- the actions --

Move = tuple[float, str]
_SIT, _RISE, _HOLD = "bh85 bk88 bend5", "bh45 bk60 bend45", "bend0 bh3 bk5 rf25 re95 rt20 lf5"
_STEP_R, _STEP_L = "rh28 rk10 lh-18 lk12 lf20 rf-20", "lh28 lk10 rh-18 rk12 rf20 lf-20"
_STEP_R2, _STEP_L2 = f"{_STEP_R} / {_STEP_L}", f"{_STEP_L} / {_STEP_R}"

# name -> moves (tenths of a second, angles reached). "b" sets both sides; an angle stays until it is set anew
# or "" lets the body return to rest; after "/" comes the second person. What goes from rest to rest repeats,
# the others happen once; a first move of 0 is where the clip begins.
ACTIONS: dict[str, Sequence[Move]] = {
    "drink": [(7, "rf50 ra10 rt40 re125"), (4, "rf85 re140 nod-30 bend-12"), (4, "rf90"), (7, "")],
    "brush teeth": [(5, "rf40 ra35 rt60 re125"), *3 * [(2, "ra70 rt75"), (2, "ra10 rt40")], (5, "")],
    "brush hair": [
        (6, "rf130 ra20 rt40 re110"), *2 * [(4, "rf95 ra65 re145"), (3, "rf140 ra20 re100")], (6, ""),
    ],
    "wave": [(5, "ra80 rt-85 re80"), *3 * [(2, "re115"), (2, "re45")], (5, "")],
    "throw": [(7, "ra95 rt-110 re95 turn-30"), (1.8, "rf80 ra20 rt10 re10 turn30 bend12"), (6, "")],
    "punch": [
        (3, "bf15 be125 bt25"),
        *2 * [(1.6, "rf85 re5 rt0 turn20"), (2.4, "rf15 re125 rt25 turn0"),
              (1.6, "lf85 le5 lt0 turn-20"), (2.4, "lf15 le125 lt25 turn0")],
        (3, ""),
    ],
    "clap": [(4, "bf45 ba15 be70 bt0"), *3 * [(2, "bt40"), (2, "bt-10")], (4, "")],
    "check watch": [(6, "rf60 ra5 rt75 re95 nod35 bend12"), (7, "re100 nod40"), (6, "")],
    "stretch side": [(7, "ra165 re20 lean-30"), (4, "lean-35"), (7, "")],
    "kick": [(5, "rh-25 rk65 bend8 lf15"), (2, "rh75 rk8 bend-8"), (6, "")],
    "march in place": 2 * [(3.5, "rh75 rk85 lf35 rf-20 lh3 lk5"), (3.5, "lh75 lk85 rf35 lf-20 rh3 rk5")]
    + [(3.5, "")],
    "jump up": [
        (5, "bh60 bk95 bend35 bf-35"), (2, "bh-3 bk3 bend-3 bf155 be10"), (3, "bh45 bk75 bend25 bf20"),
        (4, ""),
    ],
    "sit down": [(5, _RISE), (6, _SIT)],
    "stand up": [(0, _SIT), (6, _RISE), (5, "")],
    "pick up": [(8, "bend75 bh45 bk50 rf75 re5 rt0 lf55"), (2, "bend77"), (8, _HOLD)],
    "put down": [(0, _HOLD), (8, "bend77 bh45 bk50 rf75 re5 rt0 lf55"), (2, "bend75"), (8, "")],
    "shake hands": [
        (6, "rf45 re35 rt15 gap85 / rf45 re35 rt15"),
        *3 * [(1.6, "re60 / re60"), (1.6, "re30 / re30")],
        (6, ""),
    ],
    "push": [
        (5, "bf30 be115 gap75 / bf0"), (2, "bf80 be5 bend15 gap80 / bend-20 bf30 be35"),
        (3, "gap115 / bend-5 rh-20 rk25"), (6, ""),
    ],
    "walk towards": [(0, f"gap270 {_STEP_L2}"), (4, f"gap220 {_STEP_R2}"), (4, f"gap170 {_STEP_L2}"),
                     (4, f"gap120 {_STEP_R2}"), (4, f"gap70 {_STEP_L2}")],
    "walk apart": [(0, f"gap70 {_STEP_L2}"), (4, f"gap120 {_STEP_R2}"), (4, f"gap170 {_STEP_L2}"),
                   (4, f"gap220 {_STEP_R2}"), (4, f"gap270 {_STEP_L2}")],
    "hug": [(6, "bf75 ba25 be20 gap75 / bf75 ba25 be20"), (4, "bt45 be60 gap35 bend10 / bt45 be60 bend10"),
            (6, "be62 / be62"), (6, "")],
    "jumping jack": [*2 * [(3, "ba155 be10 bo22"), (3, "ba10 bo3")], (1, "")],
    "squat": [(9, "bh85 bk112 bend30 bf80 be5"), (3, "bh87"), (9, "")],
    "bow": [(7, "bend55 bf15 nod20"), (5, "bend57"), (7, "")],
    "point": [(6, "rf85 ra5 re5 rt0"), (8, "rf87"), (6, "")],
    "cross hands": [*2 * [(4, "bf60 ba-22 be25 bt10"), (4, "ba45 bf55 be10")], (4, "")],
}  # fmt: skip


def _program(moves: Sequence[Move]) -> tuple[list[float], Array]:
    """Key times in seconds [key] and angles [role, key, 2A]: values, then a 1 for each that is set."""
    times, rows = [0.0], [np.zeros((2, 2 * len(_ANGLES)), _F32)]
    for tenths, text in moves:
        key = rows[-1].copy() if text else np.zeros_like(rows[0])
        for role, part in enumerate(text.split("/")):
            for name, degrees in re.findall(r"([a-z]+)(-?\d+)", part):
                for angle in (name,) if name in _INDEX else ("l" + name[1:], "r" + name[1:]):
                    key[role, _INDEX[angle]] = float(degrees)
                    key[role, len(_ANGLES) + _INDEX[angle]] = 1.0
        times.append(times[-1] + tenths / 10)
        rows.append(key)
    return times, np.stack(rows, 1)


class _Programs:
    """All actions as tables: when the keys are, their angles, and what kind of action it is."""

    def __init__(self) -> None:
        programs = [_program(moves) for moves in ACTIONS.values()]
        # an action that is over stays at its last key
        width = max(len(times) for times, _ in programs) + 1
        self.time = np.stack([np.pad(t, (0, width - len(t)), constant_values=np.inf) for t, _ in programs])
        keys = [np.pad(k, ((0, 0), (0, width - k.shape[1]), (0, 0)), mode="edge") for _, k in programs]
        self.key = np.stack(keys).transpose(3, 0, 1, 2)  # [2A, class, role, key]
        self.seconds = np.array([times[-1] for times, _ in programs])
        self.repeats = np.array([moves[0][0] > 0 and not moves[-1][1] for moves in ACTIONS.values()])
        self.two_persons = np.array([any("/" in text for _, text in m) for m in ACTIONS.values()])
        needs_standing = [_INDEX[name] for name in ("lh", "rh", "bend", "lean", "gap")]
        self.may_sit = ~np.any(self.key[len(_ANGLES) :][needs_standing], axis=(0, 2, 3))


_PROGRAMS = _Programs()

# -- one chunk of clips --

# resting arms (f, a, t, e) and their shares
_ARM_RESTS = {
    "hanging": ((5, 8, 10, 15), 0.44), "on the hip": ((-20, 40, 60, 85), 0.08),
    "folded": ((25, 5, 60, 100), 0.1), "in a pocket": ((-12, 22, 5, 45), 0.08),
    "forearm raised": ((20, 10, 20, 85), 0.1), "at the chin": ((40, 12, 45, 128), 0.08),
    "behind the head": ((125, 30, 40, 120), 0.06), "held out": ((10, 70, -70, 75), 0.06),
}  # fmt: skip
_IS_ARM = np.array([name in _LIMBS and name[1] in "fate" for name in _ANGLES])[:, None]
# which limb an angle belongs to: two arms, two legs, the trunk; and how far idle gestures move it, degrees
_LIMB = np.array(["lr".index(n[0]) + 2 * (n[1] in "hok") if n in _LIMBS else 4 for n in _ANGLES])
_GESTURE = np.where(_IS_ARM, 30, np.where(_LIMB < 4, 22, 10)[:, None])


class _Cast:
    """Body and style of every performer, and the distortion of every camera: fixed for the whole set."""

    def __init__(self, rng: np.random.Generator) -> None:
        size = rng.uniform(0.87, 1.1, (1, PERFORMERS)) * rng.uniform(0.92, 1.08, (len(_PARTS), PERFORMERS))
        bones = np.zeros((NTU25.num_joints, 3))
        part = np.zeros(NTU25.num_joints, int)
        for joint, (_, bone, name) in _BONES.items():
            bones[joint], part[joint] = bone, _PARTS.index(name)
        self.bones = bones.T[:, :, None] * size[part]  # [3, V, performer] metres
        self.habit = rng.normal(0, 5, (len(_ANGLES), PERFORMERS))  # degrees added to the resting posture
        self.tempo = np.exp(rng.normal(0, 0.12, PERFORMERS))
        self.vigour = rng.uniform(0.85, 1.1, PERFORMERS)  # factor of every angle an action sets
        self.skew = rng.normal(0, _SKEW, (3, 3, CAMERAS))


@dataclass
class _Bodies:
    """Everyone in a chunk of clips: first persons, then the second persons of those clips that have one."""

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
        """The same in float32."""
        return self.repeat(values.astype(_F32))


def _clock(rng: np.random.Generator, label: NDArray, total: NDArray, tempo: NDArray) -> NDArray:
    """When a clip's action starts, how long one takes, how often it comes, and its sway of tempo: [6, N].

    total: seconds of each clip [N]. Repeated actions may be under way in the first frame and in the last; the
    others happen around the middle.
    """
    clips = len(label)
    span = np.minimum(_PROGRAMS.seconds[label] / (tempo * rng.uniform(0.75, 1.4, clips)), 0.8 * total)
    repeats = _PROGRAMS.repeats[label]
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
    rest = habit[:, bodies.performer] + rng.normal(0, 4, (len(_ANGLES), count))
    for side in "lr":
        style = rng.choice(len(arms), count, p=shares)
        rest[[_INDEX[side + angle] for angle in "fate"]] += np.array(arms)[style].T
        rest[_INDEX[side + "h"]] += np.where(seated, 82, 3)
        rest[_INDEX[side + "k"]] += np.where(seated, 85, 8)
        rest[_INDEX[side + "o"]] += rng.uniform(0, 12, count)
    for name, spread in (("turn", 12), ("lean", 5), ("bend", 8), ("facing", 10)):
        rest[_INDEX[name]] += rng.normal(0, spread, count)
    rest[_INDEX["gap"]] = rng.uniform(90, 220, count)
    return rest


def _act(bodies: _Bodies, clock: Array) -> tuple[Array, Array]:
    """Angles that the actions set and how far they set them (0 at rest .. 1): each [A, F]. clock [6, F]."""
    start, span, times, sway, beat, phase = clock
    seconds = bodies.seconds
    done = (seconds - start + sway * np.sin(beat * seconds + phase)) / span
    # before the first and after the last repetition the action stands still
    done = np.clip(done - np.clip(np.floor(done), 0, times - 1), 0, 1)
    kind = bodies.repeat(bodies.label)
    local = done * _PROGRAMS.seconds[kind].astype(_F32)
    begins = _PROGRAMS.time[kind]  # [F, key]
    move = (local[:, None] >= begins[:, 1:]).sum(1)
    frames = np.arange(len(kind))
    begun = begins[frames, move]
    share = ((local - begun) / (begins[frames, move + 1] - begun)).astype(_F32)
    share = share * share * (3 - 2 * share)
    rows = np.ravel_multi_index((kind, bodies.repeat(bodies.second), move), _PROGRAMS.key.shape[1:])
    table = _PROGRAMS.key.reshape(len(_PROGRAMS.key), -1)
    angles = table[:, rows]
    angles += share * (table[:, rows + 1] - angles)
    return angles[: len(_ANGLES)], angles[len(_ANGLES) :]


def _idle(rng: np.random.Generator, bodies: _Bodies) -> Array:
    """What a body does whatever the action: it sways, and moves half of its limbs once; degrees [A, F]."""
    shape = len(_ANGLES), len(bodies.clip)
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
    """Forward kinematics. angles [A, F] degrees, bones [3, V, F] metres -> joints, the lowest at z = 0.

    The bones are overwritten.
    """
    for name, axis, factor, joints in _HINGES:
        radians = angles[_INDEX[name]] * _F32(np.deg2rad(factor))
        s, c = np.sin(radians), np.cos(radians)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        u, v = bones[i, joints], bones[j, joints]
        bones[i, joints] = c * u - s * v
        bones[j, joints] = s * u + c * v
    for joint, (root, _, _) in _BONES.items():
        bones[:, joint] += bones[:, root]
    bones[2] -= bones[2].min(0)
    return bones


def _sense(rng: np.random.Generator, bodies: _Bodies, joints: Array, lens: NDArray, noise: float) -> Array:
    """Joints [3, V, F] as a sensor reports them: seen from somewhere, skewed, trembling. lens [3, 3, N].

    Most joints of a clip are a centimetre off and drift slowly, some are badly tracked.
    """
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
    pairs = np.flatnonzero(_PROGRAMS.two_persons[label])
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
    seated = (_PROGRAMS.may_sit[label] & (rng.random(count) < 0.35))[clip]

    value, gate = _act(bodies, bodies.spread(clock[:, clip]))
    shape = len(_ANGLES), len(clip)
    vigour = np.tile(cast.vigour[bodies.performer] * rng.uniform(0.8, 1.15, shape[1]), (shape[0], 1))
    vigour[_INDEX["gap"]] = 1
    angles = value * bodies.spread(vigour) + gate * bodies.spread(rng.normal(0, 6, shape))
    angles += (1 - gate) * bodies.spread(_resting(rng, bodies, cast.habit, seated))
    angles += (1 - 0.6 * gate) * _idle(rng, bodies)
    bent = [_INDEX[side + angle] for side in "lr" for angle in "ek"]
    angles[bent] = np.maximum(angles[bent], 0)  # elbows and knees bend one way
    angles = np.where(bodies.repeat(left), angles[_MIRROR] * _MIRROR_SIGN, angles)

    # second persons face the first across the gap, which the first person's angles hold
    second = bodies.repeat(bodies.second)
    angles[_INDEX["facing"]] += 180 * second
    joints = _pose(angles, bodies.spread(cast.bones[:, :, bodies.performer]))
    row = bodies.repeat(bodies.starts[bodies.clip]) + bodies.frame  # in the first persons' frames
    joints[1] += second * angles[_INDEX["gap"], row] / 100

    out = np.zeros((lengths.sum(), 2, NTU25.num_joints, 3), _F32)
    seen = _sense(rng, bodies, joints, cast.skew[..., clips["camera"]], noise)
    out[row, second] = seen.transpose(2, 1, 0)
    return out


# -- the set --


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
    most = len(ACTIONS)
    require(2 <= classes <= most, f"synthetic: classes must be 2 to {most}, got {classes}")
    require(
        clips >= CAMERAS * classes,
        f"synthetic: {classes} classes need at least {CAMERAS * classes} clips (every split), got {clips}",
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
    joints = np.empty((every["length"].sum(), 2, NTU25.num_joints, 3), _F32)
    at = 0
    for first in range(0, clips, _CHUNK):
        chunk = {name: values[first : first + _CHUNK] for name, values in every.items()}
        seen = _simulate(rng, cast, chunk, noise)
        ends = np.cumsum(chunk["length"])
        for begin, end in zip(ends - chunk["length"], ends):
            joints[at + begin : at + end] = normalize_clip(seen[begin:end], NTU25)
        at += len(seen)
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
