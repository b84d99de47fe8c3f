"""The ablations: what each row changes, that a run is made once, and the paper's tables."""

from __future__ import annotations

import json
import shlex
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from a2mc_fast.ablate import main
from a2mc_fast.config import differences, preset
from a2mc_fast.data import Clips
from a2mc_fast.evaluation import ablation
from a2mc_fast.evaluation.rows import _PAPER, TABLES, row_configs, tables
from a2mc_fast.plots.__main__ import main as draw
from tests.test_protocols import class_clips
from tests.test_train import refused

FLAGS = shlex.split(
    "--views.frames 8 --encoder.hidden 8 --encoder.projection 16 --bank.size 40 "
    "--bank.warmup-steps 1 --optim.batch-size 8 --optim.epochs 1 --optim.milestones 0 --run.eval-every 0 "
    "--loss.mix 0.4 0.3 0.2 0.1 --run.threads 1 --linear.epochs 2 --linear.milestones 1"
)


@pytest.fixture
def args(tmp_path: Path) -> list[str]:
    class_clips().save(tmp_path / "data.safetensors")
    return [str(tmp_path / "data.safetensors"), "own", *FLAGS, "--run.out", str(tmp_path / "ablation")]


def test_rows_change_what_the_paper_changes() -> None:
    rows = row_configs(preset("ntu60-xsub"))
    full = rows["full"]
    assert full == preset("ntu60-xsub")
    assert [rows[f"l{n}"].loss.mix for n in range(5)] == [
        (), (0.4,), (0.4, 0.3), (0.4, 0.3, 0.2), (0.4, 0.3, 0.2, 0.1)
    ]  # fmt: skip
    for count in range(4):
        assert [line.split(":")[0] for line in differences(full, rows[f"l{count}"])] == ["loss.mix"]
    assert not differences(full, rows["l4"]) and not differences(rows["b1"], rows["a1"])
    assert {row.warmup_steps for row in row_configs(preset("own")).values()} == {300}  # as many steps each
    # the marks of Table V: attack, PNM (a bank that ascends and is mixed), MC (distillation)
    for name, (_, attack, pnm, mc) in TABLES[0].rows.items():
        row = rows[name]
        assert (row.attack.radius > 0) == (attack == "✓")
        assert (row.bank.kind == "gradient") == bool(row.loss.mix) == (pnm == "✓")
        assert (row.loss.strong == "distill") == (mc == "✓")
    for name, (_, attack, augmented) in TABLES[1].rows.items():
        row = rows[name]
        assert (row.attack.radius > 0) == (attack == "✓")
        assert (row.loss.strong != "off" and row.views.augment) == (augmented == "✓")


def test_rows_are_trained_once_and_averaged(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*args, "--rows", "b1", "a1", "full", "l4", "--seeds", "2"])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "ablation" / "ablation.json").read_text())
    made = sorted(path.name for path in (tmp_path / "ablation").iterdir() if path.is_dir())
    assert made == ["b1-seed0", "b1-seed1", "full-seed0", "full-seed1"]
    for row in result["rows"].values():
        for name in ("top1_knn", "top1_linear_best", "top1_linear_last"):
            values = [run[name] for run in row["runs"]]
            assert row[name] == pytest.approx(statistics.mean(values))
            assert row[f"{name}_std"] == pytest.approx(statistics.stdev(values))
    for run in result["rows"]["full"]["runs"]:
        folder = Path(run["run"])
        assert json.loads((folder / "config.json").read_text())["seed"] == run["seed"]
        assert json.loads((folder / "knn.json").read_text())["top1"] == run["top1_knn"]
        linear = json.loads((folder / "linear.json").read_text())
        assert linear["top1_best"] == run["top1_linear_best"] and linear["options"]["crop"] == "center"
    for title in ("Table V: ", "Table VI: ", "Mixing shares"):
        assert title in printed

    # again, with a row more: what is finished is neither trained nor evaluated again
    trained = []
    real = ablation.pretrain
    monkeypatch.setattr(
        ablation, "pretrain", lambda c, *a, **k: (trained.append(c.preset), real(c, *a, **k))[1]
    )
    before = (tmp_path / "ablation" / "full-seed0" / "linear.json").stat().st_mtime_ns
    main([*args, "--rows", "l4", "l1", "full", "b1"])
    assert trained == ["own-l1"]
    assert (tmp_path / "ablation" / "full-seed0" / "linear.json").stat().st_mtime_ns == before
    again = json.loads((tmp_path / "ablation" / "ablation.json").read_text())
    assert again["rows"]["full"]["runs"][0] == result["rows"]["full"]["runs"][0]
    # a result of another checkpoint is not taken for this one's
    path = tmp_path / "ablation" / "b1-seed0" / "knn.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "top1": 1.0, "checkpoint_sha256": "another"}))
    main([*args, "--rows", "b1"])
    assert json.loads(path.read_text())["top1"] == saved["top1"]
    # another protocol setting is evaluated anew, on the same runs
    main([*args, "--rows", "b1", "--linear.epochs", "3"])
    assert trained == ["own-l1"]
    linear = json.loads((tmp_path / "ablation" / "b1-seed0" / "linear.json").read_text())
    assert linear["options"]["epochs"] == 3


def test_a_study_sets_rows_of_several_sets_side_by_side(
    args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # the first six training clips once more, as test clips
    clips, again = class_clips(), 6
    frames = int(clips.lengths[:again].sum())
    Clips.pack(
        torch.cat((clips.frames, clips.frames[:frames])).permute(0, 3, 2, 1),
        [*clips.lengths.tolist(), *clips.lengths[:again].tolist()],
        [*clips.labels.tolist(), *clips.labels[:again].tolist()],
        clips.skeleton,
        splits={"xsub": np.append(clips.splits["xsub"].numpy(), [False] * again)},
    ).save(tmp_path / "other.safetensors")
    sets = [args[0], str(tmp_path / "other.safetensors")]
    main([*sets, *args[1:], "--rows", "b1", "full", "--seeds", "2"])
    lines = capsys.readouterr().out.splitlines()
    result = json.loads((tmp_path / "ablation" / "study.json").read_text())
    assert [Path(one["data"]).stem for one in result["sets"]] == ["data", "other"]
    for one in result["sets"]:
        assert list(one["rows"]) == ["untrained", "b1", "full"]
        assert one["split"] == "xsub" and one["config"]["preset"] == "own"
        for row in one["rows"].values():
            values = [run["top1_knn"] for run in row["runs"]]
            assert row["top1_knn"] == pytest.approx(statistics.mean(values)) and len(values) == 2
        assert {run["steps"] for name in ("b1", "full") for run in one["rows"][name]["runs"]} == {
            one["rows"]["full"]["runs"][0]["steps"]
        }
        # B1 in its own time is its end
        assert [run["top1_knn_within"] for run in one["rows"]["b1"]["runs"]] == pytest.approx(
            [run["top1_knn"] for run in one["rows"]["b1"]["runs"]], abs=1e-3
        )
    plain, doubled = (one["rows"]["full"] for one in result["sets"])
    assert "top1_knn_fresh" not in plain and "top1_linear_last_fresh" in doubled
    knn = json.loads((tmp_path / "ablation" / "other" / "full-seed0" / "knn.json").read_text())
    fresh = knn["fresh_test_clips"]
    assert fresh == len(clips.split("xsub")[1])
    # a copy's neighbour is what it was copied from, whatever the encoder
    right = knn["top1"] / 100 * (fresh + again)
    assert knn["top1_fresh"] / 100 * fresh == pytest.approx(right - again, abs=0.01)
    assert lines[-8].split()[:3] == ["data", "xsub", "untrained"] and "±" in lines[-8]
    assert [line.split()[0] for line in lines[-7:-2]] == ["B1", "A²MC", "other", "B1", "A²MC"]
    draw(["study", str(tmp_path / "ablation" / "study.json"), "--out", str(tmp_path / "study.png")])
    assert (tmp_path / "study.png").stat().st_size > 10_000


def test_what_a_run_had_reached_in_a_time(tmp_path: Path) -> None:
    lines = [
        {"step": 0, "knn_top1": 10.0},
        {"step": 2, "loss": 1.0, "seconds": 5.0},
        {"step": 2, "knn_top1": 20.0},
        {"step": 4, "loss": 1.0, "seconds": 9.0},
        {"step": 4, "knn_top1": 30.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [ablation.knn_within(tmp_path, s) for s in (1, 5.0, 8.9, 9.0)] == [10.0, 20.0, 20.0, 30.0]


def test_an_interrupted_row_is_continued(
    args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*args, "--rows", "b1"])
    folder = tmp_path / "ablation" / "b1-seed0"
    whole = load_file(folder / "checkpoint.safetensors")
    for left in ({"config.json"}, {"config.json", "checkpoint.safetensors"}, set[str]()):
        for path in list(folder.iterdir()):
            if path.name not in left:  # killed when there was no more
                path.unlink()
        main([*args, "--rows", "b1"])
        again = load_file(folder / "checkpoint.safetensors")
        assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    class_clips(44).save(args[0])
    assert "was trained on other data" in refused(main, [*args, "--rows", "b1"], capsys)


def test_tables_have_the_papers_layout() -> None:
    numbers = {"top1_linear_best": 80.0, "top1_linear_last": 79.5, "top1_knn": 70.0, "top1_knn_std": 0.5}
    names = ("b1", "b2", "b3", "b4", "full", "a1", "a2", "a3", "l0", "l1", "l2", "l3", "l4")
    result = {"preset": "ntu60-xsub", "data": "a/ntu60.safetensors", "split": "xsub", "seeds": 3}
    rows = {name: {**numbers, "top1_linear_best": float(number)} for number, name in enumerate(names)}
    lines = tables({**result, "rows": rows}).splitlines()
    assert lines[0] == "Table V: components (ntu60 xsub, 3 seeds)"
    assert lines[1].split()[:4] == ["Baseline", "Att-Aug", "PNM", "MC"] and lines[1].endswith("paper %")
    marks = [line.split()[:4] for line in lines[2:7]]
    assert marks == [
        ["B1", "✗", "✗", "✗"],
        ["B2", "✗", "✓", "✗"],
        ["B3", "✓", "✗", "✗"],
        ["B4", "✓", "✗", "✓"],
        ["A²MC", "✓", "✓", "✓"],
    ]
    assert [line.split()[-1] for line in lines[2:7]] == ["75.6", "76.9", "78.5", "79.0", "80.0"]
    assert [line.split()[4] for line in lines[2:7]] == ["0.00", "1.00", "2.00", "3.00", "4.00"]
    assert "70.00 ± 0.50" in lines[2]
    assert lines[8].startswith("Table VI") and lines[10].split()[:3] == ["A1", "✗", "✗"]
    assert lines[13].split()[:3] == ["A²MC", "✓", "✓"] and lines[15].startswith("Mixing shares")
    assert lines[21].startswith("0.4, 0.3, 0.2, 0.1")
    assert set(_PAPER["ntu60-xview"]) == set(_PAPER["ntu60-xsub"])
    few = tables({**result, "preset": "own", "seeds": 1, "rows": {"a2": numbers}})
    assert "Table V:" not in few and "paper" not in few and len(few.splitlines()) == 3


def test_bad_input_is_one_sentence(
    args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*args, "--rows", "b1"])
    capsys.readouterr()
    for wrong, words in (
        ([], "give the packed clips"),
        ([args[0], "nothing"], "unknown preset 'nothing'"),
        ([args[0], "own-b1"], "unknown preset 'own-b1'"),
        (
            [*args, "--rows", "b1", "--optim.lr", "0.2"],
            f"was run with another configuration (optim.lr: {preset('own').optim.lr} -> 0.2)",
        ),
        ([*args, "--rows", "b2", "--split", "xview"], "no protocol 'xview'"),
        ([*args, "--rows", "b2", "--data", "other.safetensors"], "come first, without --data"),
        ([str(tmp_path / "none.safetensors"), *args[1:], "--rows", "b2"], "not found: name packed clips"),
    ):
        error = refused(main, wrong, capsys)
        assert words in error and error.startswith("error: ") and error.count("\n") == 1, error
    assert "invalid choice" in refused(main, [*args, "--rows", "b9"], capsys).lower()
