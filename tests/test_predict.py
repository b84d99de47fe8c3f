"""Classes of clips and recordings by the classifiers that linear evaluation and fine-tuning leave behind."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import a2mc_fast
from a2mc_fast.data import Clips
from a2mc_fast.data.keypoints import as_joints
from a2mc_fast.evaluate import main as evaluate
from a2mc_fast.evaluation.inference import embed_clips, load_classifier
from a2mc_fast.evaluation.prediction import windows
from a2mc_fast.evaluation.scores import Scores
from a2mc_fast.predict import main
from a2mc_fast.prepare import main as prepare
from a2mc_fast.run.start import pretrain
from tests.conftest import CLASSES, SMALL, write_archive
from tests.test_evaluate import SHORT, tiny_config
from tests.test_train import refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """raw.npz, packed as data.safetensors, a run on it, and the classifiers of linear and finetune."""
    folder = tmp_path_factory.mktemp("predict")
    write_archive(folder / "raw.npz")
    prepare(["npz", str(folder / "raw.npz"), str(folder / "data.safetensors"), "--workers", "1"])
    pretrain(tiny_config(folder / "data.safetensors", folder / "run"))
    for protocol in ("linear", "finetune"):
        evaluate([protocol, str(folder / "run"), *SHORT])
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def recording(folder: Path, clip: int) -> np.ndarray:
    raw = np.load(folder / "raw.npz")
    end = raw["lengths"].cumsum()
    return raw["joints"][end[clip] - raw["lengths"][clip] : end[clip]]


@pytest.mark.parametrize("protocol", ["linear", "finetune"])
def test_packed_clips_get_the_scores_of_the_evaluation(
    folder: Path, tmp_path: Path, protocol: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [str(folder / "run"), str(folder / "data.safetensors"), "--protocol", protocol, "--top", "9"]
    main([*args, str(tmp_path / "a.csv")])
    said = capsys.readouterr().out
    scores, found = Scores.load(folder / "run" / f"{protocol}.scores.safetensors"), rows(tmp_path / "a.csv")
    assert len(found) == 40
    for clip, probability in zip(scores.clips.tolist(), scores.scores.softmax(1)):
        row = found[clip]
        assert row["label"] == CLASSES[clip % 4]
        listed = {row[f"class_{rank}"]: float(row[f"probability_{rank}"]) for rank in (1, 2, 3, 4)}
        assert [listed[name] for name in CLASSES] == pytest.approx(probability.tolist(), abs=1e-4)
        assert list(listed.values()) == sorted(listed.values(), reverse=True)
    right = sum(row["class_1"] == row["label"] for row in found)
    assert f"40 clips, 0 skipped, top-1 {100 * right / 40:.2f} % of 40 with a label" in said


def test_a_tuned_encoder_is_that_of_the_file(folder: Path) -> None:
    """Any command takes the file for a checkpoint."""
    clips = Clips.load(folder / "data.safetensors")
    tuned = a2mc_fast.load_encoder(folder / "run" / "finetune.classifier.safetensors")
    features = [embed_clips(encoder, clips) for encoder in (tuned, a2mc_fast.load_encoder(folder / "run"))]
    assert not torch.allclose(*features)
    classifier = load_classifier(folder / "run", "finetune")
    torch.testing.assert_close(embed_clips(classifier.encoder, clips), features[0])
    x = torch.randn(3, 3, classifier.encoder.frames, SMALL.num_joints, 2)
    torch.testing.assert_close(classifier(x), classifier.linear(tuned(x)))


def test_recordings_are_classified_as_prepared_clips_are(folder: Path, tmp_path: Path) -> None:
    run = str(folder / "run")
    main([run, str(folder / "data.safetensors"), str(tmp_path / "packed.json")])
    main([run, str(folder / "raw.npz"), str(tmp_path / "archive.json")])
    packed, archive = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("packed", "archive"))
    assert [row["label"] for row in archive] == [row["label"] for row in packed]
    for a, b in zip(archive, packed, strict=True):
        assert a["classes"] == pytest.approx(b["classes"], abs=1e-5)
    (tmp_path / "many").mkdir()
    np.savez(tmp_path / "many" / "b.npz", joints=recording(folder, 5))
    np.save(tmp_path / "many" / "a.npy", recording(folder, 7))
    main([run, str(tmp_path / "many"), str(tmp_path / "many.json")])
    found = json.loads((tmp_path / "many.json").read_text())
    assert [(row["name"], row["label"]) for row in found] == [("a", ""), ("b", "")]
    for row, clip in zip(found, (7, 5)):
        assert row["classes"] == pytest.approx(archive[clip]["classes"], abs=1e-5)
    classifier = a2mc_fast.load_classifier(run)
    for joints in (recording(folder, 7), torch.tensor(recording(folder, 7))):
        said = a2mc_fast.classify_recording(classifier, joints, top=2)
        assert said == [(name, pytest.approx(p, abs=1e-5)) for name, p in [*found[0]["classes"].items()][:2]]


def test_recordings_in_another_unit_are_doubted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for factor in (0.5, 50):  # random bodies of four metres
        np.save(tmp_path / "a.npy", recording(folder, 7) * factor)
        main([str(folder / "run"), str(tmp_path / "a.npy"), str(tmp_path / "a.csv")])
        said = capsys.readouterr().err
        assert ("centimetres would fit, times 0.01 makes it" in said) == (factor == 50), said


def test_a_window_slides_over_long_recordings(folder: Path, tmp_path: Path) -> None:
    long = np.concatenate([recording(folder, clip) for clip in range(4)])
    long[48:72] = 0  # nobody is there
    np.save(tmp_path / "long.npy", long)
    run = str(folder / "run")
    main([run, str(tmp_path / "long.npy"), str(tmp_path / "w.csv"), "--window", "24"])
    found, classifier = rows(tmp_path / "w.csv"), a2mc_fast.load_classifier(run)
    spans = [(int(row["start"]), int(row["stop"])) for row in found]
    assert spans == [span for span in windows(len(long), 24) if span != (48, 72)]
    for row, (start, stop) in zip(found, spans):
        ((name, probability),) = a2mc_fast.classify_recording(classifier, long[start:stop], top=1)
        assert row["class_1"] == name and float(row["probability_1"]) == pytest.approx(probability, abs=1e-4)


def _predicted(run: Path, data: Path, out: Path) -> list[dict[str, str]]:
    main([str(run), str(data), str(out)])
    return rows(out)


def test_keypoints_are_scaled_as_prepared_ones_are(folder: Path, tmp_path: Path) -> None:
    points = 300 + 100 * recording(folder, 3)[..., :2]
    sure = np.ones((*points.shape[:3], 1), np.float32)
    sure[4, 1, 2] = 0.1
    missing = np.where(sure < 0.3, 0, points)
    np.savez(tmp_path / "a.npz", joints=missing)
    np.savez(tmp_path / "b.npz", joints=np.concatenate((points, sure), 3), axes=["x", "y", "confidence"])
    never_turned, run = tmp_path / "packed.safetensors", tmp_path / "run"
    prepare(["npz", str(folder / "raw.npz"), str(never_turned), "--workers", "1", "--rotation", "none"])
    pretrain(tiny_config(never_turned, run))
    evaluate(["linear", str(run), *SHORT])
    files = tmp_path / "a.npz", tmp_path / "b.npz"
    a, b = (row for file in files for row in _predicted(run, file, tmp_path / "k.csv"))
    assert {**a, "name": ""} == {**b, "name": ""}
    said = a2mc_fast.classify_recording(a2mc_fast.load_classifier(run), as_joints(missing), top=1)
    assert said == [(a["class_1"], pytest.approx(float(a["probability_1"]), abs=1e-4))]


@pytest.mark.parametrize(
    ("frames", "window", "stride", "expected"),
    [
        (10, 4, 0, [(0, 4), (2, 6), (4, 8), (6, 10)]),
        (9, 4, 0, [(0, 4), (2, 6), (4, 8), (5, 9)]),
        (9, 4, 9, [(0, 4), (5, 9)]),
        (4, 4, 1, [(0, 4)]),
        (3, 4, 0, [(0, 3)]),
        (3, 1, 0, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_windows_cover_a_recording(
    frames: int, window: int, stride: int, expected: list[tuple[int, int]]
) -> None:
    assert windows(frames, window, stride) == expected


def test_many_that_are_left_out_are_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(22):
        (tmp_path / f"{number:02d}.npz").write_bytes(b"no")
    np.save(tmp_path / "z.npy", recording(folder, 3))
    assert len(_predicted(folder / "run", tmp_path, tmp_path / "m.csv")) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped ")]
    assert len(told) == 21 and "19.npz" in told[19] and told[20] == "skipped 2 more"


def test_bad_input_is_one_sentence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(folder / "run"), str(tmp_path / "o.csv")
    np.save(tmp_path / "wide.npy", np.ones((9, 2, 7, 3), np.float32))
    (tmp_path / "broken.npz").write_bytes(b"no")
    (tmp_path / "empty").mkdir()
    points = {"joints": np.ones((9, 2, 5, 3), np.float32), "axes": ["x", "y", "confidence"]}
    points["joints"][..., 0, 0] = 2
    np.savez(tmp_path / "plane.npz", joints=points["joints"][..., :2])
    np.savez(tmp_path / "sure.npz", **points)
    np.savez(tmp_path / "sum.npz", joints=np.ones((9, 2, 5, 3), np.float32), lengths=np.array([4, 4]))
    for args, words in (
        ([run, str(tmp_path / "wide.npy"), out], "a recording is joints [T, M, 5, 3], got [9, 2, 7, 3]"),
        ([run, str(tmp_path / "plane.npz"), out], "lies in a plane, and the encoder knows joints in space"),
        ([run, str(tmp_path / "sure.npz"), out], "lies in a plane, and the encoder knows joints in space"),
        ([run, str(tmp_path / "broken.npz"), out], "is damaged or not a .npz file"),
        ([run, str(tmp_path / "empty"), out], "holds no .npz or .npy file"),
        ([run, str(tmp_path / "sum.npz"), out], "lengths sum to 8, joints holds 9 frames"),
        ([run, run + "/config.json", out], "give packed clips (.safetensors), a recording"),
        ([run, "x", out, "--protocol", "transfer"], "make it with: python -m a2mc_fast.evaluate transfer"),
        ([run + "/checkpoint.safetensors", "x", out], "holds no classifier of 0 classes"),
        ([run, "x", out, "--window", "301"], "were cut to 300 frames"),
        ([run, str(tmp_path), out], f"nothing in {tmp_path} can be used"),
    ):
        error = refused(main, args, capsys).splitlines()
        assert words in error[0] and len(error) == 1, error
    assert not Path(out).exists()
    for args, words in (
        ([run, "x", "o.txt"], "OUT must be a .csv or .json file"),
        ([run, "x", out, "--stride", "2"], "stride needs window"),
    ):
        assert words in " ".join(refused(main, args, capsys).replace("│", " ").split())
