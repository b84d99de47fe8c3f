"""The actions of the built-in set, and the body that performs them.

An action is a list of moves: seconds and the joint angles reached by then. The body is a tree of bones that
turn about hinges, worked from the hands and feet inwards.

Performer's axes: x right, y forward, z up; angles in degrees, lengths in metres. A angles.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from a2mc_fast.skeleton import NTU25

_F32 = np.float32
Array = NDArray[np.float32]

# r is the acting side, l the other. arm: f forward raise, a outward raise, t inward twist of the upper arm,
# e elbow; leg: h hip forward, o hip outward, k knee; trunk: bend forward, lean to the acting side, turn away
# from it; nod of the head; facing of the whole body; gap between two persons in centimetres
LIMBS = tuple(f"{side}{angle}" for side in "lr" for angle in "fatehok")
ANGLES = LIMBS + ("bend", "lean", "turn", "nod", "facing", "gap")
INDEX = {name: i for i, name in enumerate(ANGLES)}
_MIRROR = [INDEX[{"l": "r", "r": "l"}[n[0]] + n[1:] if n in LIMBS else n] for n in ANGLES]
_MIRROR_SIGN = np.array([-1 if n in ("lean", "turn", "facing") else 1 for n in ANGLES], _F32)[:, None]

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
BONES = {
    1: (0, (0.0, 0.0, 0.22), "trunk"), 20: (1, (0.0, 0.0, 0.25), "trunk"),
    2: (20, (0.0, 0.0, 0.07), "trunk"), 3: (2, (0.0, 0.03, 0.16), "trunk"), **_LEFT, **_RIGHT,
}  # fmt: skip
PARTS = ("trunk", "width", "arm", "leg")

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


HINGES: list[_Hinge] = [
    *_limb_hinges("l", 1.0),
    *_limb_hinges("r", -1.0),
    ("nod", 0, -1.0, [3]),
    # half of each trunk angle at the middle of the spine, half at its base
    *(
        (angle, axis, factor, joints)
        for joints in (_CHEST, [1, *_CHEST])
        for angle, axis, factor in (("turn", 2, 0.5), ("lean", 1, 0.5), ("bend", 0, -0.5))
    ),
    ("facing", 2, 1.0, list(BONES)),
]

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
    times, rows = [0.0], [np.zeros((2, 2 * len(ANGLES)), _F32)]
    for tenths, text in moves:
        key = rows[-1].copy() if text else np.zeros_like(rows[0])
        for role, part in enumerate(text.split("/")):
            for name, degrees in re.findall(r"([a-z]+)(-?\d+)", part):
                for angle in (name,) if name in INDEX else ("l" + name[1:], "r" + name[1:]):
                    key[role, INDEX[angle]] = float(degrees)
                    key[role, len(ANGLES) + INDEX[angle]] = 1.0
        times.append(times[-1] + tenths / 10)
        rows.append(key)
    return times, np.stack(rows, 1)


class Programs:
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
        needs_standing = [INDEX[name] for name in ("lh", "rh", "bend", "lean", "gap")]
        self.may_sit = ~np.any(self.key[len(ANGLES) :][needs_standing], axis=(0, 2, 3))


PROGRAMS = Programs()


def mirrored(angles: Array) -> Array:
    """Left and right exchanged. angles [A, F]"""
    return angles[_MIRROR] * _MIRROR_SIGN
