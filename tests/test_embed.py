"""Use of a trained encoder: features of a data set and of one recording, and the exported program."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import a2mc_fast
from a2mc_fast.augment import Views
from a2mc_fast.data import Clips
from a2mc_fast.data.normalize import normalized
from a2mc_fast.embed import main
from a2mc_fast.errors import InputError
from a2mc_fast.evaluation.embedding import FORMAT
from a2mc_fast.evaluation.inference import embed_clips, embed_recording, load_encoder
from a2mc_fast.evaluation.program import Program
from a2mc_fast.evaluation.protocols import encode
from a2mc_fast.files import sha256
from a2mc_fast.prepare import main as prepare
from a2mc_fast.run import checkpoint
from a2mc_fast.run.start import pretrain
from a2mc_fast.skeleton import motion_stream
from tests.conftest import SMALL, write_archive
from tests.test_evaluate import tiny_config
from tests.test_train import refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings raw.npz, packed as data.safetensors, and the run that was trained on them."""
    folder = tmp_path_factory.mktemp("embed")
    write_archive(folder / "raw.npz")
    prepare(["npz", str(folder / "raw.npz"), str(folder / "data.safetensors"), "--max-frames", "60"])
    pretrain(tiny_config(folder / "data.safetensors", folder / "run", stream="motion"))
    return folder


@pytest.mark.parametrize("untrained", [False, True])
def test_features_of_every_clip(folder: Path, tmp_path: Path, untrained: bool) -> None:
    out = tmp_path / "features.safetensors"
    data = folder / "data.safetensors"
    main([str(folder / "run"), str(data), str(out), *(["--untrained"] if untrained else [])])
    tensors, clips = load_file(out), Clips.load(data)
    loaded = checkpoint.load(folder / "run")
    branch = loaded.branch(untrained=untrained)
    expected = encode(branch, Views(clips, loaded.config.views, 0), torch.arange(40))
    assert torch.equal(tensors["features"], expected) and tensors["features"].dtype == torch.float32
    assert torch.equal(tensors["labels"], clips.labels)
    assert torch.equal(tensors["split_xsub"], clips.splits["xsub"])
    with safe_open(out, "pt") as file:
        header = file.metadata()
    assert header["format"] == FORMAT and json.loads(header["class_names"]) == [
        "sit",
        "stand",
        "wave",
        "jump",
    ]
    assert json.loads(header["names"]) == list(clips.names)
    about = json.loads(header["about"])
    assert about["steps"] == (0 if untrained else loaded.step) and about["stream"] == "motion"
    assert about["checkpoint_sha256"] == sha256(folder / "run" / "checkpoint.safetensors")


def test_the_suffix_says_the_format(folder: Path, tmp_path: Path) -> None:
    for suffix in ("safetensors", "npz", "npy", "csv"):
        main([str(folder / "run"), str(tmp_path / f"f.{suffix}")])
    tensors, arrays = load_file(tmp_path / "f.safetensors"), np.load(tmp_path / "f.npz")
    features = tensors["features"].numpy()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(arrays[name], tensor)
    assert arrays["names"].tolist()[7] == "clip 7" and arrays["class_names"][2] == "wave"
    assert json.loads(str(arrays["about"]))["stream"] == "motion"
    np.testing.assert_array_equal(np.load(tmp_path / "f.npy"), features)
    with (tmp_path / "f.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [f"f{i}" for i in range(features.shape[1])]
    np.testing.assert_array_equal(np.array([[r[c] for c in columns] for r in rows], np.float32), features)
    assert [rows[13][name] for name in ("name", "label", "class")] == ["clip 13", "1", "stand"]
    assert [row["split_xsub"] for row in rows] == [str(int(value)) for value in tensors["split_xsub"]]


def test_what_onnx_needs_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        error = refused(main, [str(folder / "run"), "--export", str(tmp_path / "e.onnx")], capsys)
    assert "pip install 'a2mc_fast[onnx]'" in error and error.startswith("error: ")


def test_data_is_that_of_the_run_unless_given(folder: Path, tmp_path: Path) -> None:
    main([str(folder / "run"), str(tmp_path / "a.safetensors")])
    main([str(folder / "run"), str(folder / "data.safetensors"), str(tmp_path / "b.safetensors")])
    a, b = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_loading_takes_three_lines(folder: Path) -> None:
    """In eval mode, with the stream inside, the same for any batch."""
    encoder = a2mc_fast.load_encoder(folder / "run")
    x = torch.randn(6, 3, encoder.frames, SMALL.num_joints, 2)
    features = encoder(x)
    assert features.shape == (6, encoder.feature_dim) and features.dtype == torch.float32
    assert not encoder.training and not features.requires_grad
    branch = checkpoint.load(folder / "run").branch().eval()
    made = branch.encoder(motion_stream(x.transpose(1, 2)))
    torch.testing.assert_close(features, branch.normed(made))
    torch.testing.assert_close(encoder(x[2:3]), features[2:3])
    assert not any("head" in name for name in encoder.state_dict())
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        a2mc_fast.nothing  # noqa: B018


def test_the_package_itself_stays_without_torch() -> None:
    code = "import sys, a2mc_fast; assert 'torch' not in sys.modules; a2mc_fast.load_encoder; import torch"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_recording_is_cut_as_the_training_clips_were(folder: Path) -> None:
    encoder = load_encoder(folder / "run")
    joints = np.random.default_rng(0).standard_normal((100, 2, 5, 3), np.float32)
    feature = embed_recording(encoder, joints)
    torch.testing.assert_close(feature, embed_recording(encoder, joints[:60]))
    assert not torch.allclose(feature, embed_recording(encoder, joints[:59]))


def test_a_recording_is_embedded_as_prepare_would(folder: Path) -> None:
    encoder = load_encoder(folder / "run")
    raw = np.load(folder / "raw.npz")
    clips = Clips.load(folder / "data.safetensors")
    expected = embed_clips(encoder, clips)
    ends = np.cumsum(raw["lengths"])
    for clip in (0, 17):
        joints = raw["joints"][ends[clip] - raw["lengths"][clip] : ends[clip]]
        torch.testing.assert_close(embed_recording(encoder, joints), expected[clip])
        packed = clips.frames[ends[clip] - raw["lengths"][clip] : ends[clip]].permute(0, 3, 2, 1)
        torch.testing.assert_close(embed_recording(encoder, packed, normalize=False), expected[clip])
        torch.testing.assert_close(embed_recording(encoder, torch.tensor(joints)), expected[clip])


def test_a_recording_is_cut_and_turned_as_the_data_were(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.safetensors"
    prepare(["npz", str(folder / "raw.npz"), str(data), "--rotation", "none", "--max-frames", "22"])
    pretrain(tiny_config(data, tmp_path / "run"))
    encoder, raw, clips = load_encoder(tmp_path / "run"), np.load(folder / "raw.npz"), Clips.load(data)
    assert encoder.skeleton == clips.skeleton and int(clips.lengths.max()) == 22
    clip = int(raw["lengths"].argmax())
    end = int(raw["lengths"].cumsum()[clip])
    joints = raw["joints"][end - raw["lengths"][clip] : end]
    torch.testing.assert_close(embed_recording(encoder, joints), embed_clips(encoder, clips)[clip])


def test_persons_are_chosen_or_absent(folder: Path) -> None:
    encoder = load_encoder(folder / "run")
    joints = np.random.default_rng(1).standard_normal((30, 2, SMALL.num_joints, 3)).astype(np.float32)
    joints[:, 0] *= 3  # spreads most, so it is person 0 either way
    still = np.full((30, 1, SMALL.num_joints, 3), 0.5, np.float32)
    both = embed_recording(encoder, joints)
    torch.testing.assert_close(embed_recording(encoder, np.concatenate((still, joints), 1)), both)
    absent = np.concatenate((joints[:, :1], np.zeros_like(still)), 1)
    torch.testing.assert_close(embed_recording(encoder, joints[:, :1]), embed_recording(encoder, absent))
    assert not torch.allclose(embed_recording(encoder, absent), both)


@pytest.mark.parametrize(
    ("shape", "value", "words"),
    [
        ((10, 2, 4, 3), 1.0, r"a recording is joints \[T, M, 5, 3\], got \[10, 2, 4, 3\]"),
        ((10, 5, 3), 1.0, r"got \[10, 5, 3\]"),
        ((0, 2, 5, 3), 1.0, "the recording is empty"),
        ((10, 2, 5, 3), float("nan"), "not finite"),
        ((10, 2, 5, 3), 0.0, "no body"),
    ],
)
def test_bad_recordings_are_refused(folder: Path, shape: tuple[int, ...], value: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        embed_recording(load_encoder(folder / "run"), np.full(shape, value, np.float32))


def corrupted(generator: np.random.Generator) -> np.ndarray:
    """A recording of 1 to 40 frames with a few of the things that happen: joints, frames and persons that are
    missing, coordinates counted from a joint, flat ones."""
    frames = int(generator.integers(2, 40))
    joints = generator.standard_normal((frames, 2, SMALL.num_joints, 3)).astype(np.float32)
    happens = generator.random(8) < 0.3
    if happens[0]:
        joints -= joints[:, :1, generator.integers(SMALL.num_joints), None]
    if happens[1]:
        joints[..., 2] = 0
    if happens[2]:
        joints[: generator.integers(1, frames), 0] = 0
    if happens[3]:
        joints[generator.integers(1, frames) :, 1] = 0
    if happens[4]:
        joints[:, 1] = 0
    if happens[5]:
        joints[generator.random(joints.shape[:3]) < 0.2] = 0
    if happens[6]:
        joints[0, 0, generator.integers(SMALL.num_joints)] = 0
    if happens[7]:
        joints[:, :, generator.integers(SMALL.num_joints)] = 0
    return joints


def test_a_program_normalises_as_prepare_does(folder: Path) -> None:
    encoder, generator, refused = load_encoder(folder / "run"), np.random.default_rng(0), 0
    for rotation, most, center in (("first frame", 300, 1), ("first frame", 9, 3), ("none", 300, 3)):
        skeleton = replace(SMALL, rotation=rotation, max_frames=most, center=center)
        encoder.skeleton = skeleton
        program = Program(encoder)
        for _ in range(100):
            joints = corrupted(generator)
            try:
                expected = normalized(joints, skeleton).joints
            except InputError:  # no centre, no axes
                refused += 1
                continue
            steps = torch.arange(len(joints))
            got = program._normalized(torch.from_numpy(joints), steps, steps < most)[: len(expected)]
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    assert refused < 100


def test_the_exported_program_gives_equal_features(folder: Path, tmp_path: Path) -> None:
    """Of recordings as they come, of any length."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        main([str(folder / "run"), "--export", str(tmp_path / "encoder.pt2")])
    extra = {"a2mc.json": ""}
    program = torch.export.load(tmp_path / "encoder.pt2", extra_files=extra).module()
    about, encoder = json.loads(extra["a2mc.json"]), load_encoder(folder / "run")
    assert about["shape"] == ["T", 2, 5, 3] and about["stream"] == "motion"
    for frames in (2, 33, 350):
        joints = torch.randn(frames, 2, 5, 3) + torch.tensor([0.0, 1, 3])
        torch.testing.assert_close(program(joints), embed_recording(encoder, joints), rtol=0, atol=1e-5)


def test_bad_input_is_one_sentence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(folder / "run")
    out = str(tmp_path / "f.safetensors")
    from tests.test_protocols import class_clips

    class_clips().save(tmp_path / "one.safetensors")
    clips = (tmp_path / "one.safetensors").read_bytes()
    for args, words in (
        ([run, str(tmp_path / "one.safetensors"), out], "has 5 joints and 1 persons"),
        ([run, str(tmp_path / "none.safetensors"), out], "or make it with"),
        ([str(tmp_path), str(folder / "data.safetensors"), out], "is this the folder of a run"),
        # an OUT that was forgotten
        ([run, str(tmp_path / "one.safetensors")], "one.safetensors holds a2mc-clips/1, not features"),
    ):
        error = refused(main, args, capsys)
        assert words in error and error.count("\n") == 1, error
    for args in ([run], [run, "a", "b", "c"], [run, out, "--export", "x.pt2"]):
        said = " ".join(refused(main, args, capsys).replace("│", " ").split())
        assert "give RUN [DATA] OUT.safetensors for features" in said
    for args in ([run, "f.txt"], [run, "--export", "e.pth"]):
        assert "the suffix must be" in " ".join(refused(main, args, capsys).replace("│", " ").split())
    assert not Path(out).exists() and (tmp_path / "one.safetensors").read_bytes() == clips
