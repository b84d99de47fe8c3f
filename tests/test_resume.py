"""Nothing is lost: killed and resumed runs end with the same bits, and damage, full disks and faults are met
with one sentence and the last good checkpoint."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from a2mc_fast.data import Clips
from a2mc_fast.errors import InputError
from a2mc_fast.evaluate import main as evaluate
from a2mc_fast.files import read_tensors, write_json
from a2mc_fast.run import checkpoint, machine, saver, snapshot, weights
from a2mc_fast.run import log as runlog
from a2mc_fast.run.checkpoint import FILE, load, numbered
from a2mc_fast.run.folder import open_folder
from a2mc_fast.run.log import RunLog
from a2mc_fast.run.saver import Saver
from a2mc_fast.run.start import pretrain
from a2mc_fast.skeleton import NTU25
from a2mc_fast.train import main
from a2mc_fast.trainer import Trainer
from tests.processes import assert_same_end, run, start, wait_for
from tests.test_train import tiny

# 27 steps, an epoch of four
FLAGS = [
    "--views.frames", "8", "--encoder.hidden", "8", "--encoder.projection", "16",
    "--bank.size", "40", "--bank.warmup-steps", "3",
    "--optim.epochs", "6", "--optim.milestones", "2", "4", "--optim.batch-size", "8", "--optim.lr", "0.05",
    "--run.log-every", "2", "--run.eval-every", "2",
]  # fmt: skip
STEPS = 27


def flags(data: Path, out: Path, *more: str) -> list[str]:
    return ["demo", "--data", str(data), "--run.out", str(out), *FLAGS, *more]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty random clips, of which 32 train."""
    generator = np.random.default_rng(0)
    lengths = list(range(10, 50))
    joints = generator.standard_normal((sum(lengths), 2, 25, 3), np.float32)
    split = np.arange(40) // 4 % 5 != 4
    path = tmp_path_factory.mktemp("data") / "clips.safetensors"
    Clips.pack(joints, lengths, np.arange(40) % 4, NTU25, splits={"xsub": split}).save(path)
    return path


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, said = run(flags(data, folder), folder.parent / "said")
    assert code == 0, said
    return folder


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    folder = tmp_path / "run"
    folder.mkdir()
    for path in whole.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


# killed


def test_twenty_kills_at_random_moments_change_nothing(data: Path, whole: Path, tmp_path: Path) -> None:
    """SIGKILL again and again, each time resumed, until twenty have hit a run at work."""
    begun = time.perf_counter()
    assert run(flags(data, tmp_path / "first"), tmp_path / "said")[0] == 0
    length = time.perf_counter() - begun
    moments, kills, number = random.Random(0), 0, 0
    while kills < 20:
        folder, number, code = tmp_path / f"run{number}", number + 1, -1
        latest = length / 2
        while code != 0:
            resume = ["--resume"] if (folder / "config.json").exists() else []
            process = start(flags(data, folder, *resume), tmp_path / "said")
            process.join(moments.uniform(0, latest))
            process.kill()
            process.join()
            code = process.exitcode
            assert code in (0, -signal.SIGKILL), (tmp_path / "said").read_text()
            kills += code != 0
            latest *= 1.1  # so that it ends on a machine that has become slower, too
        assert_same_end(whole, folder)


@pytest.mark.parametrize(
    "moment, count",
    [
        ("config written", 1),
        ("in a metrics line", 1),
        ("in a metrics line", 9),
        ("before a save", 1),
        ("before a save", 4),
        ("in a save", 1),
        ("in a save", 3),
        ("in a save", 7),
        ("between link and rename", 3),
        ("between rename and pruning", 3),
        ("before the result", 1),
    ],
)
def test_a_kill_at_the_worst_moment_changes_nothing(
    data: Path, whole: Path, tmp_path: Path, moment: str, count: int
) -> None:
    folder = tmp_path / "run"
    code, said = run(flags(data, folder), tmp_path / "said", moment, count)
    assert code == -signal.SIGKILL, said
    code, said = run(flags(data, folder, "--resume"), tmp_path / "said")
    assert code == 0 and ": using " not in said, said  # the newest was whole
    assert_same_end(whole, folder)


# stopped


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_saves_where_it_is(
    data: Path, whole: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """In the middle of an epoch, twice; what was not saved by the epoch is saved by the signal."""
    folder = tmp_path / "run"
    for lines, resume in ((3, []), (9, ["--resume"])):
        # no checkpoint but the last and the signal's
        args = flags(data, folder, "--run.checkpoint-every", "100", *resume)
        process = start(args, tmp_path / "said")
        wait_for(folder / "metrics.jsonl", lines)
        os.kill(process.pid or 0, number)
        process.join(30)
        said = (tmp_path / "said").read_text()
        assert process.exitcode == code, said
        assert (
            f"{number.name}: finishing this step and saving" in said
            and f"a2mc_fast.train --resume {folder}\n" in said
        )
        step = load(folder).step
        assert f"stopped after step {step} of {STEPS}" in said and 2 <= step < STEPS
    code, said = run(flags(data, folder, "--resume"), tmp_path / "said")
    assert code == 0 and f"resumed after step {step}" in said
    assert_same_end(whole, folder)


@pytest.mark.parametrize("number, code, full", [(signal.SIGINT, 130, 0), (signal.SIGTERM, 143, 1)])
def test_a_run_that_nobody_reads_stops_saves_and_goes_on(
    data: Path, whole: Path, tmp_path: Path, number: signal.Signals, code: int, full: int
) -> None:
    """As when Ctrl-C ends the `tee` behind it, too; nor does a damaged checkpoint need anybody to be told."""
    folder = tmp_path / "run"
    process = start(flags(data, folder), tmp_path / "said", "nobody reads", full)
    wait_for(folder / "metrics.jsonl", 9)
    os.kill(process.pid or 0, number)
    process.join(30)
    assert process.exitcode == code and load(folder).step >= 12
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-1])
    code, _ = run(["--resume", str(folder)], tmp_path / "said", "nobody reads", full)
    assert code == 0
    assert_same_end(whole, folder)


def test_a_second_ctrl_c_quits_at_once(data: Path, tmp_path: Path) -> None:
    process = start(flags(data, tmp_path / "run"), tmp_path / "said", "slow step", 5)
    wait_for(tmp_path / "run/metrics.jsonl", 3)
    os.kill(process.pid or 0, signal.SIGINT)
    process.join(0.5)
    assert process.exitcode is None  # it waits for the step, which takes a minute
    os.kill(process.pid or 0, signal.SIGINT)
    process.join(5)
    assert process.exitcode == -signal.SIGINT


def test_a_finished_run_stays_as_it_is(
    data: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    main(flags(data, finished, "--resume"))
    assert f"{finished} is finished after {STEPS} steps: nothing to resume" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_one_process_at_a_time(data: Path, tmp_path: Path) -> None:
    config = tiny(data, tmp_path / "run")
    busy = pytest.raises(InputError, match=r"another process is at work in .*run: wait for it, or end it")
    with open_folder(config, False), busy, open_folder(config, False):
        pass
    with open_folder(config, False):
        pass
    assert not (tmp_path / "run").exists()  # nothing came of it


# kept and damaged


def test_the_newest_are_kept(data: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(flags(data, folder, "--run.keep-last", "3"), tmp_path / "said")
    kept = sorted(path.name for path in folder.glob("checkpoint*"))
    assert kept == [*(numbered(folder, step).name for step in (20, 24)), FILE]
    assert [load(folder / name).step for name in kept] == [20, 24, STEPS]
    assert [path.name for path in sorted(whole.glob("checkpoint*"))] == [numbered(whole, 24).name, FILE]
    assert_same_end(whole, folder)


def test_every_flipped_bit_is_noticed(whole: Path, tmp_path: Path) -> None:
    """Anywhere: length, names, numbers, padding, weights."""
    content = bytearray((whole / FILE).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    places = random.Random(0)
    path = tmp_path / "flipped.safetensors"
    for _ in range(300):
        bit = places.randrange(8 * header if places.random() < 0.5 else 8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(InputError):
            load(path)
        content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    assert load(path).step == STEPS


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "absent", "folder", "pipe"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    data: Path, whole: Path, finished: Path, tmp_path: Path, damage: str
) -> None:
    path = finished / FILE
    content = bytearray(path.read_bytes())
    content[-999] ^= 4
    path.write_bytes({"cut": content[:-1], "flipped": content}.get(damage, b""))
    if damage in ("absent", "folder", "pipe"):
        path.unlink()
    if damage == "folder":
        path.mkdir()
        (path / "mine").touch()
    if damage == "pipe":
        os.mkfifo(path)
    code, said = run(flags(data, finished, "--resume"), tmp_path / "said")
    assert code == 0, said
    fallback = [line for line in said.splitlines() if ": using " in line]
    if damage != "absent":
        assert len(fallback) == 1 and fallback[0].endswith(
            f": using {numbered(finished, 24).name}, of step 24"
        )
        assert fallback[0].startswith(f"{path} is {'no file' if damage in ('folder', 'pipe') else 'damaged'}")
    assert "resumed after step 24" in said
    assert_same_end(whole, finished)
    assert load(numbered(finished, 24)).step == 24
    assert (finished / "checkpoint.folder/mine").exists() == (damage == "folder")


def test_no_whole_checkpoint_is_one_sentence(
    data: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in finished.glob("checkpoint*"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SystemExit) as stop:
        main(flags(data, finished, "--resume"))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "is damaged" in said and "holds no older one that is whole: start another run" in said


# hostile


def rewrite(path: Path, tensors: dict[str, torch.Tensor], **header: Any) -> None:
    """A checkpoint with other content and a true checksum."""
    found = load(path)
    text = read_tensors(path, checkpoint.FORMAT, "")[0]
    text |= {name: value if isinstance(value, str) else json.dumps(value) for name, value in header.items()}
    merged = {
        name: tensor.clone() for name, tensor in {**found.tensors, **tensors}.items() if len(tensor.shape) < 9
    }
    text["checksum"] = checkpoint._checksum(text, merged)
    save_file(merged, path, metadata=text)


_axes = {"parents": [0], "mirror": [0], "center": 0, "axis_z": [0, 0], "axis_x": [0, 0]}


@pytest.mark.parametrize(
    "header, words",
    [
        ({"step": '"3"'}, "step must be int, got '3'"),
        ({"step": "-1"}, r"step must be in \[0, 1e12\], got -1"),
        ({"step": "true"}, "step must be int, got True"),
        ({"step": "9" * 5000}, "step is not JSON"),
        ({"persons": "0"}, r"persons must be in \[1, 1e6\]"),
        ({"progress": '{"seconds": NaN}'}, "the number NaN is not finite"),
        ({"progress": '{"seconds": 1e999}'}, "the number 1e999 is not finite"),
        ({"progress": '{"seconds": "long"}'}, "progress.seconds must be float"),
        ({"progress": "[" * 100000}, "progress is not JSON"),
        ({"progress": '{"seconds": 1' + "0" * 400 + "}"}, "progress.seconds must be a finite number"),
        ({"data": "[]"}, "data must be str"),
        ({"config": '{"optim": {"lr": -Infinity}}'}, "the number -Infinity is not finite"),
        ({"config": '{"optim": {"lr": "0"}}'}, "config.optim.lr must be float"),
        ({"skeleton": '{"parents": 3}'}, "skeleton has no mirror, center, axis_z, axis_x"),
        ({"skeleton": json.dumps(_axes | {"parents": 3})}, "skeleton.parents must be a list"),
        (
            {"skeleton": json.dumps(_axes | {"parents": [0, 1.0]})},
            r"skeleton.parents\[1\] must be int, got 1.0",
        ),
        ({"skeleton": json.dumps(_axes | {"center": 1.5})}, "skeleton.center must be int, got 1.5"),
        ({"skeleton": json.dumps(_axes | {"axis_z": [0]})}, "skeleton.axis_z must hold 2 values, got 1"),
        (
            {"skeleton": json.dumps(_axes | {"joint_names": [1, []]})},
            r"skeleton.joint_names\[0\] must be str",
        ),
        ({"class_names": '[["a"]]'}, r"class_names\[0\] must be str"),
        (
            {"skeleton": json.dumps(_axes | {"parents": [0] * 10**6, "mirror": []})},
            "a skeleton has 1 to 1,000 joints",
        ),
        ({"format": '"a2mc-clips/1"'}, "is not a checkpoint"),
        ({"format": '"a2mc-checkpoint/3"'}, "has the format a2mc-checkpoint/3, and this version"),
    ],
)
def test_headers_that_lie_are_refused(finished: Path, header: dict[str, str], words: str) -> None:
    rewrite(finished / FILE, {}, **header)
    with pytest.raises(InputError, match=words):
        load(finished)


@pytest.mark.parametrize(
    "section, values",
    [
        ("bank", {"size": 10**8}),
        ("encoder", {"hidden": 10**6}),
        ("encoder", {"projection": 10**6}),
        ("classes", 10**6),
    ],
)
def test_a_header_that_claims_terabytes_allocates_nothing(finished: Path, section: str, values: Any) -> None:
    config = json.loads((finished / "config.json").read_text())
    config.pop("machine")
    if section == "classes":
        rewrite(finished / FILE, {}, classes=values)
    else:
        rewrite(finished / FILE, {}, config={**config, section: {**config[section], **values}})
    found = load(finished)
    before = machine.peak_memory(torch.device("cpu"))
    with pytest.raises(InputError, match="does not hold the model that it describes"):
        weights.whole(found)
    assert machine.peak_memory(torch.device("cpu")) - before < 100e6


def test_tensors_that_do_not_fit_are_refused(data: Path, finished: Path) -> None:
    name = next(name for name in load(finished).tensors if name.startswith("model.query"))
    momentum = next(name for name in load(finished).tensors if name.startswith("optimizer."))
    trainer = Trainer(load(finished).config, Clips.load(data))
    whole = (finished / FILE).read_bytes()
    for tensors, words in (
        ({name: torch.full_like(load(finished).tensors[name], float("nan"))}, f"{name} is not finite"),
        ({name: torch.zeros(3)}, "does not hold this model"),
        ({momentum: torch.zeros(3)}, "the momentum of"),
        ({"model.more": torch.zeros(3)}, "does not hold this model"),
    ):
        (finished / FILE).write_bytes(whole)
        rewrite(finished / FILE, tensors)
        with pytest.raises(InputError, match=words):
            snapshot.restore(trainer, load(finished))


# full disks and folders that cannot be written


def test_a_full_disk_does_not_end_a_run(data: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, said = run(flags(data, folder), tmp_path / "said", "full disk", -3)
    assert code == 0, said
    warnings = [line for line in said.splitlines() if "could not be saved" in line]
    assert len(warnings) == 1 and "No space left on device" in warnings[0]
    assert "the checkpoint of step 12" in warnings[0] and "the last good one is of step 8" in warnings[0]
    assert_same_end(whole, folder)


def test_a_disk_that_stays_full_keeps_the_last_good_checkpoint(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    code, said = run(flags(data, folder), tmp_path / "said", "full disk", 3)
    last = said.splitlines()[-1]
    assert code == 2 and last.startswith(f"error: the checkpoint of step {STEPS} could not be saved")
    assert "the last good one is of step 8" in last and "Traceback" not in said
    assert load(folder).step == 8 and not list(folder.glob(".*.tmp"))
    code, said = run(flags(data, folder, "--resume"), tmp_path / "said")
    assert code == 0, said
    assert_same_end(whole, folder)


def test_files_that_may_not_grow(data: Path, whole: Path, tmp_path: Path) -> None:
    """The system's own refusal: no file beyond 40 kB, a checkpoint has more. Then without the limit."""
    folder = tmp_path / "run"
    assert (whole / FILE).stat().st_size > 40000 > (whole / "metrics.jsonl").stat().st_size
    code, said = run(flags(data, folder), tmp_path / "said", "file limit", 40000)
    assert code == 2 and said.count("File too large") == 7 and "there is none yet" in said, said
    code, said = run(flags(data, folder, "--resume"), tmp_path / "said")
    assert code == 0 and "holds no checkpoint yet: starting from the beginning" in said, said
    assert_same_end(whole, folder)


def test_a_folder_that_becomes_read_only(data: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, said = run(flags(data, folder), tmp_path / "said", "read-only from", 2)
    folder.chmod(0o755)
    assert code == 2 and "Permission denied" in said and "Traceback" not in said, said
    assert load(folder).step == 8
    code, said = run(flags(data, folder, "--resume"), tmp_path / "said")
    assert code == 0, said
    assert_same_end(whole, folder)


def test_a_read_only_folder_is_one_sentence(data: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir()
    code, said = run(flags(data, tmp_path / "closed/run"), tmp_path / "said", "read-only before")
    (tmp_path / "closed").chmod(0o755)
    assert code == 2 and said.startswith("error: Permission denied: ") and said.count("\n") == 1, said


def test_metrics_wait_for_room(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """/dev/full is a disk without room; the lines come later, in order, and none twice."""
    (tmp_path / "run").mkdir()
    with RunLog(tmp_path / "run", tiny(data, tmp_path / "run"), 9, None) as log:
        file, room = log._file, log._file._file
        log.accuracy(1.0)
        with Path("/dev/full").open("ab", buffering=0) as file._file:
            log.accuracy(2.0)
            log.accuracy(3.0)
            with pytest.raises(OSError, match="No space left"):
                log.sync()  # so a checkpoint ahead of its metrics is not written either
        file._file = room
        log.accuracy(4.0)
        log.sync()
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["knn_top1"] for line in lines] == [1, 2, 3, 4]
    assert capsys.readouterr().out.count("its lines wait in memory") == 1


@pytest.mark.parametrize("damage", ["gone", "shortened", "spoilt", "a pipe"])
def test_metrics_that_are_lost_are_said_and_marked(
    data: Path, whole: Path, finished: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    """Once, whoever resumes again; what was logged after the checkpoint is written again."""
    (finished / FILE).unlink()  # that of step 24 is the newest
    path = finished / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    early = sum(json.loads(line)["step"] <= 24 for line in lines)
    left = {"gone": [], "shortened": lines[:5], "spoilt": [*lines[:5], b'{"step": 1e999}\n', *lines[6:]]}
    path.unlink()
    if damage == "a pipe":
        os.mkfifo(path)
        with pytest.raises(SystemExit):
            main(["--resume", str(finished)])
        assert f"{path} is not a file" in capsys.readouterr().err
        return
    if damage != "gone":
        path.write_bytes(b"".join(left[damage]) + b"[" * 100_000)
    missing = 1 if damage == "spoilt" else early - len(left[damage])
    main(["--resume", str(finished)])
    assert f"lacks {missing} of the lines up to step 24" in capsys.readouterr().out
    marked = path.read_bytes().splitlines(keepends=True)
    gap = [n for n, line in enumerate(marked) if b"lost" in line]
    assert [json.loads(marked[n]) for n in gap] == [{"step": 24, "lost": missing}]
    steps = [json.loads(line)["step"] for line in marked[gap[0] + 1 :]]
    assert steps == [json.loads(line)["step"] for line in lines[early:]]
    (finished / FILE).unlink()
    main(["--resume", str(finished)])
    assert "lacks" not in capsys.readouterr().out and load(finished).step == STEPS


def test_threads_are_kept_or_said(
    data: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their number alone is made up: on a busy machine more than it has would wait for one another."""
    number = [1]
    monkeypatch.setattr(torch, "set_num_threads", lambda n: number.append(n))
    monkeypatch.setattr(torch, "get_num_threads", lambda: number[-1])
    rewrite(finished / FILE, {}, progress={**load(finished).progress, "threads": 3})
    main(["--resume", str(finished), "--run.threads", "0", "--optim.epochs", "7"])
    assert number[-1] == 3 and "CPU threads" not in capsys.readouterr().out
    main(["--resume", str(finished), "--run.threads", "2", "--optim.epochs", "8"])
    assert "resumed after step 31, with 2 CPU threads instead of 3" in capsys.readouterr().out
    # a machine with more cores made it
    stored = json.loads((finished / "config.json").read_text())
    stored.pop("machine")
    rewrite(finished / FILE, {}, config={**stored, "run": {**stored["run"], "threads": 100_000}})
    evaluate(["knn", str(finished)])


# in the background


def test_saving_takes_a_snapshot_and_does_not_wait(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step goes on while the disk is busy, and what it changes is not in the file."""
    trainer = Trainer(tiny(data, tmp_path), Clips.load(data))
    trainer.step(0)
    before = {name: tensor.clone() for name, tensor in snapshot.state(trainer, 1, {}).tensors.items()}
    disk, real = threading.Event(), saver.write_content

    def slow(path: Path, saved: checkpoint.Checkpoint) -> None:
        assert disk.wait(10)
        real(path, saved)

    monkeypatch.setattr(saver, "write_content", slow)
    with Saver(tmp_path) as keeper:
        keeper.save(snapshot.state(trainer, 1, {"seconds": 1.0}))
        trainer.step(1)
        trainer.step(2)
        assert not (tmp_path / FILE).exists()
        disk.set()
        keeper.save(snapshot.state(trainer, 3, {}))  # waits for the first
        assert load(tmp_path).step == 1 or load(numbered(tmp_path, 1)).step == 1
        keeper.wait()
    assert load(tmp_path).step == 3
    saved = load(numbered(tmp_path, 1))
    assert saved.progress == {"seconds": 1.0}
    assert all(torch.equal(saved.tensors[name], tensor) for name, tensor in before.items())
    assert not torch.equal(
        saved.tensors["model.banks.feature.rows"], load(tmp_path).tensors["model.banks.feature.rows"]
    )


def test_the_file_is_plain_safetensors(data: Path, tmp_path: Path) -> None:
    """Written by hand, read by the library: every type, a scalar, an empty tensor, odd sizes."""
    tensors = {
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(7).bfloat16(),
        "single": torch.randn(2, 3).T,
        "double": torch.randn(1).double(),
        "scalar": torch.tensor(7),
        "flags": torch.tensor([True, False, True]),
        "none": torch.zeros(0, 4),
    }
    trainer = Trainer(tiny(data, tmp_path), Clips.load(data))
    checkpoint.write(tmp_path / "x.safetensors", replace(snapshot.state(trainer, 3, {}), tensors=tensors))
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in tensors.items())


def test_files_are_as_readable_as_any_other(data: Path, tmp_path: Path) -> None:
    """safetensors writes files that only their owner reads, under names of its own."""
    path = tmp_path / "x.safetensors"
    trainer = Trainer(tiny(data, tmp_path), Clips.load(data))
    checkpoint.write(path, snapshot.state(trainer, 3, {}))
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_killed_commands_left_is_swept(tmp_path: Path) -> None:
    """By the next one that writes the same file; what is being written, or is called alike, stays."""
    path = tmp_path / "x[1].json"
    write = f"from a2mc_fast.files import *\nwith atomic_path(Path({str(path)!r})) as temporary:\n "
    subprocess.run([sys.executable, "-c", f"{write} os.kill(os.getpid(), 9)"])
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".x[1].json.") and left.name.endswith(".tmp")
    (tmp_path / ".x1.json.0123abcd.tmp").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", f"{write} print(flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as other:  # fmt: skip
        assert other.stdout is not None
        other.stdout.readline()
        write_json(path, 1)
        names = {p.name for p in tmp_path.iterdir()}
        assert left.name not in names and len(names) == 3  # with the file itself
        other.kill()
    write_json(path, 2)
    assert {p.name for p in tmp_path.iterdir()} == {path.name, ".x1.json.0123abcd.tmp"}


def test_a_disk_without_room_at_the_start_names_the_file(data: Path, tmp_path: Path) -> None:
    code, said = run(flags(data, tmp_path / "run"), tmp_path / "said", "file limit", 400)
    assert code == 2 and said == f"error: File too large: {tmp_path}/run/config.json\n"


@pytest.mark.parametrize("last", [True, False])
def test_a_model_that_is_not_finite_is_never_saved(data: Path, tmp_path: Path, last: bool) -> None:
    trainer = Trainer(tiny(data, tmp_path), Clips.load(data))
    keeper = Saver(tmp_path)
    keeper.save(snapshot.state(trainer, 1, {}), last=True)
    parameter = next(trainer.model.query.parameters())
    for bad in (float("nan"), float("inf"), float("-inf")):
        parameter.data.view(-1)[1] = bad
        with pytest.raises(InputError, match="is not finite after step 2: the state is not saved"):
            keeper.save(snapshot.state(trainer, 2, {}), last=last)
            keeper.wait()
    assert load(tmp_path).step == 1


# guards


@pytest.mark.parametrize("named", [8, 3])
def test_a_fault_names_its_step_and_clips(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: int
) -> None:
    """A fault in the ninth step, which is not logged, is found at the next log line."""
    real = Trainer.step
    monkeypatch.setattr(runlog, "_NAMED", named)

    def step(self: Trainer, step: int) -> dict[str, torch.Tensor]:
        self.fault = torch.tensor([8 if step >= 8 else -1])  # type: ignore[attr-defined]
        return real(self, step)

    monkeypatch.setattr(Trainer, "step", step)
    config = tiny(data, tmp_path / "run")
    trainer = Trainer(config, Clips.load(data))
    names = [trainer.clips.names[i] for i in trainer.schedule.batch(8).tolist()]
    with pytest.raises(InputError) as error:
        pretrain(config)
    said = str(error.value)
    assert f"not finite in step 9 (clips {', '.join(names[:named])}" in said
    listed = tmp_path / "run/fault.json"
    assert ("and 5 more, listed in" in said) == listed.exists() == (named == 3)
    if named == 3:
        assert json.loads(listed.read_text()) == {"step": 9, "clips": names}
    assert load(tmp_path / "run").step == 8


def test_a_fault_between_log_lines_is_found_before_a_save(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer.step

    def step(self: Trainer, step: int) -> dict[str, torch.Tensor]:
        values = real(self, step)
        return {**values, "loss": values["loss"] * float("nan")} if step == 7 else values

    monkeypatch.setattr(Trainer, "step", step)
    config = tiny(data, tmp_path / "run")
    with pytest.raises(InputError, match="the loss is nan at or just before step 8"):
        pretrain(replace(config, run=replace(config.run, log_every=100)))
    assert load(tmp_path / "run").step == 4


def test_out_of_memory_says_what_to_lower(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GPU's error, by injection; a CPU's, by asking for a bank of 40 terabytes."""
    code, said = run(flags(data, tmp_path / "run"), tmp_path / "said", "out of memory", 3)
    assert code == 2 and "Traceback" not in said
    assert "error: out of memory (CUDA out of memory. Tried to allocate 20.00 GiB.): lower --optim.b" in said
    with pytest.raises(SystemExit) as stop:
        main([*flags(data, tmp_path / "huge"), "--bank.size", str(10**8), "--encoder.projection", str(10**5)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: out of memory (") and "--bank.size" in said
    assert not (tmp_path / "huge").exists()
