"""Packed clips: round trip, gather, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from a2mc_fast.data import Clips
from a2mc_fast.data.identity import PARTS, differing
from a2mc_fast.errors import InputError
from a2mc_fast.skeleton import NTU25, Skeleton, bone_stream, motion_stream
from tests.conftest import SMALL


def test_saved_and_loaded_clips_are_equal(tmp_path: Path) -> None:
    joints = np.random.default_rng(0).standard_normal((30, 1, 5, 3), dtype=np.float32)
    clips = Clips.pack(
        joints,
        [10, 20],
        [1, -1],
        SMALL,
        splits={"xview": np.array([True, False])},
        names=["a", "b"],
        class_names=["sit", "stand"],
        extra={"subjects": np.array([3, 4])},
        source="test",
        command="by hand",
    )
    clips.save(tmp_path / "x.safetensors")
    again = Clips.load(tmp_path / "x.safetensors")
    for name in ("frames", "lengths", "labels"):
        assert torch.equal(getattr(clips, name), getattr(again, name))
    for name in ("skeleton", "names", "class_names", "source", "command"):
        assert getattr(clips, name) == getattr(again, name)
    assert torch.equal(again.extra["subjects"], torch.tensor([3, 4]))
    assert [i.tolist() for i in again.split("xview")] == [[0], [1]]
    assert np.array_equal(again.frames.permute(0, 3, 2, 1).numpy(), joints)


def test_reading_interpolates_within_the_clip(make_clips: Callable[..., Clips]) -> None:
    clips = make_clips([4, 6])
    got = clips.read(torch.tensor([1, 0]), torch.tensor([[0.0, 2.25, 5.0], [0.5, 3.0, 2.0]]))
    a, b = clips.frames[4:], clips.frames[:4]
    expected = torch.stack(
        (torch.stack((a[0], 0.75 * a[2] + 0.25 * a[3], a[5])), torch.stack(((b[0] + b[1]) / 2, b[3], b[2])))
    )
    assert got.shape == (2, 3, 3, 25, 2)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"joints": np.zeros((30, 1, 5, 3))}, "joints must be float32 [F, M, V, 3], got torch.float64"),
        ({"joints": np.ones((30, 1, 6, 3), np.float32)}, "joints have 6 joints, the skeleton 5"),
        (
            {"joints": np.full((30, 1, 5, 3), np.nan, np.float32)},
            "clip 0 holds coordinates that are not finite",
        ),
        ({"joints": np.full((30, 1, 5, 3), 2e3, np.float32)}, "or beyond 1,000 m (2 such clips)"),
        ({"joints": np.zeros((30, 1, 5, 3), np.float32)}, "clip 0 is all zeros (2 such clips)"),
        ({"lengths": [10, 21]}, "lengths sum to 31, joints hold 30 frames"),
        ({"lengths": [0, 30]}, "clip 0 has no frames"),
        ({"lengths": []}, "holds no clips"),
        ({"labels": [0]}, "1 labels for 2 clips"),
        ({"labels": [0, -2]}, "labels must be -1 (unknown) or from 0, got -2"),
        ({"class_names": ["sit"]}, "label 1 has no name, there are 1 class names"),
        ({"labels": [0, 65_535]}, "label 65,535 among 2 clips, of which 2,000 classes are the most"),
        ({"splits": {"x": np.zeros(3, bool)}}, "x has shape [3] for 2 clips"),
        ({"splits": {"x": np.zeros(2)}}, "split masks must be boolean"),
    ],
    ids=str,
)
def test_wrong_arrays_are_refused_in_words(change: dict[str, object], words: str) -> None:
    arguments = {
        "joints": np.ones((30, 1, 5, 3), np.float32),
        "lengths": [10, 20],
        "labels": [0, 1],
        **change,
    }
    with pytest.raises(ValueError) as error:
        Clips.pack(skeleton=SMALL, where="here", **arguments)  # type: ignore[arg-type]
    assert words in str(error.value) and str(error.value).startswith("here")


def test_how_clips_are_normalised_is_kept(tmp_path: Path, make_clips: Callable[..., Clips]) -> None:
    clips = make_clips([10, 20])
    clips.skeleton = replace(clips.skeleton, rotation="none", max_frames=77)
    path = tmp_path / "x.safetensors"
    clips.save(path)
    assert Clips.load(path).skeleton == clips.skeleton
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    old = {name: text for name, text in header.items() if name not in ("rotation", "max_frames", "identity")}
    save_file(tensors, path, old)  # as written before files said so
    assert Clips.load(path).skeleton == replace(clips.skeleton, rotation="first frame", max_frames=300)
    for wrong, words in (
        ({"rotation": "last"}, "rotation must be"),
        ({"max_frames": "0"}, "max_frames must be"),
    ):
        save_file(tensors, path, header | wrong)
        with pytest.raises(ValueError, match=words):
            Clips.load(path)


def test_identity_is_the_content(tmp_path: Path, make_clips: Callable[..., Clips]) -> None:
    """Each part has its own checksum; names, file and device have none, and a changed file is damaged."""
    path = tmp_path / "x.safetensors"

    def made(**changes: Any) -> Clips:
        return replace(make_clips([10, 20, 9]), **changes)

    clips = made()
    clips.save(path)
    assert Clips.load(path).identity == clips.identity == made(names=("a", "b", "c"), source="x").identity
    other = clips.frames.clone()
    other[20, 1, 2, 0] = torch.nextafter(other[20, 1, 2, 0], torch.tensor(9.0))
    parts = {
        "frames": {"frames": other},
        "lengths": {"lengths": torch.tensor([20, 10, 9])},
        "labels": {"labels": torch.tensor([0, 0, 1])},
        "splits": {"splits": {"xsub": torch.tensor([True, True, False])}},
        "skeleton": {"skeleton": replace(NTU25, center=20)},
    }
    for name, change in parts.items():
        assert differing(clips.identity, made(**change).identity) == [name]
    assert differing(clips.identity, "x") == differing("", clips.identity) == list(PARTS)
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["labels"], tensors["joints"] = torch.tensor([0, 0, 1]), tensors["joints"].flip(0)
    save_file(tensors, path, header)
    with pytest.raises(InputError, match="damaged: its frames and labels are not those that were packed"):
        Clips.load(path)


def test_unknown_protocol_lists_those_there_are(make_clips: Callable[..., Clips]) -> None:
    with pytest.raises(ValueError, match=r"no protocol 'xview' \(it has: xsub\)"):
        make_clips([4, 5]).split("xview")


def test_files_that_are_not_packed_clips(tmp_path: Path, make_clips: Callable[..., Clips]) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m a2mc_fast\.prepare"):
        Clips.load(tmp_path / "none.safetensors")
    path = tmp_path / "x.safetensors"
    make_clips([10, 20]).save(path)
    whole = path.read_bytes()
    random = np.random.default_rng(0).bytes(5000)
    for content in (b"", whole[:100], whole[:-100], random, whole[:8] + random):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.safetensors is damaged"):
            Clips.load(path)
    save_file({"joints": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a packed clips file"):
        Clips.load(path)
    save_file({"joints": torch.zeros(1)}, path, {"format": "a2mc-clips/1"})
    with pytest.raises(ValueError, match="not a complete packed clips file"):
        Clips.load(path)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"parents": (0, 0, 1, 1, 9)}, "parents must name joints 0..4"),
        ({"parents": (0, 2, 1, 1, 1)}, "contain a cycle"),
        ({"parents": (0, 1, 1, 1, 1)}, "exactly one joint must be its own parent"),
        ({"mirror": (0, 1, 3, 4, 2)}, "an involution"),
        ({"mirror": (0, 1)}, "mirror has 2 joints, parents 5"),
        ({"center": 5}, "center and axes must name joints"),
        ({"joint_names": ("a",)}, "1 joint names for 5 joints"),
    ],
    ids=str,
)
def test_impossible_skeletons(change: dict[str, object], words: str) -> None:
    fields = {name: getattr(SMALL, name) for name in ("parents", "mirror", "center", "axis_z", "axis_x")}
    with pytest.raises(ValueError) as error:
        Skeleton(**{**fields, **change})
    assert words in str(error.value)


def test_streams() -> None:
    x = torch.randn(2, 6, 3, 25, 2)
    bones = bone_stream(x, torch.tensor(NTU25.parents))
    torch.testing.assert_close(bones[:, :, :, 3], x[:, :, :, 3] - x[:, :, :, 2])  # head - neck
    assert (bones[:, :, :, 20] == 0).all() and len(NTU25.bones) == 24
    motion = motion_stream(x)
    torch.testing.assert_close(motion[:, 2], x[:, 3] - x[:, 2])
    assert (motion[:, -1] == 0).all()
