"""The pre-normalisation against golden numbers, its invariants, and a slow restatement in plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a2mc_fast.data.normalize import (
    LATER_AXIS,
    NO_CENTRE,
    NO_LENGTH,
    choose_bodies,
    normalize_clip,
    normalized,
)
from a2mc_fast.data.rules import UnusableError
from a2mc_fast.skeleton import NTU25, Skeleton

CHAIN = Skeleton(parents=(0, 0, 1, 2, 1), mirror=(0, 1, 2, 4, 3), center=2, axis_z=(1, 2), axis_x=(3, 4))
"""Five joints, nothing like NTU's."""


def slow_normalize(
    joints: np.ndarray, skeleton: Skeleton, limit: int = 300, public: bool = False
) -> np.ndarray:
    """The public conversion in plain loops: on an array of `limit` frames, cut at the end.

    Unless `public`, a frame without the centre takes that of the nearest frame, and an axis is taken from the
    first frame that has it.
    """
    length, persons, count, _ = joints.shape
    clip = np.zeros((persons, limit, count, 3))  # [M, T, V, C]
    for t in range(min(length, limit)):
        for m in range(persons):
            clip[m, t] = joints[t, m]
    for person in clip:
        if person.sum() == 0:
            continue
        if person[0].sum() == 0:
            there = [frame.copy() for frame in person if frame.sum() != 0]
            person[:] = 0
            for t, frame in enumerate(there):
                person[t] = frame
        for t in range(limit):
            if person[t].sum() == 0 and person[t:].sum() == 0:
                for later in range(t, limit):
                    person[later] = person[later % t]
                break
    middle = clip[0, :, skeleton.center].copy()
    had = [t for t in range(min(length, limit)) if middle[t].any()]
    for t in range(limit):
        if not public and had:
            middle[t] = clip[0, min(had, key=lambda other: (abs(other - t), other)), skeleton.center]
    axes = []
    for start, end in (skeleton.axis_z, skeleton.axis_x):
        both = [t for t in range(limit) if clip[0, t, start].any() and clip[0, t, end].any()]
        axes.append(both[0] if both and not public else 0)
    for person in clip:
        for t in range(limit):
            for v in range(count):
                if person[t, v].sum() != 0:
                    person[t, v] -= middle[t]
    for (start, end), t0, target in zip((skeleton.axis_z, skeleton.axis_x), axes, ((0, 0, 1), (1, 0, 0))):
        turn = slow_rotation(clip[0, t0, end] - clip[0, t0, start], np.array(target, float))
        for person in clip:
            for t in range(limit):
                for v in range(count):
                    person[t, v] = turn @ person[t, v]
    return clip[:, :length].transpose(1, 0, 2, 3)


def slow_rotation(vector: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Turns `vector` onto `target`, as a unit quaternion."""
    axis = np.cross(vector, target)
    if np.abs(axis).sum() < 1e-6 or not np.linalg.norm(vector):
        return np.eye(3)
    angle = math.acos(np.clip(vector @ target / np.linalg.norm(vector), -1, 1))
    if angle < 1e-6:
        return np.eye(3)
    w = math.cos(angle / 2)
    x, y, z = math.sin(angle / 2) * axis / np.linalg.norm(axis)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def slow_choice(joints: np.ndarray, keep: int = 2) -> np.ndarray:
    """The bodies of joints [T, B, V, 3] by falling energy, body by body."""
    energy = []
    for body in range(joints.shape[1]):
        seen = [joint for frame in joints[:, body] for joint in frame if joint.any()]
        energy.append(sum(np.std([joint[c] for joint in seen]) for c in range(3)) if seen else 0.0)
    ranked = sorted(range(len(energy)), key=lambda body: energy[body], reverse=True)[:keep]
    chosen = np.zeros((len(joints), keep, *joints.shape[2:]))
    for slot, body in enumerate(ranked):
        chosen[:, slot] = joints[:, body]
    return chosen


def full_clip(seed: int, frames: int, persons: int, joints: int) -> np.ndarray:
    """Poses around (0, 0, 3), nobody ever absent: float32 [T, M, V, 3]."""
    rng = np.random.default_rng(seed)
    clip = rng.normal(0, 0.4, (1, persons, joints, 3)) + rng.normal(0, 0.1, (frames, persons, joints, 3))
    return (clip + [0, 0, 3]).astype(np.float32)


def random_clip(seed: int, frames: int, persons: int, joints: int) -> np.ndarray:
    """The same with persons who come late, leave early, drop out in between or never come."""
    rng = np.random.default_rng(seed)
    clip = full_clip(seed, frames, persons, joints)
    for person in range(persons):
        kind = rng.integers(5)
        first, last = sorted(rng.integers(0, frames + 1, 2))
        if kind in (1, 3):
            clip[:first, person] = 0
        if kind in (2, 3):
            clip[last:, person] = 0
        if kind in (1, 2, 3):
            clip[rng.random(frames) < 0.2, person] = 0
        if kind == 4:
            clip[:, person] = 0
    clip[rng.random(clip.shape[:3]) < 0.02] = 0  # single joints lost
    return clip


def golden_input() -> np.ndarray:
    """Two clips [N, C, T, V, M] whose normalisation was computed with the public conversion."""
    c, t, v, m = np.meshgrid(np.arange(3), np.arange(300), np.arange(25), np.arange(2), indexing="ij")
    wave = np.sin(0.05 * t * (c + 1) + 0.37 * v + 0.9 * m + 0.2 * c) + 0.1 * v * (c == 1) + 2 * (c == 2)
    clips = np.stack([wave, 0.8 * wave + 0.1])
    clips[0, :, 40:] = 0
    clips[0, :, 30:, :, 1] = clips[0, :, :5, :, 1] = 0
    clips[1, :, :3] = clips[1, :, 60:] = 0
    clips[1, ..., 1] = 0
    return clips.astype(np.float32)


def test_golden_numbers() -> None:
    out = np.stack([normalize_clip(clip.transpose(1, 3, 2, 0), NTU25) for clip in golden_input()])
    out = out.transpose(0, 4, 1, 3, 2)  # [N, C, T, V, M]
    assert np.abs(out).sum((1, 2, 3, 4), dtype=float) == pytest.approx([40519.78, 16006.63], abs=0.01)
    golden = {
        (0, 0, 0, 0, 0): 0.595268,
        (0, 2, 10, 7, 0): 0.376147,
        (0, 1, 29, 24, 1): 2.053889,
        (0, 0, 100, 3, 0): 0.560006,
        (1, 1, 5, 20, 0): 1.269205,
        (1, 2, 299, 11, 0): -1.606039,
        (1, 0, 0, 8, 0): 1.234781,
    }
    for place, value in golden.items():
        assert out[place] == pytest.approx(value, abs=2e-6), place
    spine = out[0, :, 0, 1, 0] - out[0, :, 0, 0, 0]  # turned away from +z again by the second rotation
    assert spine == pytest.approx([-0.595, 0.203, 0.154], abs=5e-4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), frames=st.integers(1, 60), persons=st.integers(1, 3), ntu=st.booleans())
def test_equals_the_plain_loops(seed: int, frames: int, persons: int, ntu: bool) -> None:
    skeleton = NTU25 if ntu else CHAIN
    clip = random_clip(seed, frames, persons, skeleton.num_joints)
    try:
        made = normalize_clip(clip, skeleton)
    except UnusableError as error:  # person 0 never has the centre, or an axis
        joints = clip[:, 0, :].any(2)
        axes = [joints[:, axis].all(1).any() for axis in (list(skeleton.axis_z), list(skeleton.axis_x))]
        missing = not all(axes) if error.reason == "no axes" else not joints[:, skeleton.center].any()
        assert missing
        return
    # float32 against float64 on coordinates of a few metres
    np.testing.assert_allclose(made, slow_normalize(clip, skeleton, limit=64), atol=2e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), frames=st.integers(1, 60), ntu=st.booleans())
def test_whole_recordings_equal_the_public_conversion(seed: int, frames: int, ntu: bool) -> None:
    """Persons may come late and leave early, the first one excepted."""
    skeleton = NTU25 if ntu else CHAIN
    clip = full_clip(seed, frames, 2, skeleton.num_joints)
    first, last = sorted(np.random.default_rng(seed).integers(0, frames + 1, 2))
    clip[:first, 1] = clip[last:, 1] = 0
    made = normalized(clip, skeleton)
    assert made.remarks == {}
    np.testing.assert_allclose(made.joints, slow_normalize(clip, skeleton, limit=64, public=True), atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), frames=st.integers(1, 40), bodies=st.integers(1, 4))
def test_bodies_are_ranked_by_spread(seed: int, frames: int, bodies: int) -> None:
    clip = random_clip(seed, frames, bodies, 25)
    chosen = choose_bodies(clip)
    assert chosen.shape == (frames, 2, 25, 3)
    np.testing.assert_array_equal(chosen, slow_choice(clip))


def test_invariants() -> None:
    for seed in range(20):
        clip = full_clip(seed, 50, 2, 25)
        out = normalize_clip(clip, NTU25)
        assert out.dtype == np.float32 and out.shape == clip.shape
        assert not out[:, 0, NTU25.center].any()
        across = out[0, 0, 8] - out[0, 0, 4]
        assert across[0] > 0 and np.abs(across[1:]).max() < 1e-5
        # rotations keep distances
        before = np.linalg.norm(clip[:, 0, 3] - clip[:, 0, 15], axis=1)
        assert np.linalg.norm(out[:, 0, 3] - out[:, 0, 15], axis=1) == pytest.approx(before, abs=1e-5)


def test_late_person_is_moved_to_the_front_and_repeated() -> None:
    clip = full_clip(1, 6, 1, 5)
    clip[[0, 3, 5]] = 0
    alone = normalize_clip(clip[[1, 2, 4]], CHAIN)
    np.testing.assert_array_equal(normalize_clip(clip, CHAIN), np.concatenate([alone, alone]))


def test_gap_in_the_middle_stays_null() -> None:
    clip = full_clip(2, 6, 1, 5)
    clip[[2, 5]] = 0
    out = normalize_clip(clip, CHAIN)
    assert not out[2].any()
    np.testing.assert_array_equal(out[5], out[0])


def test_long_clips_are_cut() -> None:
    clip = random_clip(3, 310, 1, 5)
    assert len(normalize_clip(clip, CHAIN)) == 300
    short = replace(CHAIN, max_frames=7)
    np.testing.assert_array_equal(normalize_clip(clip, short), normalize_clip(clip[:7], CHAIN))


def test_missing_centre_and_axes_come_from_the_nearest_frame() -> None:
    """A joint that is not detected is (0, 0, 0); its frame must not stay metres away, nor turn the clip."""
    whole = full_clip(5, 12, 2, 25)
    clip = whole.copy()
    clip[[0, 3, 4, 11], 0, NTU25.center] = 0
    clip[:2, 0, NTU25.axis_x[1]] = 0
    made = normalized(clip, NTU25)
    assert made.remarks == {
        NO_CENTRE: 4,
        LATER_AXIS.format(axis="axis_z"): 1,
        LATER_AXIS.format(axis="axis_x"): 1,
    }
    np.testing.assert_allclose(made.joints, slow_normalize(clip, NTU25, limit=12), atol=2e-5)
    assert np.abs(made.joints).max() < 3  # bodies stand 3 m from the sensor
    assert not made.joints[[0, 3, 4, 11], 0, NTU25.center].any()
    across = made.joints[2, 0, 8] - made.joints[2, 0, 4]  # the first frame that has it
    assert across[0] > 0 and np.abs(across[1:]).max() < 1e-5
    # the second person is centred, too, where the first is away
    clip = whole.copy()
    clip[5, 0] = 0
    assert np.abs(normalize_clip(clip, NTU25)).max() < 3


@pytest.mark.parametrize(
    ("joints", "reason"), [([2], "no centre"), ([3], "no axes"), ([0, 1, 2, 3, 4], "no centre")]
)
def test_clips_without_centre_or_axes_are_unusable(joints: list[int], reason: str) -> None:
    clip = full_clip(6, 5, 2, 5)
    clip[:, 0, joints] = 0
    with pytest.raises(UnusableError, match=reason):
        normalize_clip(clip, CHAIN)


@pytest.mark.parametrize("root", [0, 1, 20, 9])
def test_poses_relative_to_a_joint_are_those_of_the_camera(root: int) -> None:
    """A lifter's or a body model's hip is (0, 0, 0) in every frame, and was detected nevertheless."""
    camera = full_clip(7, 30, 2, 25)
    relative = camera - camera[:, :, root, None]
    expected = normalized(camera - camera[:, :1, root, None], NTU25)  # in one frame for both persons
    alone = normalized(camera[:, :1], NTU25)
    made = normalized(relative[:, :1], NTU25)
    np.testing.assert_allclose(made.joints, alone.joints, atol=1e-5)
    assert made.remarks == {} and expected.remarks == {}
    np.testing.assert_allclose(expected.joints, normalize_clip(camera, NTU25), atol=1e-5)


def test_a_joint_that_is_never_detected_stays_missing() -> None:
    clip = full_clip(8, 6, 1, 25)
    clip[:, :, 15] = 0
    made = normalized(clip, NTU25)
    assert not made.joints[:, :, 15].any() and made.remarks == {}


def test_an_axis_without_length_is_said() -> None:
    clip = full_clip(9, 6, 1, 25)
    clip[:, :, NTU25.axis_z[1]] = clip[:, :, NTU25.axis_z[0]]
    made = normalized(clip, NTU25)
    assert made.remarks == {NO_LENGTH.format(axis="axis_z"): 6}
    assert (made.joints[0, 0, 8] - made.joints[0, 0, 4])[0] > 0
    clip[0] = full_clip(10, 1, 1, 25)[0]
    assert normalized(clip, NTU25).remarks == {}


def test_rotation_is_a_choice_and_flat_clips_are_never_turned() -> None:
    clip = full_clip(11, 9, 2, 25)
    centred = clip - clip[:, :1, NTU25.center, None]
    np.testing.assert_array_equal(normalize_clip(clip, replace(NTU25, rotation="none")), centred)
    flat = clip.copy()
    flat[..., 2] = 0
    made = normalize_clip(flat, NTU25)
    np.testing.assert_array_equal(made[..., :2], centred[..., :2])
    assert not made[..., 2].any()


def test_clip_without_person_or_frames() -> None:
    assert not normalize_clip(np.zeros((4, 2, 25, 3), np.float32), NTU25).any()
    assert normalize_clip(np.zeros((0, 2, 25, 3), np.float32), NTU25).shape == (0, 2, 25, 3)


def test_input_is_not_changed() -> None:
    clip = random_clip(5, 20, 2, 25)
    before = clip.copy()
    normalize_clip(clip, NTU25)
    np.testing.assert_array_equal(clip, before)
