"""The built-in set: deterministic, rigid bodies, balanced protocols, classes only the trajectory tells."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from a2mc_fast.data import Clips
from a2mc_fast.data.synthetic import ACTIONS, synthetic_clips
from a2mc_fast.errors import InputError
from a2mc_fast.skeleton import NTU25

STEPS = 32


@pytest.fixture(scope="module")
def clips() -> Clips:
    return synthetic_clips(clips=1000, seed=3)


def resampled(clips: Clips) -> Tensor:
    """Every whole clip at 32 times: [N, T, C, V, M]."""
    position = torch.linspace(0, 1, STEPS) * (clips.lengths - 1).unsqueeze(1)
    return clips.read(torch.arange(len(clips)), position)


def ridge_accuracy(clips: Clips, feature: Tensor) -> float:
    """Share of xsub test clips that a linear (ridge) classifier of the training clips gets right."""
    train, test = clips.split("xsub")
    feature = feature.flatten(1).double()
    feature = (feature - feature[train].mean(0)) / (feature[train].std(0) + 1e-6)
    target = F.one_hot(clips.labels[train], clips.num_classes).double()
    gram = feature[train] @ feature[train].T
    penalty = 0.3 * feature.shape[1] * torch.eye(len(train), dtype=torch.float64)
    weight = torch.linalg.solve(gram + penalty, target - target.mean(0))
    guess = (feature[test] @ feature[train].T @ weight).argmax(1)
    return float((guess == clips.labels[test]).float().mean())


def motion_filters(x: Tensor) -> Tensor:
    """Peak and mean response to 600 random filters over time, alike for left and right: [N, 1200].

    Filters have zero mean over time, so resting posture alone gives no response.
    """
    generator = torch.Generator().manual_seed(0)
    filters = torch.randn(600, 150, 7, generator=generator)
    filters *= torch.rand(600, 150, 1, generator=generator) < 0.04
    filters -= filters.mean(2, keepdim=True)
    mirrored = x[:, :, :, list(NTU25.mirror)] * torch.tensor([-1.0, 1, 1]).view(3, 1, 1)

    def pooled(clip: Tensor) -> Tensor:
        response = F.conv1d(clip.permute(0, 2, 3, 4, 1).flatten(1, 3), filters)
        return torch.cat((response.amax(2), response.clamp(min=0).mean(2)), 1)

    return pooled(x) + pooled(mirrored)


def bone_lengths(clips: Clips) -> Tensor:
    """[F, bone, M] metres."""
    joint, parent = (list(side) for side in zip(*NTU25.bones))
    return (clips.frames[:, :, joint] - clips.frames[:, :, parent]).norm(dim=1)


def test_form(clips: Clips) -> None:
    assert clips.frames.shape == (int(clips.lengths.sum()), 3, 25, 2) and clips.frames.dtype == torch.float32
    assert torch.isfinite(clips.frames).all() and clips.frames.abs().max() < 10
    assert clips.skeleton == NTU25 and clips.class_names == tuple(ACTIONS)[:20]
    assert len(set(clips.names)) == 1000
    # crops of at least 64 frames must be able to differ
    assert (
        clips.lengths.min() >= 60 and clips.lengths.max() <= 140 and (clips.lengths > 64).float().mean() > 0.8
    )
    # normalised like every other source
    assert (clips.frames[:, :, NTU25.center, 0] == 0).all()
    first = clips.frames[clips.offsets, :, :, 0]
    shoulders = first[:, :, NTU25.axis_x[1]] - first[:, :, NTU25.axis_x[0]]
    torch.testing.assert_close(
        shoulders / shoulders.norm(dim=1, keepdim=True), torch.eye(3)[:1].expand(1000, 3), rtol=0, atol=1e-5
    )


def test_deterministic_per_seed() -> None:
    first, again, other = (synthetic_clips(clips=60, seed=seed) for seed in (5, 5, 6))
    for name in ("frames", "lengths", "labels"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert first.names == again.names
    frames = min(len(first.frames), len(other.frames))
    assert not torch.equal(first.frames[:frames], other.frames[:frames])


def test_bones_are_rigid_before_the_sensor() -> None:
    clips = synthetic_clips(clips=260, classes=26, seed=1, noise=0.0)
    owner = torch.repeat_interleave(torch.arange(len(clips)), clips.lengths)
    length = bone_lengths(clips)
    error = (length - length[clips.offsets][owner]).abs()
    assert error.max() < 1e-5, f"a bone changes by {float(error.max()):.1e} m"
    assert (length[..., 0] > 0.02).all()  # and no joint sits on its parent
    # everyone has a body of one's own, the same in each of one's clips
    own = length[clips.offsets][..., 0]
    same = clips.extra["subjects"][:, None] == clips.extra["subjects"]
    far = torch.cdist(own, own, compute_mode="donot_use_mm_for_euclid_dist")
    assert far[same].max() < 1e-4 and far[~same].min() > 1e-3


def test_noise_bends_bones() -> None:
    length = bone_lengths(synthetic_clips(clips=60, seed=1))[..., 0]
    assert length.std(0).min() > 1e-3


def test_second_person_only_where_the_action_has_one() -> None:
    clips = synthetic_clips(clips=260, classes=26, seed=2)
    owner = torch.repeat_interleave(torch.arange(len(clips)), clips.lengths)
    two = {"shake hands", "push", "walk towards", "walk apart", "hug"}
    pair = torch.tensor([clips.class_names[c] in two for c in clips.labels])[owner]
    assert (clips.frames[~pair][..., 1] == 0).all()
    assert (clips.frames[pair][..., 1].abs().sum((1, 2)) > 0).all()


@pytest.mark.parametrize("count,classes", [(1000, 20), (60, 20), (157, 7)])
def test_protocols(count: int, classes: int) -> None:
    clips = synthetic_clips(clips=count, classes=classes, seed=4)
    per_class = torch.bincount(clips.labels, minlength=classes)
    assert per_class.max() - per_class.min() <= 1
    for protocol, key in (("xsub", "subjects"), ("xview", "cameras")):
        train, test = clips.split(protocol)
        owner = clips.extra[key]
        assert not set(owner[train].tolist()) & set(owner[test].tolist())
        assert abs(len(train) / count - 2 / 3) < 0.05
        for side, share in ((train, 2 / 3), (test, 1 / 3)):
            held = torch.bincount(clips.labels[side], minlength=classes)
            assert held.max() - held.min() <= 2 and held.min() >= 1
            assert (held - share * per_class).abs().max() <= 2


def test_reversed_actions_share_their_poses() -> None:
    """Sitting down, played backwards, is standing up: the two differ in their order alone."""
    for forward, backward in (("sit down", "stand up"), ("walk towards", "walk apart")):
        there = [angles for _, angles in ACTIONS[forward]]
        back = [angles for _, angles in ACTIONS[backward]]
        assert {key for key in there if key} == {key for key in back if key} and there != back


def test_trajectory_tells_the_class_and_trivial_statistics_do_not(clips: Clips) -> None:
    x = resampled(clips)
    trivial = {
        "length": clips.lengths,
        "mean pose": x.mean(1),
        "first frame": x[:, 0],
        "last frame": x[:, -1],
        "motion of each joint": (x[:, 1:] - x[:, :-1]).norm(dim=2).mean(1),
    }
    accuracy = {
        name: ridge_accuracy(clips, feature.view(len(clips), -1)) for name, feature in trivial.items()
    }
    trajectory = ridge_accuracy(clips, motion_filters(x))
    # chance is 0.05; over seeds 0 to 4 trivial statistics reach 0.44 at most, the trajectory 0.89 at least
    assert accuracy["length"] < 0.12, accuracy
    assert max(accuracy.values()) < 0.52, accuracy
    assert trajectory > 0.8 and trajectory > max(accuracy.values()) + 0.3, (trajectory, accuracy)


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"classes": 1}, "classes must be 2 to 26, got 1"),
        ({"classes": 27}, "classes must be 2 to 26, got 27"),
        ({"clips": 59}, "20 classes need at least 60 clips"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"noise": -0.5}, "noise must not be negative, got -0.5"),
    ],
)
def test_bad_arguments(arguments: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        synthetic_clips(**arguments)
