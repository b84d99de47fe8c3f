"""The pictures show what the files say: artists are counted and compared with the numbers behind them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from a2mc_fast.config import BankConfig, OptimConfig, RunConfig, demo
from a2mc_fast.data import Clips
from a2mc_fast.data.synthetic import synthetic_clips
from a2mc_fast.errors import InputError
from a2mc_fast.evaluation.protocols import encode
from a2mc_fast.plots import style
from a2mc_fast.plots.__main__ import main
from a2mc_fast.plots.attack import _bars, attack, attacked_stages, find_clip
from a2mc_fast.plots.confusion import confusion
from a2mc_fast.plots.curves import curves, running_mean
from a2mc_fast.plots.neighbours import nearest, neighbours, spread_over_classes
from a2mc_fast.plots.output import write_picture
from a2mc_fast.plots.skeletons import LEFT, MIDDLE, RIGHT, draw_pose, draw_strip, even_frames, project, sides
from a2mc_fast.plots.tsne import neighbour_agreement, tsne
from a2mc_fast.run import checkpoint, weights
from a2mc_fast.run.metrics import read_metrics
from a2mc_fast.run.opened import Opened, open_run
from a2mc_fast.run.start import pretrain
from a2mc_fast.skeleton import NTU25, Skeleton
from tests.conftest import SMALL


def _train(clips: Clips, folder: Path) -> Path:
    clips.save(folder / "clips.safetensors")
    base = demo()
    config = replace(
        base,
        data=str(folder / "clips.safetensors"),
        views=replace(base.views, frames=8),
        encoder=replace(base.encoder, hidden=8, projection=16),
        bank=BankConfig(size=40, warmup_steps=6),
        optim=OptimConfig(epochs=3, batch_size=8, milestones=(2,), lr=0.05, gamma=0.1),
        run=RunConfig(out=str(folder / "run"), log_every=1, eval_every=1, threads=1),
    )
    return pretrain(config)


@pytest.fixture(scope="module")
def ntu_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 joints; actions of one person and, the last two, of two."""
    clips = synthetic_clips(clips=80, classes=18)
    return _train(clips, tmp_path_factory.mktemp("ntu"))


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 joints, one person, no names."""
    generator = np.random.default_rng(0)
    lengths = list(range(10, 50))
    joints = generator.standard_normal((sum(lengths), 1, SMALL.num_joints, 3), dtype=np.float32)
    labels = np.arange(40) % 4
    clips = Clips.pack(joints, lengths, labels, SMALL, splits={"xsub": np.arange(40) // 4 % 4 != 3})
    return _train(clips, tmp_path_factory.mktemp("small"))


def opened(run: Path) -> Opened:
    return open_run(run, device="cpu")


def bones_in(ax: Axes, *, ghosts: bool = False) -> int:
    """Drawn bones, or those of the pale shadow."""
    lines = [c for c in ax.collections if isinstance(c, LineCollection)]
    return sum(len(c.get_segments()) for c in lines if (c.get_zorder() == 1) == ghosts)


def failure(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command line that is refused says; one line, exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said
    return said


# skeletons


def test_sides_come_from_names_or_from_the_order_of_pairs() -> None:
    named = sides(NTU25)
    for joint, name in enumerate(NTU25.joint_names):
        assert named[joint] == (LEFT if "left" in name else RIGHT if "right" in name else MIDDLE)
    unnamed = replace(NTU25, joint_names=())
    assert sides(unnamed) == named
    swapped = sides(replace(unnamed, axis_x=unnamed.axis_x[::-1]))
    assert [{LEFT: RIGHT, RIGHT: LEFT}.get(side, side) for side in swapped] == named


def test_projection_is_seen_from_the_front() -> None:
    origin, right, forward, up = project(np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32))
    assert right[0] < origin[0]  # the body's right side is on our left
    assert abs(right[0]) > abs(forward[0]) > 0  # more from the front than from the side
    assert up[0] == pytest.approx(0) and up[1] > 0.9


@pytest.mark.parametrize("skeleton", [NTU25, SMALL], ids=["25 joints", "5 joints"])
@pytest.mark.parametrize("person", [0, 1])
def test_a_pose_has_every_bone_once(skeleton: Skeleton, person: int) -> None:
    points = np.random.default_rng(0).standard_normal((skeleton.num_joints, 2)).astype(np.float32)
    lines = draw_pose(style.figure(1).subplots(), points, skeleton, person)
    drawn = sorted(segment.ravel().tolist() for segment in lines.get_segments())
    assert drawn == sorted(points[list(bone)].ravel().tolist() for bone in skeleton.bones)
    # left and right differ in colour and in weight, so they do in grey too
    looks = {}
    for segment, color, width in zip(lines.get_segments(), lines.get_colors(), lines.get_linewidths()):
        joint = int(np.abs(points - segment[0]).sum(1).argmin())
        looks.setdefault(sides(skeleton)[joint], set()).add((to_hex(color), width))
    (left,), (right,) = looks[LEFT], looks[RIGHT]
    assert left[0] != right[0] and left[1] > right[1]


def test_the_second_person_is_dashed_with_a_hollow_head() -> None:
    ax = style.figure(1).subplots()
    points = np.zeros((25, 2), np.float32)
    first, second = (draw_pose(ax, points, NTU25, person) for person in (0, 1))
    assert first.get_linestyle()[0][1] is None and second.get_linestyle()[0][1] is not None
    heads = [c for c in ax.collections if isinstance(c, PathCollection)]
    assert [to_hex(head.get_facecolor()[0]) for head in heads] == ["#000000", "#ffffff"]


def test_strips_are_to_scale_and_inside_their_axes() -> None:
    clip = np.random.default_rng(0).standard_normal((9, 3, 25, 2)).astype(np.float32)
    ax = style.figure(2).subplots()
    draw_strip(ax, clip, NTU25, [0, 4, 8], [0, 1], behind=clip + 1)
    assert ax.get_aspect() == 1
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "5", "9"]
    assert bones_in(ax) == bones_in(ax, ghosts=True) == 3 * 2 * 24
    ends = np.concatenate(
        [segment for c in ax.collections if isinstance(c, LineCollection) for segment in c.get_segments()]
    )
    assert (ends[:, 0] > ax.get_xlim()[0]).all() and (ends[:, 0] < ax.get_xlim()[1]).all()
    assert (ends[:, 1] > ax.get_ylim()[0]).all() and (ends[:, 1] < ax.get_ylim()[1]).all()


def test_frames_are_the_middles_of_equal_parts() -> None:
    assert even_frames(32, 4) == [4, 12, 20, 28]
    assert even_frames(3, 6) == [0, 1, 2]


# curves


def write_log(folder: Path, lines: list[dict[str, object]]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def logged(steps: int = 30, warmup: int = 10, drop: int = 20) -> list[dict[str, object]]:
    lines: list[dict[str, object]] = [{"step": 0, "knn_top1": 20.0}]
    for step in range(1, steps + 1):
        warming = step <= warmup
        weak, strong, basic = (0.0, 0.0, 5.0) if warming else (4.0 - step / 30, 3.0, 5.0)
        lines.append(
            {
                "step": step,
                "stage": "warm-up" if warming else "train",
                "lr": 0.1 if step <= drop else 0.01,
                "loss": weak + strong + basic,
                "loss_weak": weak,
                "loss_strong": strong,
                "loss_basic": basic,
            }
        )
    return [*lines, {"step": steps, "knn_top1": 44.0}]


def test_curves_show_every_part_of_the_loss(tmp_path: Path) -> None:
    run = write_log(tmp_path / "long", logged())
    other = write_log(tmp_path / "short", logged(20))
    picture = curves([run, other])
    losses, other_losses, knn, _ = picture.axes
    assert [ax.get_title() for ax in (losses, other_losses)] == ["long", "short"]
    assert losses.get_ylabel() == "loss" and knn.get_ylabel() == "kNN top-1 accuracy (%)"
    assert knn.get_xlabel() == "training step"
    named = {line.get_label(): line for line in losses.get_lines()}
    for label, at, value in (("L", 30, 11.0), ("L1 (weak)", 30, 3.0), ("L2 (strong)", 30, 3.0)):
        assert (named[label].get_xdata()[-1], named[label].get_ydata()[-1]) == (at, pytest.approx(value))
    # L1 and L2 begin with the method proper
    assert min(named["L1 (weak)"].get_xdata()) == 11 and min(named["L3 (basic)"].get_xdata()) == 1
    looks = {(line.get_color(), str(line.get_linestyle()), line.get_linewidth()) for line in named.values()}
    assert len(looks) == len(named)
    (accuracy,) = [line for line in knn.get_lines() if line.get_label() == "kNN"]
    assert list(accuracy.get_ydata()) == [20.0, 44.0]


def test_curves_mark_the_warm_up_and_the_drops(tmp_path: Path) -> None:
    losses = curves([write_log(tmp_path / "run", logged())]).axes[0]
    (shade,) = [patch for patch in losses.patches if patch.get_label() == "warm-up (MoCo)"]
    assert (shade.get_x(), shade.get_width()) == (0, 10)
    (drop,) = [line for line in losses.get_lines() if line.get_label() == "learning rate drops"]
    assert drop.get_xdata()[0] == 20
    assert [text.get_text() for text in losses.texts] == ["×0.1"]


def test_the_methods_phase_has_room_after_a_long_warm_up(tmp_path: Path) -> None:
    losses = curves([write_log(tmp_path / "run", logged(40, warmup=30))]).axes[0]
    places = losses.transData.transform([(step, 1) for step in (0, 15, 30, 35, 40)])[:, 0]
    np.testing.assert_allclose((places - places[0]) / (places[-1] - places[0]), [0, 1 / 6, 1 / 3, 2 / 3, 1])
    assert set(losses.get_xticks()) == {0, 30, 33, 36, 39}


def test_drops_stand_on_lines_of_their_own_and_a_cosine_has_none(tmp_path: Path) -> None:
    for name, rates in (("two", (0.1, 0.05, 0.01)), ("cosine", np.linspace(0.1, 0, 30))):
        lines = [
            {**line, "lr": float(rates[min(len(rates) - 1, (int(line["step"]) - 1) * len(rates) // 30)])}  # type: ignore[call-overload]
            if "loss" in line
            else line
            for line in logged()
        ]
        losses = curves([write_log(tmp_path / name, lines)]).axes[0]
        marks = [text for text in losses.texts if text.get_text().startswith("×")]
        assert [text.get_text() for text in marks] == (["×0.5", "×0.2"] if name == "two" else [])
        assert len({text.xyann[1] for text in marks}) == len(marks)  # type: ignore[attr-defined]


def test_curves_count_epochs_after_the_warm_up(ntu_run: Path) -> None:
    steps = json.loads((ntu_run / "result.json").read_text())["steps"]
    (axis,) = curves([ntu_run]).axes[0].child_axes
    at = axis.get_xticks()
    assert axis.get_xlabel() == "epoch after the warm-up" and (at[0], at[-1]) == (0, 3)
    ends = axis._functions[0](np.array([6, steps]))  # type: ignore[attr-defined]
    np.testing.assert_allclose(ends, (0, 3))


def test_curves_hatch_what_the_log_has_lost(tmp_path: Path) -> None:
    lines = [line for line in logged() if not 12 < line["step"] <= 20]  # type: ignore[operator]
    lines.insert(13, {"step": 20, "lost": 8})
    losses = curves([write_log(tmp_path / "run", lines)]).axes[0]
    (gap,) = [patch for patch in losses.patches if patch.get_label() == "lines lost"]
    assert (gap.get_x(), gap.get_width()) == (12, 8)


def test_a_term_that_is_switched_off_has_no_curve(tmp_path: Path) -> None:
    lines = [{**line, "loss_weak": 0.0} if "loss" in line else line for line in logged()]
    labels = [line.get_label() for line in curves([write_log(tmp_path / "run", lines)]).axes[0].get_lines()]
    assert "L1 (weak)" not in labels and "L2 (strong)" in labels


@pytest.mark.parametrize("count, window", [(7, 3), (7, 4), (3, 5), (5, 1), (0, 3)])
def test_running_mean(count: int, window: int) -> None:
    values = np.random.default_rng(0).standard_normal(count)
    before = window // 2
    expected = [values[max(0, i - before) : i + window - before].mean() for i in range(count)]
    np.testing.assert_allclose(running_mean(values, window), expected)


def test_metrics_cut_off_at_the_end_are_read(tmp_path: Path) -> None:
    run = write_log(tmp_path / "run", logged())
    whole = read_metrics(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')
    assert read_metrics(run) == whole
    (run / "metrics.jsonl").write_text("not json\n" + json.dumps({"step": 1, "loss": 1.0}) + "\n")
    with pytest.raises(InputError, match="line 1 is not a metrics record"):
        read_metrics(run)


# t-SNE


def test_tsne_shows_every_clip_of_the_chosen_classes(ntu_run: Path) -> None:
    run = opened(ntu_run)
    _, test = run.clips.split("xsub")
    count = Counter(run.clips.labels[test].tolist())
    picture = tsne(run, classes=[0, 3, 5], untrained=True)
    panels = picture.axes
    assert [ax.get_title().split("\n")[0] for ax in panels] == ["untrained", "trained"]
    for ax in panels:
        groups = [c for c in ax.collections if isinstance(c, PathCollection)]
        names = [f"{run.clips.class_names[c]} ({count[c]})" for c in (0, 3, 5)]
        assert [g.get_label() for g in groups] == names
        assert [len(g.get_offsets()) for g in groups] == [count[c] for c in (0, 3, 5)]
        assert ax.get_xlabel() == "t-SNE 1" and len(ax.get_xticks()) == 0
    again = tsne(run, classes=[5, 3, 0]).axes[0].collections
    for a, b in zip(panels[1].collections, again):
        np.testing.assert_array_equal(a.get_offsets(), b.get_offsets())


def test_tsne_defaults_to_ten_classes(ntu_run: Path) -> None:
    groups = tsne(opened(ntu_run)).axes[0].collections
    assert len(groups) == 10
    # colours come again after eight, hollow and with another marker
    assert to_hex(groups[8].get_facecolor()[0]) == "#ffffff" != to_hex(groups[0].get_facecolor()[0])
    shapes = [group.get_paths()[0].vertices.tobytes() for group in groups]
    assert len(set(shapes)) == 10


def test_marks_are_all_different() -> None:
    marks = [
        (m["marker"], m["facecolors"] == "white", m["edgecolors"], m["facecolors"])
        for m in map(style.mark, range(20))
    ]
    assert len(set(marks)) == 20


def test_neighbour_agreement_leaves_the_clip_itself_out() -> None:
    features = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]])
    assert neighbour_agreement(features, torch.tensor([0, 0, 1, 1])) == 100
    assert neighbour_agreement(features, torch.tensor([0, 1, 0, 0])) == 50
    assert neighbour_agreement(features, torch.arange(4)) == 0


# confusion


@pytest.fixture
def result(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: object, names: object = (), name: str = "linear.json") -> Path:
        content = {
            "confusion": rows,
            "class_names": names,
            "protocol": "linear",
            "split": "xsub",
            "run": "runs/demo",
            "format": "a2mc-evaluation/1",
            **dict.fromkeys(("data", "stream", "encoder"), "x"),
        }
        (tmp_path / name).write_text(json.dumps(content))
        return tmp_path / name

    return write


ROWS = [[8, 2, 0], [1, 3, 0], [0, 0, 0]]


def test_confusion_shows_percents_of_the_true_class(result: Callable[..., Path]) -> None:
    ax = confusion([result(ROWS, ["sit", "stand", "wave"])]).axes[0]
    shown = np.ma.filled(ax.images[0].get_array(), np.nan)
    np.testing.assert_allclose(shown, [[80, 20, 0], [25, 75, 0], [np.nan] * 3])
    cells = {tuple(map(int, t.get_position())): t.get_text() for t in ax.texts if t.get_text() != "no clips"}
    assert cells == {(0, 0): "80", (1, 0): "20", (0, 1): "25", (1, 1): "75"}
    assert "no clips" in [t.get_text() for t in ax.texts]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted class", "true class")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["sit", "stand", "wave"]
    assert ax.get_title() == "demo: linear xsub\ntop-1 78.6 % of 14 clips"


def test_confusion_of_some_classes_keeps_the_whole_row(result: Callable[..., Path]) -> None:
    ax = confusion([result(ROWS)], classes=[1]).axes[0]
    np.testing.assert_allclose(ax.images[0].get_array(), [[75]])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1"]


def test_a_folder_stands_for_the_results_in_it(result: Callable[..., Path], tmp_path: Path) -> None:
    (folder,) = {result(ROWS, name=f"{name}.json").parent for name in ("knn", "linear", "semi")}
    for file in ("semi.json", "config.json"):
        content = json.loads((folder / "semi.json").read_text())
        content.pop("confusion", None), content.pop("format" if file == "config.json" else "", None)
        (folder / file).write_text(json.dumps(content))
    assert len(confusion([folder]).axes) == 3  # two and the colours
    for file in ("knn.json", "linear.json"):
        (folder / file).unlink()
    with pytest.raises(InputError, match="holds no result with a confusion matrix"):
        confusion([folder])


def test_numbers_of_bars_do_not_collide() -> None:
    figure = Figure()
    probability = torch.full((60,), 0.005)
    probability[torch.tensor([20, 21, 22, 40, 41])] = torch.tensor([0.10, 0.101, 0.102, 0.10, 0.04])
    _bars(figure.subplots(), probability, 0.102)
    at = {text.get_text(): text.xy for text in figure.axes[0].texts}  # type: ignore[attr-defined]
    assert at["20"][1] + 0.9 < at["21"][1] and at["21"][1] + 0.9 < at["22"][1]
    assert at["40"][1] == pytest.approx(10) and at["41"][1] == pytest.approx(4)  # far enough apart


def test_confusions_stand_side_by_side_on_one_scale(result: Callable[..., Path]) -> None:
    many = np.eye(40, dtype=int).tolist()
    picture = confusion([result(ROWS), result(many, name="b.json")])
    first, second, bar = picture.axes
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0, 100)
    assert bar.get_ylabel() == "share of the true class's clips (%)"
    assert not second.texts  # forty classes leave no room for numbers


# attack


@pytest.mark.parametrize("which", ["ntu_run", "small_run"])
def test_attack_shows_four_stages_with_their_distributions(
    which: str, request: pytest.FixtureRequest
) -> None:
    run = opened(request.getfixturevalue(which))
    clips = run.clips
    number = next(i for i in range(len(clips)) if clips.num_persons == 1 or int(clips.labels[i]) >= 16)
    persons, bones = clips.num_persons, clips.skeleton.num_joints - 1
    stages = attacked_stages(run, number, 0)
    axes = attack(run, clip=str(number), frames=4).axes
    strips, bars = axes[::2], axes[1::2]
    assert [ax.get_title(loc="left").split(" ")[0].rstrip(",") for ax in strips] == [
        "original",
        "attacked",
        "weak",
        "strong",
    ]
    assert [bones_in(ax) for ax in strips] == [4 * persons * bones] * 4
    assert [bones_in(ax, ghosts=True) for ax in strips] == [0, 4 * persons * bones, 0, 0]
    for ax, stage in zip(bars, stages):
        heights = np.array([bar.get_height() for bar in ax.patches])
        assert len(heights) == clips.num_classes and heights.sum() == pytest.approx(100, rel=1e-5)
        np.testing.assert_allclose(heights, 100 * stage.probability.numpy(), rtol=1e-5)
        hatched = {i for i, bar in enumerate(ax.patches) if bar.get_hatch()}
        assert hatched == set(np.argsort(-heights)[:5].tolist())
        assert {text.get_text() for text in ax.texts} == {str(i) for i in hatched}
        assert ax.get_ylabel() == "probability (%)"


def test_attacked_stages_are_those_of_the_model(ntu_run: Path) -> None:
    run = opened(ntu_run)
    number = int((run.clips.labels < 16).nonzero()[0])  # an action of one person
    stages = attacked_stages(run, number, 0)
    model = weights.whole(checkpoint.load(ntu_run)).eval()
    whole = run.views.whole(torch.tensor([number]))
    assert torch.equal(stages[0].clip, whole)
    torch.testing.assert_close(stages[0].probability, model.classify(whole).softmax(1)[0])
    rho = stages[1].clip - whole
    torch.testing.assert_close(rho, model.attack(whole), rtol=0, atol=1e-6)
    assert rho.abs().max() > 0 and torch.linalg.vector_norm(rho, dim=(2, 3)).max() <= 0.5 + 1e-5
    # a clip of one person stays one
    assert bones_in(attack(run, clip=str(number), frames=2).axes[3 * 2]) == 2 * 24


def test_a_clip_is_found_by_name_then_by_number(small_run: Path) -> None:
    run = opened(small_run)
    names = list(run.clips.names)
    names[7] = "3"
    run = replace(run, clips=replace(run.clips, names=tuple(names)))
    assert find_clip(run, "3") == 7 and find_clip(run, "4") == 4 and find_clip(run, "clip 9") == 9
    assert find_clip(run, "") == int(run.clips.split("xsub")[1][0])


# neighbours


def test_neighbours_are_the_nearest_training_clips(ntu_run: Path) -> None:
    run = opened(ntu_run)
    train_index, test_index = run.clips.split("xsub")
    branch = checkpoint.load(ntu_run).branch()
    for match in nearest(run, 4, 3, 0):
        assert match.query in test_index
        feature = encode(branch, run.views, torch.tensor([match.query]))
        similarity = torch.cosine_similarity(feature, encode(branch, run.views, train_index))
        expected = similarity.topk(3)
        assert match.neighbours == train_index[expected.indices].tolist()
        assert match.similarity == pytest.approx(expected.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("which", ["ntu_run", "small_run"])
def test_neighbours_mark_the_query_s_class(which: str, request: pytest.FixtureRequest) -> None:
    run = opened(request.getfixturevalue(which))
    found = nearest(run, 3, 2, 0)
    axes = np.array(neighbours(run, queries=3, k=2, frames=2).axes).reshape(3, 3)
    labels = run.clips.labels
    seen = set()
    for row, match in zip(axes, found):
        assert row[0].get_title().startswith("query\n") and not row[0].spines["left"].get_visible()
        for ax, number in zip(row[1:], match.neighbours):
            same = bool(labels[number] == labels[match.query])
            seen.add(same)
            assert ax.get_title()[0] == "✗✓"[same]
            assert (ax.spines["left"].get_linestyle() == "-") == same
        assert len({(*ax.get_ylim(), ax.get_aspect()) for ax in row}) == 1  # one scale for a row
    assert False in seen
    lone = [clip for clip in found if run.clips.num_persons == 1 or int(labels[clip.query]) < 16]
    assert bones_in(axes[found.index(lone[0])][0]) == 2 * (run.clips.skeleton.num_joints - 1)


def test_queries_come_from_different_classes_first() -> None:
    labels = torch.tensor([0] * 20 + [1] * 3 + [2])
    index = torch.arange(24) + 100
    chosen = spread_over_classes(index, labels, 5, 0)
    assert sorted(labels[chosen[:3] - 100].tolist()) == [0, 1, 2]
    assert Counter(labels[chosen - 100].tolist()) == {0: 2, 1: 2, 2: 1}
    assert len(set(chosen.tolist())) == 5
    assert spread_over_classes(index, labels, 5, 1).tolist() != chosen.tolist()


# files and errors


@pytest.mark.parametrize("suffix, start", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_the_suffix_decides_and_equal_pictures_are_equal_files(
    result: Callable[..., Path], tmp_path: Path, suffix: str, start: bytes
) -> None:
    paths = [tmp_path / f"{name}.{suffix}" for name in "ab"]
    for path in paths:
        main(["confusion", str(result(ROWS)), "--out", str(path)])
    a, b = (path.read_bytes() for path in paths)
    assert a == b and a.startswith(start)


def test_a_picture_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "x.png"
    out.write_bytes(b"old")

    def broken(self: Figure, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"part")
        raise OSError("no space")

    monkeypatch.setattr(Figure, "savefig", broken)
    with pytest.raises(OSError, match="no space"):
        write_picture(out, lambda: style.figure(1))
    assert out.read_bytes() == b"old" and [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_bad_input_is_one_sentence(
    result: Callable[..., Path],
    tmp_path: Path,
    small_run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    good, plain = result(ROWS), tmp_path / "knn.json"
    whole = json.loads(good.read_text())
    plain.write_text(json.dumps({name: value for name, value in whole.items() if name != "confusion"}))
    run, nowhere = str(small_run), str(tmp_path / "nowhere")
    empty = str(write_log(tmp_path / "empty", [{"step": 0, "knn_top1": 3.0}]))
    for args, words in (
        (["curves", nowhere], "metrics.jsonl not found: is .* the folder of a run"),
        (["curves", empty], "holds no logged step yet"),
        (["curves", *[run] * 5], "1 to 4 runs side by side, got 5"),
        (["confusion", str(good), "--out", "x.bmp"], "the suffix must be .png, .pdf, .svg"),
        (["confusion", str(plain)], "holds no confusion matrix"),
        (["confusion", str(tmp_path / "none.json")], "not found; make it with"),
        (["confusion", str(good), "--classes", "1", "9"], "--classes 9: .* has classes 0 to 2"),
        (["tsne", run, "--classes", "0", "8"], "--classes 8: .* no test clip of that class"),
        (["tsne", run, "--split", "xview"], "no protocol 'xview'"),
        (["tsne", nowhere], "nowhere not found: is this the folder of a run"),
        (["attack", run, "--clip", "99"], "no clip has that name or number; numbers go from 0 to 39"),
        (["attack", run, "--clip", "somebody"], "names look like 'clip 0'"),
    ):
        said = failure(args, capsys)
        assert re.search(words, said), (args, said)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".png", ".bmp")]


@pytest.mark.parametrize("rows", [[[1, 2]], [[1, 2], [3]], [[1, -1], [0, 1]], "x", [], None, [["a"]]])
def test_a_confusion_that_is_no_matrix_of_counts(result: Callable[..., Path], rows: object) -> None:
    with pytest.raises(InputError, match=r"confusion.* must be|holds no confusion matrix"):
        confusion([result(rows)])


def test_class_names_must_fit(result: Callable[..., Path]) -> None:
    for names in (["one"], 5, {"a": 1}):
        with pytest.raises(InputError, match="class_names must be a list"):
            confusion([result(ROWS, names)])


def test_data_of_another_skeleton_is_refused(small_run: Path, ntu_run: Path) -> None:
    data = str(ntu_run.parent / "clips.safetensors")
    with pytest.raises(InputError, match=r"on 5 joints and 1 persons, .* has 25 joints and 2 persons"):
        open_run(small_run, data, device="cpu")


def test_help_is_instant() -> None:
    code = (
        "import sys\nfrom a2mc_fast.plots.__main__ import main\n"
        "try: main([*sys.argv[1:], '--help'])\nexcept SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'matplotlib', 'sklearn'} & set(sys.modules), 'slow'"
    )
    done = subprocess.run([sys.executable, "-c", code, "attack"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--clip" in done.stdout


def test_without_the_extra_it_says_how_to_install(result: Callable[..., Path]) -> None:
    code = (
        "import sys\nsys.modules['matplotlib'] = None\n"
        "from a2mc_fast.plots.__main__ import main\nmain(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "confusion", str(result(ROWS))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "error: pictures need matplotlib, which is not installed: pip install 'a2mc_fast[plots]'\n"
    )
