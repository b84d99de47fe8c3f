"""The whole job on tiny runs: it learns, resumes, evaluates, and refuses bad input in one sentence."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from a2mc_fast.config import BankConfig, Config, OptimConfig, RunConfig, _ablations, demo, to_dict
from a2mc_fast.data import Clips
from a2mc_fast.errors import InputError
from a2mc_fast.evaluate import main as evaluate_main
from a2mc_fast.run import checkpoint
from a2mc_fast.run.folder import stored
from a2mc_fast.run.log import concerns
from a2mc_fast.run.parts import Parts
from a2mc_fast.run.start import pretrain
from a2mc_fast.train import main as train_main
from a2mc_fast.trainer import Schedule, Trainer

FAST = ["--run.log-every", "2", "--bank.size", "40", "--optim.batch-size", "8", "--encoder.hidden", "8"]


def tiny(data: Path, out: Path, epochs: int = 3, **changes: object) -> Config:
    base = demo()
    return replace(
        base,
        data=str(data),
        views=replace(base.views, frames=8),
        encoder=replace(base.encoder, hidden=8, projection=16),
        bank=BankConfig(size=40, warmup_steps=3),
        optim=OptimConfig(epochs=epochs, batch_size=8, milestones=(2,), lr=0.05),
        run=RunConfig(out=str(out), log_every=2, eval_every=1),
        **changes,  # type: ignore[arg-type]
    )


@pytest.fixture
def data(tmp_path: Path, make_clips: Callable[..., Clips]) -> Path:
    lengths = list(range(10, 50))
    make_clips(lengths, classes=4).save(tmp_path / "clips.safetensors")
    return tmp_path / "clips.safetensors"


@pytest.fixture
def trained(data: Path, tmp_path: Path) -> Path:
    return pretrain(tiny(data, tmp_path / "run"))


def test_a_run_leaves_its_folder(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads((trained / "result.json").read_text())
    needed = "preset steps seconds clips_per_second peak_memory_bytes device loss knn_top1 knn_top1_untrained"
    assert set(needed.split()) <= set(result)
    steps = 3 + 3 * (32 // 8)
    assert result["steps"] == steps
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    logged = [line["step"] for line in lines if "loss" in line]
    assert logged == sorted(set(range(2, steps + 1, 2)) | {steps})
    assert {line["stage"] for line in lines if "stage" in line} == {"warm-up", "train"}
    assert {"bank_norm", "bank_movement", "bank_negatives", "loss_weak", "lr"} <= set(lines[-2])
    assert json.loads((trained / "config.json").read_text())["optim"]["lr"] == 0.05


def test_loss_is_the_sum_of_its_parts(trained: Path) -> None:
    for line in map(json.loads, (trained / "metrics.jsonl").read_text().splitlines()):
        if "loss" in line:
            parts = line["loss_weak"] + line["loss_strong"] + line["loss_basic"]
            assert line["loss"] == pytest.approx(parts, rel=1e-5)


def test_checkpoint_holds_the_whole_state(trained: Path) -> None:
    names = set(load_file(trained / "checkpoint.safetensors"))
    for part in ("model.query.encoder", "model.key.encoder", "model.query.head", "optimizer.encoder"):
        assert any(name.startswith(part) for name in names)
    assert {
        "model.banks.feature.rows",
        "model.banks.feature.velocity",
        "model.banks.feature.position",
        "model.classifier.weight",
    } <= names
    saved = checkpoint.load(trained)
    assert (saved.step, saved.classes, saved.persons) == (15, 4, 2)


def test_a_resumed_run_equals_the_uninterrupted_one(data: Path, tmp_path: Path) -> None:
    """Stopped after two of four epochs and continued: the same bits."""
    whole = pretrain(tiny(data, tmp_path / "whole", epochs=4))
    config = tiny(data, tmp_path / "parts", epochs=4)

    class Stop(Exception):
        pass

    real, calls = Trainer.step, 0

    def interrupted(self: Trainer, step: int) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 11:
            raise Stop
        return real(self, step)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Trainer, "step", interrupted)
        pretrain(config)
    pretrain(config, resume=True)
    a, b = (load_file(folder / "checkpoint.safetensors") for folder in (whole, tmp_path / "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    def losses(folder: Path) -> list[tuple[int, float]]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]

    assert losses(whole) == losses(tmp_path / "parts")


def test_two_runs_of_one_seed_are_equal_and_seeds_differ(data: Path, tmp_path: Path) -> None:
    a, b = (load_file(pretrain(tiny(data, tmp_path / name)) / "checkpoint.safetensors") for name in "ab")
    c = load_file(pretrain(tiny(data, tmp_path / "c", seed=1)) / "checkpoint.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.banks.feature.rows"], c["model.banks.feature.rows"])


@pytest.mark.parametrize("name", ["b1", "b2", "b3", "b4", "a2", "a3"])
def test_ablations_run(data: Path, tmp_path: Path, name: str) -> None:
    folder = pretrain(_ablations(tiny(data, tmp_path / name, epochs=2, split="xsub"))[name])
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-2]
    assert (last["loss_weak"] > 0, last["loss_strong"] > 0) == (name not in ("b1", "b2"),) * 2
    assert ("bank_movement" in last) == (name in ("b2", "a2", "a3"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--stream", "bone", "--encoder.time-mode", "bidirectional"],
        ["--stream", "motion", "--encoder.no-input-norm"],
    ],
    ids=" ".join,
)
def test_options_run(data: Path, tmp_path: Path, flags: list[str]) -> None:
    args = ["demo", "--data", str(data), "--run.out", str(tmp_path / "o"), *FAST, "--optim.epochs", "1"]
    train_main([*args, "--optim.milestones", "0", "--bank.warmup-steps", "2", *flags])
    assert np.isfinite(json.loads((tmp_path / "o" / "result.json").read_text())["loss"])


def test_the_bank_climbs_and_the_key_encoder_follows(data: Path, tmp_path: Path) -> None:
    config = tiny(data, tmp_path / "x")
    trainer = Trainer(config, Clips.load(data))
    model = trainer.model
    for step in range(3):
        trainer.step(step)
    rows = model.bank().rows.clone()
    query = [p.clone() for p in model.query.parameters()]
    trainer.step(3)  # the first step after the warm-up: the key encoder starts as a copy of the query encoder
    assert all(torch.equal(k, q) for k, q in zip(model.key.parameters(), query))
    assert (model.bank().rows != rows).any(1).all()  # every row moves, not only a batch of them
    key, query = ([p.clone() for p in m.parameters()] for m in (model.key, model.query))
    model.update_key(config.optim.ema)
    for now, k, q in zip(model.key.parameters(), key, query):
        torch.testing.assert_close(now, 0.999 * k + 0.001 * q)


def test_warm_up_fills_the_bank_with_unit_keys(data: Path, tmp_path: Path) -> None:
    config = tiny(data, tmp_path / "x")
    config = replace(config, bank=BankConfig(size=40))  # five batches of eight
    trainer = Trainer(config, Clips.load(data))
    assert config.warmup_steps == 5
    for step in range(5):
        trainer.step(step)
    torch.testing.assert_close(trainer.model.bank().rows.norm(dim=1), torch.ones(40))


def test_batches_are_permutations_of_the_training_clips(data: Path, tmp_path: Path) -> None:
    config, clips = tiny(data, tmp_path / "x"), Clips.load(data)
    schedule = Schedule(config, clips)
    epochs = [torch.cat([schedule.batch(4 * epoch + i) for i in range(4)]) for epoch in range(2)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 32 and set(epoch.tolist()) <= set(schedule.train_index.tolist())
    assert not torch.equal(*epochs)
    rates = [schedule.learning_rate(step) for step in (0, 2, 3, 10, 11)]
    assert rates == pytest.approx([0.05] * 4 + [0.005])
    # a milestone at 0 means the end of the warm-up, not its beginning
    schedule = Schedule(replace(config, optim=replace(config.optim, milestones=(0,))), clips)
    assert [schedule.learning_rate(step) for step in (0, 2, 3)] == pytest.approx([0.05, 0.05, 0.005])


def test_compiled_parts_give_the_same_losses(data: Path, tmp_path: Path) -> None:
    def losses(mode: str) -> list[float]:
        config = tiny(data, tmp_path / mode)
        trainer = Trainer(replace(config, run=replace(config.run, compile=mode)), Clips.load(data))  # type: ignore[arg-type]
        Parts(trainer)
        return [trainer.step(step)["loss"].item() for step in range(6)]

    assert losses("on") == pytest.approx(losses("off"), rel=1e-4)


def test_both_backends_take_the_same_steps(data: Path, tmp_path: Path) -> None:
    """The Triton kernels (interpreted where there is no GPU) and plain torch: losses, bank and its
    statistics."""

    def run(backend: str) -> tuple[Trainer, list[dict[str, float]]]:
        config = tiny(data, tmp_path / backend)
        config = replace(
            config,
            run=replace(config.run, backend=backend),  # type: ignore[arg-type]
        )
        trainer = Trainer(config, Clips.load(data))
        Parts(trainer)
        return trainer, [{k: v.item() for k, v in trainer.step(step).items()} for step in range(6)]

    (plain, expected), (fused, got) = run("torch"), run("triton")
    for a, b in zip(got, expected):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(fused.model.bank().rows, plain.model.bank().rows, rtol=1e-4, atol=1e-5)
    assert not torch.equal(plain.model.bank().velocity, torch.zeros_like(plain.model.bank().velocity))


def refused(main: Callable[[list[str]], None], args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that must fail says: exit code 2 and one line on standard error."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    said = capsys.readouterr()
    assert stop.value.code == 2
    return said.err


def test_without_triton_everything_runs_but_what_asks_for_it(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    pretrain(tiny(data, tmp_path / "run", epochs=1))
    capsys.readouterr()
    for flag in ("--run.backend triton", "--encoder.recurrence fused"):
        args = ["demo", *FAST, "--data", str(data), "--run.out", str(tmp_path / "other"), *flag.split()]
        error = refused(train_main, args, capsys)
        assert f"{flag} needs triton, which is not installed" in error and error.count("\n") == 1


def test_bad_input_is_one_sentence(trained: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, folder = ["demo", *FAST], trained.parent
    clips = Clips.load(data)
    clips.splits = {}
    clips.save(folder / "no-split.safetensors")
    clips.splits = {"xsub": torch.zeros(len(clips), dtype=torch.bool)}
    clips.save(folder / "no-training.safetensors")
    cases = [
        (
            [*run, "--data", str(folder / "no-training.safetensors")],
            "protocol 'xsub' has 0 training clips: choose another with --split",
        ),
        (["nothing"], "unknown preset 'nothing'"),
        (
            ["ntu60-xsub"],
            "ntu60.safetensors not found; name another with --data, or make it with: python",
        ),
        ([*run, "--data", str(trained / "config.json")], "is damaged or not a safetensors file"),
        ([*run, "--data", str(trained / "checkpoint.safetensors")], "is not a packed clips file"),
        ([*run, "--data", str(data), "--split", "xview"], "no protocol 'xview' (it has: xsub)"),
        ([*run, "--data", str(data), "--optim.batch-size", "33"], "32 training clips, fewer than one batch"),
        ([*run, "--data", str(data), "--run.out", str(trained)], "already holds a run"),
        (["--resume", str(trained), "--bank.lr", "2"], "another configuration (bank.lr: 3.0 -> 2.0)"),
        (["--resume", str(trained), "--optim.epochs", "2"], "another configuration (optim.epochs: 3 -> 2)"),
        (["--resume", str(folder / "none")], "none holds no run to resume"),
        (["own", "--resume", str(trained)], "holds a run of demo, not of own"),
        (["--resume", str(trained), "--run.out", "x"], "leave --run.out away"),
        (["--resume", str(trained), "--data", str(folder / "no")], "name another with --data"),
        (["own", "--resume"], "runs/ holds no unfinished run of own: name the folder of a run"),
        ([*run, "--run.device", "cuda"], "torch sees no GPU"),
        ([*run, "--run.threads", "100000"], "--run.threads 100000 is more than this machine can use"),
        ([*run, "--preset", "own"], "a preset's name comes first"),
        ([*run, "--data", str(folder / "no-split.safetensors")], "add split_NAME to what was prepared"),
    ]
    before = {path: path.read_bytes() for path in trained.iterdir()}
    for args, words in cases:
        if "--run.out" not in args and "--resume" not in args:
            args = [*args, "--run.out", str(folder / "unused")]
        error = refused(train_main, args, capsys)
        assert words in error and error.startswith("error: ") and error.count("\n") == 1, error
    assert {path: path.read_bytes() for path in trained.iterdir()} == before
    assert not (folder / "unused").exists()


def test_wrong_flags_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Unrecognized" in refused(train_main, ["demo", "--banks.size", "3"], capsys)
    assert "bank.size 3 is smaller" in " ".join(
        refused(train_main, ["demo", "--bank.size", "3"], capsys).split()
    )
    assert "invalid choice" in refused(train_main, ["demo", "--precision", "fp8"], capsys).lower()


def test_damaged_checkpoints_are_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = trained / "checkpoint.safetensors"
    whole = path.read_bytes()
    for content in (b"", whole[:200], whole[:-50], np.random.default_rng(0).bytes(4000)):
        path.write_bytes(content)
        assert "checkpoint.safetensors is damaged" in refused(evaluate_main, ["knn", str(trained)], capsys)
    path.unlink()
    assert "not found" in refused(evaluate_main, ["knn", str(trained)], capsys)


def test_data_of_another_skeleton_is_refused(
    trained: Path, tmp_path: Path, make_clips: Callable[..., Clips], capsys: pytest.CaptureFixture[str]
) -> None:
    make_clips([10] * 8, persons=1).save(tmp_path / "one.safetensors")
    error = refused(evaluate_main, ["knn", str(trained), "--data", str(tmp_path / "one.safetensors")], capsys)
    assert "trained on 25 joints and 2 persons" in error and "has 25 joints and 1 persons" in error


def test_other_data_under_the_same_name_is_noticed(
    trained: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other labels and coordinates in as many clips and frames: a resume is refused, evaluation says so."""
    clips = Clips.load(data)
    evaluate_main(["knn", str(trained)])
    assert "notice" not in capsys.readouterr().err
    clips.labels = clips.labels.flip(0)
    clips.frames = clips.frames * 1.01
    clips.save(data)
    with pytest.raises(InputError, match="trained on other data: the frames and labels are not those of now"):
        pretrain(tiny(data, trained), resume=True)
    error = refused(evaluate_main, ["knn", str(trained)], capsys)
    assert "does not hold the recordings" in error and "name the data with --data" in error
    evaluate_main(["knn", str(trained), "--data", str(data)])
    assert "its frames and labels differ" in capsys.readouterr().err
    clips.lengths, clips.frames = clips.lengths.flip(0), clips.frames.flip(0)
    clips.save(trained.parent / "other.safetensors")
    evaluate_main(["knn", str(trained), "--data", str(trained.parent / "other.safetensors")])
    assert "notice" not in capsys.readouterr().err  # another set, asked for by name


def test_a_second_run_gets_its_own_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny(data, Path())
    config = replace(config, run=replace(config.run, out=""))
    assert [pretrain(config), pretrain(config)] == [Path("runs/demo"), Path("runs/demo-2")]


def test_resume_takes_the_last_unfinished_run_and_its_settings(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By what is in runs/, not by its names; wherever folder and data have gone since."""
    monkeypatch.chdir(tmp_path)
    pretrain(tiny(Path("clips.safetensors"), Path("runs/demo-2"), epochs=1))
    for name in ("mine", "demo-3", "other"):
        shutil.copytree("runs/demo-2", f"runs/{name}")
    settings = json.loads(Path("runs/other/config.json").read_text())
    Path("runs/other/config.json").write_text(json.dumps(settings | {"preset": "demo-b1"}))
    for name in ("demo-2", "mine", "other"):
        Path(f"runs/{name}/result.json").unlink()
    Path("runs/demo-2/config.json").touch()
    Path("runs/broken").mkdir()
    Path("runs/broken/config.json").write_text("{")
    capsys.readouterr()
    train_main(["demo", "--resume"])
    said = capsys.readouterr().out
    assert said.startswith("resuming runs/demo-2\n") and "resumed after step 7" in said
    train_main(["--resume"])
    assert capsys.readouterr().out.startswith("resuming runs/mine\n")
    assert json.loads(Path("runs/mine/result.json").read_text())["steps"] == 7

    # a finished one, moved with its data
    Path("runs/demo-3").rename(tmp_path / "moved")
    data.rename(tmp_path / "elsewhere.safetensors")
    monkeypatch.chdir(tmp_path / "runs")
    longer = ["--resume", "../moved", "--optim.epochs", "2", "--run.log-every", "1"]
    assert f"{data} not found; name another with --data" in refused(train_main, longer, capsys)
    train_main([*longer, "--data", "../elsewhere.safetensors"])
    config, data = stored(Path("../moved")), tmp_path / "elsewhere.safetensors"
    assert (config.optim.lr, config.run.log_every, config.data) == (0.05, 1, str(data))
    whole = pretrain(tiny(data, tmp_path / "whole", epochs=2))
    a, b = (load_file(folder / "checkpoint.safetensors") for folder in (whole, tmp_path / "moved"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_of_two_starts_the_later_one_looks_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second stands still between looking and locking, while the first trains to its end."""
    real, began = fcntl.flock, False

    def late(descriptor: int, how: int) -> None:
        nonlocal began
        if not began:
            began = True
            pretrain(tiny(data, tmp_path / "runs/demo", epochs=1))
        real(descriptor, how)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(InputError, match="already holds a run"):
        pretrain(tiny(data, tmp_path / "runs/demo", seed=1))
    assert checkpoint.load(tmp_path / "runs/demo").config.seed == 0
    shutil.rmtree("runs")
    began, config = False, tiny(data, tmp_path, epochs=1)
    assert pretrain(replace(config, run=replace(config.run, out=""))) == Path("runs/demo-2")


def test_what_goes_wrong_is_said_in_words() -> None:
    """Each with the flag to change; a run that learns, and the warm-up, give no concern."""
    fine = {"stage": "train", "bank_movement": 0.01, "feature_rank": 9.0}
    assert not concerns(fine) and not concerns({"stage": "warm-up", "feature_rank": 1.0})
    for changed, words, flag in (
        ({"bank_movement": 1e-5}, "the bank sleeps", "--bank.refresh"),
        ({"bank_movement": 0.9}, "the bank runs away", "--bank.lr"),
        ({"feature_rank": 1.1}, "features collapse", "--optim.lr"),
    ):
        (line,) = concerns({**fine, **changed})
        assert words in line and flag in line


def test_tensorboard_is_optional(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package one sentence says how to get it, and nothing is left behind."""
    config = tiny(data, tmp_path / "x")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'a2mc_fast\[tensorboard\]'"):
        pretrain(replace(config, run=replace(config.run, tensorboard=True)))
    assert not (tmp_path / "x").exists()


def test_a_loss_that_is_not_finite_stops_the_run(data: Path, tmp_path: Path) -> None:
    config = tiny(data, tmp_path / "x")
    object.__setattr__(config.optim, "lr", 1e30)  # no flag may be so large
    with pytest.raises(
        ValueError,
        match=r"the loss or a gradient is not finite in step \d+ \(clips .* with a lower --optim\.lr",
    ):
        pretrain(config)


def test_the_command_line_as_a_user_runs_it(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "a2mc_fast.train", "demo", "--data", str(data), "--run.out", "r", *FAST]
    done = subprocess.run(
        [*command, "--optim.epochs", "1", "--optim.milestones", "0", "--bank.warmup-steps", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "kNN top-1" in done.stdout and "wrote r/checkpoint.safetensors" in done.stdout
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2 and "already holds a run" in again.stderr


def test_a_run_outlives_the_reader_of_its_output(data: Path, tmp_path: Path) -> None:
    """As when `tee` dies: the lines are lost, and the run is not."""
    command = [sys.executable, "-m", "a2mc_fast.train", "demo", "--data", str(data), "--run.out", "r", *FAST]
    with subprocess.Popen(
        [*command, "--optim.epochs", "2", "--optim.milestones", "0", "--bank.warmup-steps", "1"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert "training clips" in process.stdout.readline()
        process.stdout.close()
        assert process.wait(120) == 0, process.stderr.read()
    assert (tmp_path / "r" / "result.json").exists()


def test_config_in_the_checkpoint_is_the_runs(trained: Path, data: Path) -> None:
    assert to_dict(checkpoint.load(trained).config)["data"] == str(data)
