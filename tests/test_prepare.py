"""`python -m a2mc_fast.prepare`: the packed file, the report beside it, the table, and what it refuses."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from a2mc_fast.data import Clips
from a2mc_fast.data.normalize import NO_CENTRE
from a2mc_fast.prepare import main
from tests.test_normalize import full_clip
from tests.test_readers import (
    NTU_NAMES,
    Malicious,
    agcn_folders,
    ctrgcn_arrays,
    own_archive,
    pyskl_content,
    write_ntu,
    write_pku,
    write_split,
)


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence with which a command ends."""
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and len(err.splitlines()) == 1, err
    return err.removeprefix("error: ").strip()


def write_example(kind: str, folder: Path) -> tuple[Path, int]:
    """A small input of a source, and how many clips it holds."""
    match kind:
        case "ntu60" | "ntu120":
            return write_ntu(
                folder / "in", {name: full_clip(i, 3, 2, 25) for i, name in enumerate(NTU_NAMES)}
            ), 4
        case "pku1" | "pku2":
            name = "0002-L" if kind == "pku1" else "A01N02-L"
            made = write_pku(folder / "in", {name: full_clip(0, 9, 2, 25)}, {name: "1,0,4,1\n3,5,9,1\n"})
            write_split(made / "cross-subject.txt", name, "0003-L")
            return made, 2
        case "agcn":
            return agcn_folders(folder)[0], 4
        case "ctrgcn":
            np.savez(folder / "NTU60_CS.npz", **ctrgcn_arrays()[0])
            return folder / "NTU60_CS.npz", 3
        case "pyskl":
            (folder / "in.pkl").write_bytes(pickle.dumps(pyskl_content()))
            return folder / "in.pkl", 4
        case _:
            np.savez(folder / "in.npz", **own_archive())
            return folder / "in.npz", 3


@pytest.mark.parametrize("kind", ["ntu60", "ntu120", "pku1", "pku2", "agcn", "ctrgcn", "pyskl", "npz"])
def test_every_source_gives_a_packed_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    source, count = write_example(kind, tmp_path)
    out = tmp_path / "new" / "out.safetensors"
    run(kind, source, out, "--workers", 1)
    clips = Clips.load(out)
    assert len(clips) == count and clips.source == kind and clips.splits
    assert clips.command == f"python -m a2mc_fast.prepare {kind} {source} {out} --workers 1"
    report = json.loads((tmp_path / "new" / "out.report.json").read_text())
    assert (report["source"], report["clips"], report["skipped"]) == (kind, count, 0)
    assert report["frames"] == int(clips.lengths.sum()) and report["classes"] == clips.num_classes
    for name, sizes in report["splits"].items():
        train, test = clips.split(name)
        assert sizes == {"train": len(train), "test": len(test)}
    printed = capsys.readouterr().out
    assert f"clips     {count}\n" in printed
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "out.report.json",
        "out.safetensors",
    ]


def test_report_names_what_was_skipped_and_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = write_example("ntu60", tmp_path)
    (folder / f"{NTU_NAMES[2]}.skeleton").write_text("3\n1\n")
    write_ntu(
        folder,
        {"S001C001P001R001A060": np.zeros((2, 1, 25, 3)), "S001C001P001R001A061": np.zeros((2, 1, 25, 3))},
    )
    listed = tmp_path / "missing.txt"
    listed.write_text(NTU_NAMES[3])
    run("ntu60", folder, tmp_path / "out.safetensors", "--exclude", listed)
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["reasons"] == {"excluded by the list": 1, "unreadable": 1, "no body": 1}
    assert {s["name"]: s["reason"] for s in report["skipped_recordings"]} == {
        NTU_NAMES[3]: "excluded by the list",
        NTU_NAMES[2]: "unreadable",
        "S001C001P001R001A060": "no body",
    }
    assert report["expected"]["clips"] == 56_578 and report["splits"]["xsub"] == {"train": 2, "test": 0}
    for sentence in (
        "ntu60: 56,880 files expected, 5 found",
        "ntu60: 56,578 clips expected, 2 found",
        "ntu60: 40,091 xsub train expected, 2 found",
        "ntu60: 18,932 xview test expected, 1 found",
    ):
        assert sentence in report["differences"]
    printed = capsys.readouterr().out
    assert "skipped   3  (excluded by the list 1, no body 1, unreadable 1)" in printed
    assert "ntu60: 56,578 clips expected, 2 found" in printed
    assert "1 files do not belong to ntu60 and were left out" in printed


def test_synthetic_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.safetensors"
    run("synthetic", out, "--clips", 90, "--seed", 3)
    clips = Clips.load(out)
    assert len(clips) == 90 and clips.source == "synthetic" and clips.command.endswith("--seed 3")
    assert json.loads((tmp_path / "out.report.json").read_text())["clips"] == 90
    assert "clips     90\n" in capsys.readouterr().out


def test_long_clips_are_cut_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = write_example("npz", tmp_path)
    run("npz", source, tmp_path / "out.safetensors", "--max-frames", 5)
    assert Clips.load(tmp_path / "out.safetensors").lengths.tolist() == [4, 5, 5]
    assert "1 clips were cut to the frame limit" in capsys.readouterr().out


def test_units_are_measured_doubted_and_scaled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metres = own_archive()
    out = tmp_path / "out.safetensors"
    for unit, factor in (("metres", 1), ("centimetres", 100), ("inches", 1 / 0.0254)):
        np.savez(tmp_path / "in.npz", **{**metres, "joints": (metres["joints"] * factor).astype(np.float32)})
        run("npz", tmp_path / "in.npz", out, "--overwrite")
        report = json.loads(out.with_suffix(".report.json").read_text())
        assert report["median_body"] == pytest.approx(1.75 * factor, rel=0.01)
        said = capsys.readouterr().out
        assert (f"{unit} would fit, --scale {1 / factor:g} makes it 1.7 m" in said) == (unit != "metres")
        assert bool(report["doubt"]) == (unit != "metres")
    pixels = metres["joints"] * 200 * (1, 0, 1)  # and a confidence, without axes
    np.savez(tmp_path / "flat.npz", **{**metres, "joints": (pixels + (0, 0.9, 0)).astype(np.float32)})
    run("npz", tmp_path / "flat.npz", out, "--overwrite")
    assert "they are flat: 2-D keypoints are joints [F, M, V, 2]" in capsys.readouterr().out
    run("npz", tmp_path / "in.npz", out, "--overwrite", "--scale", 0.0254)
    scaled = Clips.load(out)
    np.savez(tmp_path / "in.npz", **metres)
    run("npz", tmp_path / "in.npz", out, "--overwrite")
    torch.testing.assert_close(scaled.frames, Clips.load(out).frames, atol=1e-5, rtol=0)


def test_millimetres_are_refused_with_the_scale_that_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = own_archive()
    archive["joints"] = archive["joints"] * np.float32(1000)
    np.savez(tmp_path / "in.npz", **archive)
    said = refused(capsys, "npz", tmp_path / "in.npz", tmp_path / "out.safetensors")
    assert "no usable recording" in said and "--scale 0.001 makes metres of millimetres" in said
    run("npz", tmp_path / "in.npz", tmp_path / "out.safetensors", "--scale", 0.001)


def test_a_set_of_which_most_is_refused_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = own_archive()
    archive["joints"][5:, 0, 3] = np.nan  # two of three clips
    np.savez(tmp_path / "in.npz", **archive)
    out = tmp_path / "out.safetensors"
    said = refused(capsys, "npz", tmp_path / "in.npz", out)
    assert (
        "2 of 3 recordings cannot be used, such as clip 1, not finite (frame 1, joint 3)" in said
        and not out.exists()
    )
    run("npz", tmp_path / "in.npz", out, "--allow-skipped")
    assert Clips.load(out).names == ("clip 0",)


def test_rotation_and_frame_limit_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = own_archive()
    out = tmp_path / "out.safetensors"

    def packed(*flags: Any) -> Clips:
        np.savez(tmp_path / "in.npz", **archive)
        run("npz", tmp_path / "in.npz", out, "--overwrite", *flags)
        return Clips.load(out)

    turned, still = packed(), packed("--rotation", "none", "--max-frames", 5)
    assert (turned.skeleton.rotation, turned.skeleton.max_frames) == ("first frame", 300)
    assert (still.skeleton.rotation, still.skeleton.max_frames) == ("none", 5)
    assert json.loads(out.with_suffix(".report.json").read_text())["rotation"] == "none"
    assert not torch.allclose(turned.frames[:4], still.frames[:4])
    archive["joints"][..., 2] = 0
    flat = packed()
    assert flat.skeleton.rotation == "none" and not flat.frames[:, 2].any()


def test_frames_without_a_centre_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = own_archive()
    archive["joints"][[1, 2, 7], 0, 2] = 0
    np.savez(tmp_path / "in.npz", **archive)
    out = tmp_path / "out.safetensors"
    run("npz", tmp_path / "in.npz", out)
    assert json.loads(out.with_suffix(".report.json").read_text())["remarks"] == {
        NO_CENTRE: {"clips": 2, "frames": 3}
    }
    assert f"2 clips, 3 frames: {NO_CENTRE}" in capsys.readouterr().out
    assert float(Clips.load(out).frames.abs().max()) < 2.5


def test_a_large_label_among_few_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counts per pair of classes would take 34 GB."""
    np.savez(tmp_path / "in.npz", **own_archive(labels=np.array([0, 1, 65_535]), class_names=None))
    run("npz", tmp_path / "in.npz", tmp_path / "out.safetensors")
    skipped = json.loads((tmp_path / "out.report.json").read_text())["skipped_recordings"]
    assert skipped == [
        {"name": "clip 2", "reason": "label out of range", "detail": "expected 0 to 1,999, or -1 if unknown"}
    ]


def test_existing_output_is_kept_unless_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = write_example("npz", tmp_path)
    out = tmp_path / "out.safetensors"
    out.write_text("precious")
    assert "--overwrite" in refused(capsys, "npz", source, out)
    assert out.read_text() == "precious"
    # not even then, when the input is no good
    (tmp_path / "bad.npz").write_bytes(b"PK")
    refused(capsys, "npz", tmp_path / "bad.npz", out, "--overwrite")
    assert out.read_text() == "precious"
    run("npz", source, out, "--overwrite")
    assert len(Clips.load(out)) == 3
    capsys.readouterr()
    assert "must end in .safetensors" in refused(capsys, "npz", source, source, "--overwrite")
    assert "is a folder" in refused(capsys, "npz", source, tmp_path)


@pytest.mark.parametrize("kind", ["ntu60", "ntu120", "pku1", "pku2", "agcn", "ctrgcn", "pyskl", "npz"])
def test_missing_or_foreign_input_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    out = tmp_path / "out" / "out.safetensors"
    noise = tmp_path / "noise"
    noise.write_bytes(np.random.default_rng(0).bytes(4000))
    (tmp_path / "empty").mkdir()
    assert "does not exist" in refused(capsys, kind, tmp_path / "nothing", out)
    for wrong in (noise, tmp_path / "empty"):
        assert str(wrong) in refused(capsys, kind, wrong, out)
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--workers", -1), "workers must be in [0, 1000], got -1"),
        (("--max-frames", 0), "max_frames must be in [1, 1e6], got 0"),
        (("--persons", 65), "persons must be in [0, 64], got 65"),
        (("--scale", "nan"), "scale must be in [1e-9, 1e9], got nan"),
        (("--confidence", 1.5), "confidence must be in [0, 1], got 1.5"),
    ],
)
def test_flags_out_of_range(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[Any, ...], sentence: str
) -> None:
    source, _ = write_example("npz", tmp_path)
    assert sentence in refused(capsys, "npz", source, tmp_path / "out.safetensors", *flags)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("npz", "a", "b", "--exclude", "c"), "--exclude"),
        (("xlsx", "a", "b"), "xlsx"),
        (("npz", "a"), "required"),
    ],
)
def test_unknown_flags_and_sources(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and words in out + err


def test_malicious_pickle_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flag = tmp_path / "ran"
    (tmp_path / "in.pkl").write_bytes(
        pickle.dumps({"annotations": Malicious(exec, f"open({str(flag)!r}, 'w')")})
    )
    assert "asks for builtins.exec" in refused(
        capsys, "pyskl", tmp_path / "in.pkl", tmp_path / "out.safetensors"
    )
    folder, _ = agcn_folders(tmp_path)
    (folder / "xsub" / "val_label.pkl").write_bytes(
        pickle.dumps(Malicious(exec, f"open({str(flag)!r}, 'w')"))
    )
    refused(capsys, "agcn", folder / "xsub", tmp_path / "out.safetensors")
    assert not flag.exists()


def test_as_a_process(tmp_path: Path) -> None:
    """Several workers, standard error and exit codes as a shell sees them."""
    folder, _ = write_example("ntu60", tmp_path)
    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-m", "a2mc_fast.prepare", "ntu60", str(folder), str(out), "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and done.stdout.startswith("clips     4\n")
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"error: {out} exists; replace it with --overwrite\n"


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys\nfrom a2mc_fast.prepare import main\n"
        "try:\n    main(['ntu60', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--exclude" in done.stdout


def test_test_clips_that_are_training_clips_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = own_archive()
    clip = content["joints"][: content["lengths"][0]]
    other = clip.copy()
    other[0, 0, 0, 0] += 0.01
    content["joints"] = np.concatenate([clip, clip, other])
    content["lengths"] = np.array([len(clip)] * 3)
    for name in [name for name in content if name.startswith("split_")]:
        del content[name]
    content |= {"split_a": np.array([True, False, False]), "split_b": np.array([True, True, False])}
    np.savez(tmp_path / "in.npz", **content)
    run("npz", tmp_path / "in.npz", tmp_path / "out.safetensors")
    assert json.loads((tmp_path / "out.report.json").read_text())["repeated"] == {"a": 1}
    said = capsys.readouterr().out
    assert "a: 1 of 2 test clips equal a training clip, bit for bit" in said and "b: 0" not in said
