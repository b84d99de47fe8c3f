"""2-D keypoints from every reader that takes them, built-in skeletons, tables and OpenPose's folders."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from a2mc_fast.data import Clips
from a2mc_fast.data.agcn import open_agcn
from a2mc_fast.data.keypoints import BODY, as_joints
from a2mc_fast.data.normalize import OTHER_CENTRE, normalized
from a2mc_fast.data.npz import open_npz
from a2mc_fast.data.openpose import open_openpose, track
from a2mc_fast.data.pack import FILLED, Handling, collect
from a2mc_fast.data.pku import open_pku
from a2mc_fast.data.pyskl import open_pyskl
from a2mc_fast.data.skeletons import SKELETONS
from a2mc_fast.data.synthetic import synthetic_clips
from a2mc_fast.data.table import BY_ORDER, open_table
from a2mc_fast.errors import InputError
from a2mc_fast.prepare import main
from a2mc_fast.run.start import pretrain
from tests.test_normalize import full_clip
from tests.test_readers import NTU_NAMES, agcn_folders, clip_joints, own_archive, write_pku
from tests.test_train import tiny


def pixels(seed: int, frames: int, persons: int, joints: int) -> np.ndarray:
    """Keypoints [T, M, V, 2] of a picture of 1920 x 1080."""
    return full_clip(seed, frames, persons, joints)[..., :2] * np.float32(200) + np.float32([960, 540])


def own_2d(**changes: Any) -> dict[str, Any]:
    """An archive of three clips of COCO's joints, without a skeleton of its own."""
    bare = dict.fromkeys(("parents", "mirror", "center", "axis_z", "axis_x", "joint_names"))
    return own_archive(**bare, **{"joints": pixels(0, 15, 1, 17), **changes})


# -- skeletons


@pytest.mark.parametrize("name", list(SKELETONS))
def test_skeletons_are_symmetric_trees(name: str) -> None:
    skeleton = SKELETONS[
        name
    ]  # which has checked that it is a tree with one root, and the mirror an involution
    assert skeleton.num_joints == int("".join(c for c in name if c.isdigit())[-2:])
    assert len(set(skeleton.joint_names)) == skeleton.num_joints
    for joint, parent in enumerate(skeleton.parents):
        assert skeleton.mirror[parent] == skeleton.parents[skeleton.mirror[joint]]
    sides = [text.startswith(("left", "right")) for text in skeleton.joint_names]
    assert sides == [joint != other for joint, other in enumerate(skeleton.mirror)]
    assert len({*skeleton.axis_z, *skeleton.axis_x}) >= 3


def test_joints_lie_where_the_estimators_have_them() -> None:
    for name, joint, text in (
        ("coco17", 9, "left wrist"), ("coco17", 16, "right ankle"), ("openpose18", 8, "right hip"),
        ("openpose18", 14, "right eye"), ("openpose25", 8, "hip"), ("openpose25", 19, "left big toe"),
        ("halpe26", 18, "neck"), ("halpe26", 23, "right small toe"), ("h36m17", 8, "thorax"),
        ("h36m17", 14, "right shoulder"), ("mediapipe33", 10, "right mouth"),
        ("mediapipe33", 24, "right hip"),
        ("mediapipe33", 31, "left foot index"), ("hand21", 4, "thumb tip"), ("hand21", 17, "pinky mcp"),
    ):  # fmt: skip
        assert SKELETONS[name].joint_names[joint] == text


# -- keypoints


def test_keypoints_become_flat_joints_of_a_body() -> None:
    points = pixels(0, 9, 2, 17)
    points[:, 1] = (points[:, 1] - 300) * 0.5  # a smaller one behind
    confidence = np.full(points.shape[:3], 0.9)
    confidence[3, 0, 5] = 0.1
    confidence[4, 1, 6] = np.nan
    points[5, 0, 7] = np.nan
    points[6, 0] = 0
    joints = as_joints(points, confidence)
    assert joints.shape == (9, 2, 17, 3) and joints.dtype == np.float32 and not joints[..., 2].any()
    missing = np.zeros(points.shape[:3], bool)
    missing[3, 0, 5] = missing[4, 1, 6] = missing[5, 0, 7] = missing[6, 0] = True
    np.testing.assert_array_equal(~joints.any(-1), missing)
    size = np.linalg.norm(joints[:, 0].max(1) - joints[:, 0].min(1), axis=1)
    assert size[0] == pytest.approx(BODY, rel=0.4)
    whole = as_joints(pixels(0, 9, 1, 17))
    box = np.linalg.norm(whole.max(2) - whole.min(2), axis=-1)
    assert np.median(box) == pytest.approx(BODY, rel=1e-5)
    # neither the resolution nor its unit matters
    np.testing.assert_allclose(as_joints(pixels(0, 9, 1, 17) / 1920), whole, rtol=1e-4)
    with pytest.raises(InputError, match=r"no body: no frame has two joints of confidence 0\.95"):
        as_joints(points, confidence, 0.95)


def test_a_centre_that_is_never_seen_is_that_of_the_other_side() -> None:
    skeleton = SKELETONS["coco17"]
    joints = as_joints(pixels(0, 5, 1, 17))
    joints[:, 0, skeleton.center] = 0
    made = normalized(joints, skeleton)
    assert made.remarks == {OTHER_CENTRE: 5} and not made.joints[:, 0, skeleton.mirror[skeleton.center]].any()
    np.testing.assert_allclose(made.joints[:, 0, 0], joints[:, 0, 0] - joints[:, 0, 6], atol=1e-6)


# -- the clip archive


def test_archive_of_keypoints(tmp_path: Path) -> None:
    path = tmp_path / "in.npz"
    arrays = own_2d()
    np.savez(path, **arrays)
    made = collect(open_npz(path, "coco17")).clips
    assert made.skeleton == replace(SKELETONS["coco17"], rotation="none")
    assert made.lengths.tolist() == [4, 6, 5] and not made.frames[:, 2].any()
    marked = np.concatenate([arrays["joints"], np.full((15, 1, 17, 1), 0.9, np.float32)], 3)
    marked[2, 0, 9, 2] = 0.2
    np.savez(path, **own_2d(joints=marked, axes=np.array(["x", "y", "confidence"])))
    for least, missing in ((0.3, True), (0.1, False)):
        clips = collect(open_npz(path, "coco17"), Handling(confidence=least)).clips
        assert (not clips.frames[2, :, 9].any()) == missing
        rest = np.delete(np.arange(17), 9)
        np.testing.assert_allclose(clips.frames[:, :, rest], made.frames[:, :, rest], rtol=0.2, atol=0.2)
    for name, words in (
        ("", "has no parents, .*--skeleton ntu25 or coco17"),
        ("coco", "no skeleton is called"),
    ):
        with pytest.raises(InputError, match=words):
            open_npz(path, name)


def test_prepare_says_what_a_set_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "in.npz", **own_2d(split_xsub=None, split_odd=None))
    out = tmp_path / "out.safetensors"
    main(["npz", str(tmp_path / "in.npz"), str(out), "--skeleton", "coco17", "--persons", "2"])
    assert "no split says which clips are for training" in capsys.readouterr().out
    clips = Clips.load(out)
    assert clips.num_persons == 2 and not clips.frames[..., 1].any() and clips.skeleton.rotation == "none"
    assert json.loads(out.with_suffix(".report.json").read_text())["persons"] == 2


def test_flat_set_trains_from_its_file_on(tmp_path: Path) -> None:
    """Keypoints of the built-in actions, seen from the front."""
    clips = synthetic_clips(clips=120, seed=0, classes=4)
    x, _, z = clips.frames.permute(0, 3, 2, 1)[:, :1].unbind(-1)  # [F, M, V] each
    pixel = np.stack((x.numpy() * 300 + 900, 500 - z.numpy() * 300), -1)
    np.savez(
        tmp_path / "in.npz",
        joints=pixel,
        lengths=clips.lengths.numpy(),
        labels=clips.labels.numpy(),
        split_xsub=clips.splits["xsub"].numpy(),
    )
    out = tmp_path / "out.safetensors"
    main(["npz", str(tmp_path / "in.npz"), str(out), "--skeleton", "ntu25"])
    folder = pretrain(tiny(out, tmp_path / "run", epochs=1))
    result = json.loads((folder / "result.json").read_text())
    assert np.isfinite(result["loss"]) and result["knn_top1"] > 30


# -- PYSKL and MMAction2


def hrnet(scored: bool = True) -> list[dict[str, Any]]:
    """Annotations of COCO's joints in pixels."""
    annotations: list[dict[str, Any]] = []
    for number, name in enumerate("abcd"):
        clip = pixels(number, 6 + number, 1 + number % 2, 17).transpose(1, 0, 2, 3).astype(np.float16)
        annotation = {"frame_dir": name, "label": number, "keypoint": clip, "total_frames": clip.shape[1]}
        score = {"keypoint_score": np.full(clip.shape[:3], 0.9, np.float16)} if scored else {}
        annotations.append(annotation | score | {"img_shape": (1080, 1920)})
    return annotations


@pytest.mark.parametrize("protocol", [2, 5])
def test_pyskl_pickle_of_keypoints(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "hrnet.pkl"
    annotations = hrnet()
    annotations[3]["keypoint_score"][0, 2, 9] = 0.1
    content = {"annotations": annotations, "split": {"train": {"a", "b"}, "val": {"c"}, "train1": ["d"]}}
    path.write_bytes(pickle.dumps(content, protocol))
    source = open_pyskl(path)
    made = collect(source)
    clips = made.clips
    assert source.notes == (
        "2-D keypoints of 17 joints, taken for coco17; --skeleton names another skeleton",
    )
    assert clips.skeleton == replace(SKELETONS["coco17"], rotation="none") and clips.num_persons == 2
    assert {name: mask.tolist() for name, mask in clips.splits.items()} == {
        "split": [True, True, False, False],
        "split1": [False, False, False, True],
    }
    missing = ~np.any(clip_joints(made, 3), -1)
    missing[..., SKELETONS["coco17"].center] = False
    assert missing.sum() == 1
    path.write_bytes(pickle.dumps(hrnet(scored=False), protocol))
    assert collect(open_pyskl(path)).clips.splits == {}


def test_pyskl_of_joints_that_nobody_told(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    annotations = hrnet()
    annotations[0]["keypoint_score"] = annotations[0]["keypoint_score"][:, 1:]
    annotations[1]["keypoint"] = np.ones((1, 7, 17, 3), np.float32)
    path.write_bytes(pickle.dumps(annotations))
    made = collect(open_pyskl(path))
    assert [(s.name, s.reason) for s in made.skipped] == [(n, "no skeleton data") for n in "ab"]
    assert "keypoint_score is float16 [1, 5, 17]" in made.skipped[0].detail
    for annotation in annotations:
        annotation["keypoint"] = np.ones((1, 7, 17, 3), np.float32)
    path.write_bytes(pickle.dumps(annotations))
    with pytest.raises(InputError, match=r"which 17 joints \(3-D\) are these\? Tell it with --skeleton"):
        open_pyskl(path)
    assert open_pyskl(path, "h36m17").skeleton is SKELETONS["h36m17"]


# -- OpenPose


def write_openpose(folder: Path, frames: list[list[np.ndarray]]) -> Path:
    """Bodies [V, 3] of each frame."""
    folder.mkdir(parents=True)
    for number, bodies in enumerate(frames):
        people = [{"person_id": [-1], "pose_keypoints_2d": body.ravel().tolist()} for body in bodies]
        (folder / f"v_{number:012d}_keypoints.json").write_text(
            json.dumps({"version": 1.3, "people": people})
        )
    return folder


def bodies(seed: int, frames: int, shift: float = 0, joints: int = 25) -> list[np.ndarray]:
    points = pixels(seed, frames, 1, joints)[:, 0] + np.float32([shift, 0])
    return list(np.concatenate([points, np.full((frames, joints, 1), 0.8, np.float32)], 2))


def test_openpose_folders(tmp_path: Path) -> None:
    one = bodies(0, 12)
    for place in ("train/wave/a", "train/jump/b", "val/wave/a"):
        write_openpose(tmp_path / "in" / place, [[body] for body in one])
    write_openpose(tmp_path / "in" / "val" / "jump" / "lost", [[], []])
    write_openpose(tmp_path / "in" / "x" / "y" / "z", [[one[0]]])
    made = collect(open_openpose(tmp_path / "in"))
    clips = made.clips
    assert clips.names == ("train/jump/b", "train/wave/a", "val/wave/a")
    assert clips.class_names == ("jump", "wave") and clips.labels.tolist() == [0, 1, 1]
    assert clips.splits["split"].tolist() == [True, True, False] and clips.lengths.tolist() == [12] * 3
    assert clips.skeleton == replace(SKELETONS["openpose25"], rotation="none")
    expected = normalized(as_joints(np.stack(one)[:, None, :, :2]), SKELETONS["openpose25"]).joints
    np.testing.assert_allclose(clip_joints(made, 1)[:, :1], expected, atol=1e-5)
    assert [(s.name, s.reason) for s in made.skipped] == [
        ("x/y/z", "name not understood"),
        ("val/jump/lost", "no body"),
    ]
    alone = collect(open_openpose(tmp_path / "in" / "train" / "wave" / "a")).clips
    assert alone.names == ("a",) and alone.labels.tolist() == [-1] and alone.splits == {}


def test_openpose_persons_keep_their_places() -> None:
    left, right = bodies(0, 6), bodies(1, 6, shift=600)
    frames = [np.stack(pair) for pair in zip(left, right)]
    frames[1] = frames[1][::-1]
    frames[2] = frames[2][1:]
    frames[4] = frames[4][::-1]
    placed = track(frames, 25)
    assert placed.shape == (6, 2, 25, 3) and not placed[2, 0].any()
    for number in (0, 1, 3, 4, 5):
        np.testing.assert_array_equal(placed[number], [left[number], right[number]])


@pytest.mark.parametrize(
    ("text", "reason", "words"),
    [
        ("{", "unreadable", "v_000000000001_keypoints.json is not JSON"),
        ("[]", "unreadable", "no list of people"),
        ('{"people": [{"pose_keypoints_2d": ["1"]}]}', "unreadable", "a person without numbers"),
        ('{"people": [{"pose_keypoints_2d": [1, 2, 3]}]}', "wrong joint count", "1 joints, expected 25"),
    ],
)
def test_damaged_openpose_frame(tmp_path: Path, text: str, reason: str, words: str) -> None:
    folder = write_openpose(tmp_path / "in" / "a", [[body] for body in bodies(0, 3)])
    write_openpose(tmp_path / "in" / "b", [[body] for body in bodies(0, 3)])
    (folder / "v_000000000001_keypoints.json").write_text(text)
    made = collect(open_openpose(tmp_path / "in"))
    assert made.clips.names == ("b",)
    assert made.skipped[0].reason == reason and words in made.skipped[0].detail


# -- tables


def table(points: np.ndarray, names: list[str], axes: str = "x y", first: str = "") -> str:
    """Joints [L, V, C] as lines, below a header."""
    header = [f"{name}_{axis}" for name in names for axis in axes.split()]
    lines = [",".join(f"{value:.6g}" for value in row.ravel()) for row in points]
    return "\n".join([first + ",".join(header), *lines]) + "\n"


def test_table_by_the_names_of_its_joints(tmp_path: Path) -> None:
    points = pixels(0, 7, 1, 17)[:, 0]
    names = [name.replace(" ", "_").title() for name in SKELETONS["coco17"].joint_names]
    order = np.random.default_rng(0).permutation(17)
    path = tmp_path / "walk.csv"
    path.write_text(table(points[:, order], [names[joint] for joint in order]))
    made = collect(open_table(path))
    assert made.clips.names == ("walk",) and made.remarks == {} and made.clips.splits == {}
    expected = normalized(as_joints(points[:, None]), SKELETONS["coco17"]).joints
    np.testing.assert_allclose(clip_joints(made, 0)[:, :1], expected, atol=1e-4)


def test_tables_of_persons_in_3d_with_confidence(tmp_path: Path) -> None:
    clip = full_clip(0, 4, 2, 33)
    rows = np.concatenate([clip, np.full((4, 2, 33, 1), 0.9)], 3)
    rows[1, 0, 20, 3] = 0.2
    lines = ["frame;person;time;" + ";".join(f"{axis}{joint}" for joint in range(1, 34) for axis in "xyzv")]
    for frame, person in ((0, 0), (0, 1), (2, 1), (1, 0), (3, 0)):
        values = [f"{value:.7g}" for value in rows[frame, person].ravel()]
        lines.append(";".join([str(frame + 5), str(person), "now", *values]))
    (tmp_path / "in" / "train" / "sit").mkdir(parents=True)
    (tmp_path / "in" / "train" / "sit" / "one.csv").write_text("\n".join(lines))
    source = open_table(tmp_path / "in", "mediapipe33")
    made = collect(replace(source, skeleton=replace(source.skeleton, rotation="none")))
    assert made.clips.names == ("train/sit/one",) and made.clips.class_names == ("sit",)
    got = clip_joints(made, 0)
    np.testing.assert_allclose(got[0, 1], clip[0, 1] - clip[0, 0, 11], atol=1e-5)
    assert got.shape == (4, 2, 33, 3) and not got[1, 0, 20].any() and got[1, 0, 19].any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: "", "empty"),
        (lambda text: text.replace("nose_y", "nose", 1), "the first line must name columns"),
        (lambda text: text.replace("nose_x", "left eye_x", 1), "two columns give x of joint left eye"),
        (lambda text: text.rpartition(",")[0] + ",a\n", "line 8 has 'a' where a number belongs"),
        (lambda text: text.rpartition(",")[0], "line 8 has 33 values, the first line 34"),
        (lambda text: text.partition("\n")[0], "no frames"),
    ],
)
def test_damaged_table(tmp_path: Path, change: Callable[[str], str], words: str) -> None:
    whole = table(pixels(0, 7, 1, 17)[:, 0], list(SKELETONS["coco17"].joint_names))
    (tmp_path / "a.csv").write_text(whole)
    (tmp_path / "b.csv").write_text(change(whole))
    (skip,) = collect(open_table(tmp_path)).skipped
    assert skip.name == "b" and words in str(skip)


def test_tables_whose_joints_nobody_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(table(pixels(0, 7, 1, 17)[:, 0], [f"joint {i}" for i in range(17)]))
    with pytest.raises(InputError, match="its 17 joints are not named like a built-in skeleton's"):
        open_table(tmp_path)
    made = collect(open_table(tmp_path, "coco17"))
    assert made.remarks[BY_ORDER].frames == 7
    assert collect(open_table(tmp_path, "h36m17")).clips.skeleton.joint_names[0] == "hip"
    assert [s.reason for s in read_skips(tmp_path, "coco17", "frame,person\n1,1\n")] == ["unreadable"]


def read_skips(folder: Path, skeleton: str, text: str) -> Any:
    (folder / "b.csv").write_text(text)
    return collect(open_table(folder, skeleton)).skipped


# -- the other readers


def test_agcn_arrays_of_18_joints_are_keypoints(tmp_path: Path) -> None:
    folder = agcn_folders(tmp_path)[0] / "xsub"
    points = pixels(0, 30, 2, 18) / 1920 - np.float32(0.5)
    clip = np.concatenate([points, np.full((30, 2, 18, 1), 0.8, np.float32)], 3)
    clip[20:] = 0
    for part in ("train", "val"):
        np.save(folder / f"{part}_data_joint.npy", np.stack([clip.transpose(3, 0, 2, 1)] * 2))
        (folder / f"{part}_num_frame.npy").unlink()
    made = collect(open_agcn(folder))
    assert made.clips.skeleton == replace(SKELETONS["openpose18"], rotation="none")
    assert made.clips.lengths.tolist() == [20] * 4 and not made.clips.frames[:, 2].any()
    expected = normalized(as_joints(points[:20]), SKELETONS["openpose18"]).joints
    np.testing.assert_allclose(clip_joints(made, 0), expected, atol=1e-5)


def test_arrays_of_st_gcn_and_aimclr(tmp_path: Path) -> None:
    folder, clips = agcn_folders(tmp_path)
    with_names = open_agcn(folder / "xsub")
    for part in ("train", "val"):
        place = folder / "xsub" / f"{part}_data_joint.npy"
        place.rename(folder / "xsub" / f"{part}_data.npy")
    raw = collect(open_agcn(folder / "xsub"))
    expected = normalized(clips[NTU_NAMES[1]].transpose(1, 3, 2, 0), SKELETONS["ntu25"]).joints
    np.testing.assert_allclose(clip_joints(raw, 1), expected, atol=1e-5)
    for part, labels in (("train", [[1], [0]]), ("val", [[3], [2]])):
        (folder / "xsub" / f"{part}_data.npy").rename(folder / "xsub" / f"{part}_position.npy")
        (folder / "xsub" / f"{part}_label.pkl").unlink()
        np.save(folder / "xsub" / f"{part}_label.npy", np.array(labels))
    made = collect(open_agcn(folder / "xsub"))
    assert made.clips.names == ("train_00000", "train_00001", "val_00000", "val_00001")
    assert made.clips.labels.tolist() == [1, 0, 3, 2] and with_names.normalized
    np.testing.assert_array_equal(clip_joints(made, 0), clips[NTU_NAMES[1]].transpose(1, 3, 2, 0))
    with pytest.raises(InputError, match="only one can be read"):
        open_agcn(folder)


def test_pku_labels_written_as_fractions(tmp_path: Path) -> None:
    videos = {"A01N02-L": full_clip(0, 20, 2, 25)}
    # a field that is missing, two lines that became one, a digit that is none
    folder = write_pku(
        tmp_path / "pku",
        videos,
        {"A01N02-L": "8.0,1.0,12.0,2.0\n8.5,1,12,2\n3,x,1,1\n8,,1,12\n8,1,12,28,12,19,2\n8,1\u0663,19,2\n"},
    )
    path = folder / "skeleton" / "A01N02-L.txt"
    made = collect(open_pku(folder, "pku2"))
    assert made.clips.labels.tolist() == [7] and made.clips.lengths.tolist() == [11]
    assert [(s.reason, s.detail[:12]) for s in made.skipped] == [
        ("unreadable", f"label line {n}") for n in (2, 3, 4, 5, 6)
    ]
    lines = path.read_text().split("\n")
    for change, words in (
        (("0.5x", *lines[4].split(" ")[1:]), "line 5 has '0.5x'"),
        (("1", "2"), "line 5 has 2"),
    ):
        path.write_text("\n".join([*lines[:4], " ".join(change), *lines[5:]]))
        with pytest.raises(InputError, match=words):
            collect(open_pku(folder, "pku2"))


def test_a_joint_that_is_no_number_may_be_missing(tmp_path: Path) -> None:
    archive = own_archive()
    archive["joints"][1, 0, 4, 2] = np.nan
    np.savez(tmp_path / "in.npz", **archive)
    source = open_npz(tmp_path / "in.npz")
    (skip,) = collect(source).skipped
    assert str(skip) == "clip 0, not finite (frame 1, joint 4)"
    made = collect(open_npz(tmp_path / "in.npz"), Handling(nan_is_missing=True))
    assert not made.skipped and made.remarks[FILLED].clips == made.remarks[FILLED].frames == 1
    assert not clip_joints(made, 0)[1, 0, 4].any()
