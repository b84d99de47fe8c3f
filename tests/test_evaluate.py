"""The command lines of evaluation: what they write and print, that results add up, and what they refuse."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from a2mc_fast.config import Config
from a2mc_fast.data import Clips
from a2mc_fast.evaluate import main
from a2mc_fast.evaluation.scores import Scores
from a2mc_fast.evaluation.tables import table
from a2mc_fast.run.start import pretrain
from a2mc_fast.skeleton import Skeleton
from tests.conftest import SMALL
from tests.test_protocols import class_clips
from tests.test_train import refused, tiny

SHORT = ["--epochs", "2", "--milestones", "1", "--batch-size", "8"]


def tiny_config(data: Path, out: Path, **changes: Any) -> Config:
    config = tiny(data, out, epochs=1, **changes)
    return replace(config, run=replace(config.run, eval_every=0), bank=replace(config.bank, warmup_steps=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data.safetensors, and the runs joint, motion and bone that were trained on it."""
    folder = tmp_path_factory.mktemp("evaluate")
    class_clips().save(folder / "data.safetensors")
    for stream in ("joint", "motion", "bone"):
        pretrain(tiny_config(folder / "data.safetensors", folder / stream, stream=stream))
    return folder


def result_of(path: Path) -> dict[str, Any]:
    """A JSON file, which must not hold NaN."""

    def no_nan(name: str) -> None:
        raise AssertionError(f"{path} holds {name}")

    return json.loads(path.read_text(), parse_constant=no_nan)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("protocol", "flags"),
    [("knn", []), ("linear", SHORT), ("finetune", SHORT), ("transfer", [*SHORT, "--data", "DATA"])],
)
def test_every_protocol_writes_and_prints(
    folder: Path, tmp_path: Path, protocol: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, run = tmp_path / "out.json", folder / "joint"
    flags = [str(folder / "data.safetensors") if flag == "DATA" else flag for flag in flags]
    main([protocol, str(run), "--out", str(out), "--untrained", *flags])
    result = result_of(out)
    needed = (
        "format protocol run preset steps data split stream encoder options per_class confusion class_names "
        "top1_macro untrained seconds config checkpoint_sha256 device torch commit"
    )
    assert set(needed.split()) <= set(result)
    assert result["protocol"] == protocol and result["stream"] == "joint"
    assert (
        result["checkpoint_sha256"]
        == hashlib.sha256((run / "checkpoint.safetensors").read_bytes()).hexdigest()
    )
    assert result["config"]["encoder"]["hidden"] == 8 and len(result["class_names"]) == 4
    confusion = torch.tensor(result["confusion"])
    last = result["top1" if protocol == "knn" else "top1_last"]
    assert confusion.sum(1).tolist() == [3, 3, 3, 3]
    assert last == pytest.approx(100 * confusion.diagonal().sum().item() / 12)
    assert result["per_class"] == pytest.approx((100 * confusion.diagonal() / 3).tolist())
    printed = capsys.readouterr().out
    assert f"{last:.2f}" in printed and "untrained %" in printed and f"wrote {out}" in printed
    assert "confusion" not in result["untrained"]
    if protocol == "knn":
        assert "scores" not in result
        return
    assert result["options"]["epochs"] == 2 and result["options"]["lr"] == (
        0.1 if protocol == "linear" else 0.01
    )
    assert result["top1_best"] >= last
    scores = Scores.load(tmp_path / result["scores"])
    assert scores.scores.dtype == torch.float32 and scores.scores.shape == (12, 4)
    data = Clips.load(folder / "data.safetensors")
    assert torch.equal(scores.clips, data.split("xsub")[1])
    assert torch.equal(scores.labels, data.labels[scores.clips])
    counted = torch.zeros(4, 4, dtype=torch.long)
    for truth, predicted in zip(scores.labels, scores.scores.argmax(1)):
        counted[truth, predicted] += 1
    assert torch.equal(counted, confusion)


def test_another_checkpoint_has_a_result_of_its_own(folder: Path, tmp_path: Path) -> None:
    run, older = tmp_path / "run", "checkpoint-000000001"
    run.mkdir()
    for name in ("checkpoint", older):
        shutil.copyfile(folder / "joint" / "checkpoint.safetensors", run / f"{name}.safetensors")
    main(["knn", str(run)])
    newest = (run / "knn.json").read_bytes()
    main(["linear", str(run / f"{older}.safetensors"), *SHORT])
    main(["knn", str(run / f"{older}.linear.classifier.safetensors")])
    assert (run / "knn.json").read_bytes() == newest
    left = {f"{older}.linear{end}" for end in (".json", ".scores.safetensors", ".classifier.safetensors")}
    left |= {f"{older}.linear.classifier.knn.json", "knn.json"}
    left |= {f"{name}.safetensors" for name in ("checkpoint", older)}
    assert {path.name for path in run.iterdir()} == left


def test_ensemble_is_the_weighted_sum_of_the_saved_scores(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(folder / stream) for stream in ("bone", "joint", "motion")]
    for run in runs:
        main(["linear", run, *SHORT, "--crop", "center"])
    scores = [Scores.load(Path(run) / "linear.scores.safetensors") for run in runs]

    def weighted(weights: list[float], of: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> float:
        total = torch.stack([w * of(s.scores) for w, s in zip(weights, scores)]).sum(0)
        return 100 * (total.argmax(1) == scores[0].labels).double().mean().item()

    for number, (flags, weights, accuracy) in enumerate(
        [
            ([], [0.6, 0.6, 0.4], weighted([0.6, 0.6, 0.4])),
            (["--weights", "1", "1", "1"], [1, 1, 1], weighted([1, 1, 1])),
            (["--weights", "3", "0", "0"], [3, 0, 0], weighted([1, 0, 0])),
            (
                ["--of", "softmax", "--weights", "1", "2", "9"],
                [1, 2, 9],
                weighted([1, 2, 9], lambda x: x.softmax(1)),
            ),
        ]
    ):
        out = tmp_path / f"{number}.json"
        main(["ensemble", *runs, "--out", str(out), *flags])
        result = result_of(out)
        assert result["options"]["weights"] == weights and result["top1"] == accuracy
        assert [member["stream"] for member in result["members"]] == ["bone", "joint", "motion"]
        assert torch.tensor(result["confusion"]).sum() == 12 and result["class_names"][3] == "class 3"
    alone = result_of(tmp_path / "2.json")
    assert alone["confusion"] == result_of(folder / "bone" / "linear.json")["confusion"]
    capsys.readouterr()
    main(["ensemble", *runs])
    assert "bone + joint + motion" in capsys.readouterr().out
    assert result_of(folder / "bone" / "ensemble.json")["top1"] == weighted([0.6, 0.6, 0.4])


def test_semi_supervised_reports_mean_and_spread_and_repeats(folder: Path, tmp_path: Path) -> None:
    args = ["semi", str(folder / "joint"), *SHORT, "--fractions", "0.25", "0.5", "--seeds", "3"]
    for name in ("a", "b"):
        main([*args, "--out", str(tmp_path / f"{name}.json")])
    first, second = result_of(tmp_path / "a.json"), result_of(tmp_path / "b.json")
    assert first["fractions"] == second["fractions"]
    for entry, (share, clips) in zip(first["fractions"], ((0.25, 8), (0.5, 16)), strict=True):
        assert (entry["fraction"], entry["training_clips"]) == (share, clips)
        for name in ("top1_best", "top1_last"):
            values = [run[name] for run in entry["runs"]]
            assert entry[name] == pytest.approx(statistics.mean(values))
            assert entry[f"{name}_std"] == pytest.approx(statistics.stdev(values))
        assert [run["seed"] for run in entry["runs"]] == [0, 1, 2]
        assert torch.tensor(entry["confusion"]).sum() == 3 * 12
        assert entry["top1_last"] == pytest.approx(entry["top1_macro"])  # classes are equally frequent
    assert " ± " in table([first]) and "semi 25 %" in table([first])


def test_trainings_are_told_as_they_begin_and_go(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(folder / "joint"), ["--out", str(tmp_path / "out.json")]
    main(["linear", run, *SHORT, *out, "--untrained", "--validate-every", "1", "--seed", "4"])
    lines = re.sub(r"\d+\.\d+ %  \d+ s(, \d+ s left)?", "...", capsys.readouterr().err).splitlines()
    said = "36 training and 12 test clips, 2 epochs, seed 4"
    for name, part in (("linear", lines[:3]), ("linear, untrained encoder", lines[3:])):
        assert part == [f"{name}: {said}", *(f"{name}: epoch {epoch}/2  top-1 ..." for epoch in (1, 2))]
    main(["semi", run, *SHORT, *out, "--fractions", "0.25", "--seeds", "2"])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "semi: 25 % of the labels, 8 training clips, 2 epochs, seed 0"
    assert lines[2] == "semi: 25 % of the labels, 8 training clips, 2 epochs, seed 1" and len(lines) == 4


def test_transfer_to_another_label_set(folder: Path, tmp_path: Path) -> None:
    class_clips(24, classes=3).save(tmp_path / "other.safetensors")
    args = ["transfer", str(folder / "joint"), "--data", str(tmp_path / "other.safetensors"), *SHORT]
    main([*args, "--out", str(tmp_path / "t.json")])
    result = result_of(tmp_path / "t.json")
    assert len(result["confusion"]) == 3 and result["data"].endswith("other.safetensors")


def test_neighbours_are_listed(folder: Path, tmp_path: Path) -> None:
    for suffix in ("json", "csv"):
        args = ["knn", str(folder / "joint"), "--k", "3", "--top", "3", "--out", str(tmp_path / "k.json")]
        main([*args, "--neighbours", str(tmp_path / f"n.{suffix}")])
    listed = json.loads((tmp_path / "n.json").read_text())
    data = Clips.load(folder / "data.safetensors")
    training, test = data.split("xsub")
    assert [query["name"] for query in listed] == [data.names[i] for i in test.tolist()]
    right = 0
    for query in listed:
        near = query["neighbours"]
        similarity = [n["similarity"] for n in near]
        assert len(near) == 3 and similarity == sorted(similarity, reverse=True) and similarity[0] <= 1
        assert all(data.names.index(n["name"]) in training.tolist() for n in near)
        assert all(n["class"] == f"class {n['label']}" for n in near)
        labels = [n["label"] for n in near]
        right += max(labels, key=labels.count) == query["label"]  # the nearest of the tied
    assert result_of(tmp_path / "k.json")["top1"] == pytest.approx(100 * right / 12)
    again = ["knn", str(folder / "joint"), "--untrained", "--top", "3", "--out", str(tmp_path / "k.json")]
    main([*again, "--neighbours", str(tmp_path / "again.json")])
    assert json.loads((tmp_path / "again.json").read_text()) == listed  # not those of the untrained encoder
    with (tmp_path / "n.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 36 and [row["rank"] for row in rows[:4]] == ["1", "2", "3", "1"]
    assert [row["neighbour_name"] for row in rows[:3]] == [n["name"] for n in listed[0]["neighbours"]]


def test_neighbours_of_clips_without_a_label(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = Clips.load(folder / "data.safetensors")
    _, test = clips.split("xsub")
    listed = {}
    for name, unknown in (("some", test[:6]), ("all", torch.arange(len(clips)))):
        clips.labels[unknown] = -1
        clips.save(tmp_path / "data.safetensors")
        args = ["knn", str(folder / "joint"), "--data", str(tmp_path / "data.safetensors"), "--top", "2"]
        main([*args, "--neighbours", str(tmp_path / "n.json"), "--out", str(tmp_path / f"{name}.json")])
        listed[name] = json.loads((tmp_path / "n.json").read_text())
    near = [[n["name"] for n in query["neighbours"]] for query in listed["some"]]
    assert len(near) == 12 and near == [[n["name"] for n in q["neighbours"]] for q in listed["all"]]
    assert [query["class"] == "" for query in listed["some"]] == [True] * 6 + [False] * 6
    assert sum(map(sum, result_of(tmp_path / "some.json")["confusion"])) == 6
    assert "top1" not in result_of(tmp_path / "all.json")
    assert "no labelled" in refused(main, args, capsys)


def test_compare_makes_one_table(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stream in ("joint", "motion"):
        main(["knn", str(folder / stream), *(["--untrained"] if stream == "joint" else [])])
    main(["linear", str(folder / "joint"), *SHORT, "--out", str(tmp_path / "l.json")])
    plain = json.loads((folder / "bone" / "config.json").read_text())
    for name, files in (("ended", ("config.json", "result.json")), ("begun", ("config.json",))):
        (tmp_path / name).mkdir()
        for file in files:
            shutil.copy(folder / "bone" / file, tmp_path / name)
    plain["optim"]["lr"], plain["seed"] = 0.125, 7
    (tmp_path / "begun" / "config.json").write_text(json.dumps(plain))
    capsys.readouterr()
    runs = [
        tmp_path / "begun",
        folder / "joint" / "knn.json",
        tmp_path / "l.json",
        folder / "motion" / "knn.json",
    ]
    main(["compare", *map(str, runs), str(tmp_path / "ended"), "--out", str(tmp_path / "table.csv")])
    lines = capsys.readouterr().out.splitlines()
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    best = [result_of(folder / stream / "knn.json")["top1"] for stream in ("joint", "motion")]
    order = ["joint", "motion"] if best[0] >= best[1] else ["motion", "joint"]
    assert [row["protocol"] for row in rows] == ["knn", "knn", "knn in training", "linear", "unfinished"]
    assert [row["stream"] for row in rows[:2]] == order and rows[2]["stream"] == "bone"
    ended = result_of(folder / "bone" / "result.json")
    assert rows[2]["last_percent"] == f"{ended['knn_top1']:.2f}" and rows[2]["steps"] == str(ended["steps"])
    assert rows[2]["untrained_percent"] == f"{ended['knn_top1_untrained']:.2f}"
    assert f"{result_of(tmp_path / 'l.json')['top1_best']:.2f}" == rows[3]["best_percent"]
    assert [row["seed"] for row in rows] == ["0", "0", "0", "0", "7"]
    assert {row["preset"] for row in rows} == {"demo"} and rows[4]["steps"] == ""
    # what all runs share is no difference
    assert [row["changed"] for row in rows] == ["optim.lr 0.05"] * 4 + ["optim.lr 0.125"]
    assert "untrained %" in lines[0] and lines[1].split()[1] == "knn" and lines[5].endswith("optim.lr 0.125")


def test_help_and_comparison_do_not_wait_for_torch() -> None:
    code = (
        "import sys, a2mc_fast.evaluate, a2mc_fast.embed, a2mc_fast.ablate; "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bad_input_is_one_sentence(
    folder: Path, tmp_path: Path, make_clips: Callable[..., Clips], capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = folder / "data.safetensors", str(folder / "joint")
    other = Skeleton(
        parents=(0, 0, 0, 0, 0), mirror=SMALL.mirror, center=1, axis_z=(0, 1), axis_x=(3, 4), joint_names=()
    )
    make_clips([10] * 8, persons=1).save(tmp_path / "ntu.safetensors")
    make_clips([10] * 8, persons=1, skeleton=other).save(tmp_path / "bones.safetensors")
    for name, change in (("center", {"center": 0}), ("unturned", {"rotation": "none"})):
        changed = replace(SMALL, **change)  # type: ignore[arg-type]
        make_clips([10] * 8, persons=1, skeleton=changed).save(tmp_path / f"{name}.safetensors")
    clips = class_clips()
    clips.splits = {"xsub": clips.splits["xsub"] & (clips.labels != 1)}
    clips.save(tmp_path / "missing.safetensors")
    clips.splits = {"xsub": torch.zeros(len(clips), dtype=torch.bool)}
    clips.save(tmp_path / "no_training.safetensors")
    class_clips(32).save(tmp_path / "fewer.safetensors")
    main(["linear", run, *SHORT, "--crop", "center"])
    here = ["linear", run, *SHORT, "--crop", "center", "--data", str(tmp_path / "fewer.safetensors")]
    main([*here, "--out", str(tmp_path / "fewer.json")])
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.json").write_text("[]")
    cases = [
        (["linear", run, "--data", str(tmp_path / "ntu.safetensors")], "trained on 5 joints and 1 persons"),
        (["knn", run, "--data", str(tmp_path / "bones.safetensors")], "trained on another skeleton"),
        (["knn", run, "--data", str(tmp_path / "center.safetensors")], "has center 0 instead of 1"),
        (
            ["knn", run, "--data", str(tmp_path / "unturned.safetensors")],
            "has rotation none instead of first",
        ),
        (["transfer", run, "--data", str(tmp_path / "ntu.safetensors")], "has 25 joints and 1 persons"),
        (["finetune", run, "--split", "xview"], "the data has no protocol 'xview' (it has: xsub)"),
        (["linear", run, "--data", str(tmp_path / "missing.safetensors")], "no training clip (class 1)"),
        (["finetune", run, "--data", str(tmp_path / "missing.safetensors")], "no training clip (class 1)"),
        (["knn", run, "--data", str(tmp_path / "no_training.safetensors")], "no labelled training clips"),
        (
            ["semi", run, "--fractions", "0.01"],
            "1 % of the 36 training clips of protocol 'xsub' (seed 0) is no",
        ),
        (
            ["semi", run, "--fractions", "0.06", "--unstratified"],
            "of the tested classes have no training clip",
        ),
        (["knn", run, "--k", "37"], "k must be in 1 .. 36"),
        (["ensemble", run], "at least two runs, got 1"),
        (["ensemble", run, run, "--weights", "1"], "1 weights for 2 runs"),
        (["ensemble", run, f"{run}/."], "joint is given twice"),
        (["ensemble", run, str(folder / "x")], "x not found"),
        (
            ["ensemble", run, str(folder / "motion"), "--protocol", "transfer"],
            "transfer.scores.safetensors not found; make it with: python -m a2mc_fast.evaluate transfer",
        ),
        (
            ["ensemble", run, str(tmp_path / "fewer.scores.safetensors")],
            "were not tested on the same clips (12 clips of 4 classes",
        ),
        (["ensemble", run, str(data)], "is not a file of scores"),
        (["compare"], "at least one result"),
        (["compare", str(tmp_path / "empty")], "empty holds no results"),
        (["compare", str(tmp_path / "list.json")], "is not the result of a protocol"),
        (["compare", str(data)], "is not JSON"),
        (["compare", str(tmp_path / "none.json")], "No such file or directory"),
        (["knn", str(tmp_path / "none")], "not found: is this the folder of a run"),
    ]
    before = {path: path.read_bytes() for path in folder.rglob("*.json")}
    capsys.readouterr()
    for args, words in cases:
        error = refused(main, args, capsys)
        error = "".join(line for line in error.splitlines(True) if not line.startswith("notice: "))
        assert words in error and error.startswith("error: ") and error.count("\n") == 1, (args, error)
    assert {path: path.read_bytes() for path in folder.rglob("*.json")} == before


def test_wrong_flags_exit_with_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(folder / "joint")
    for args, words in (
        (["transfer", run], "transfer needs --data"),
        (["knn", run, "--neighbours", "x.txt"], "neighbours must be a .json or .csv file"),
        (["semi", run, "--fractions", "1.5"], "fractions must be in (0, 1], got 1.5"),
        (["linear", run, "--epochs", "0"], "epochs must be in [1, 1e6], got 0"),
    ):
        assert words in " ".join(refused(main, args, capsys).replace("│", " ").split())
