"""The speed figure says what the recorded files say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from a2mc_fast.errors import InputError
from bench.plot import (
    PHASES,
    Point,
    baseline,
    main,
    ratios,
    read,
    recorded_files,
    speed,
    steps,
    sweeps,
    varied,
)

Write = Callable[..., Path]


def benchmark(name: str, median: float = 1.0, bench: str = "kernels", **extra: Any) -> dict[str, Any]:
    return {
        "name": name,
        "fullname": f"bench/bench_{bench}.py::{name}",
        "extra_info": extra,
        "stats": {"median": median},
    }


def form(ms: float) -> dict[str, float]:
    return {"ms": ms, "p20": 0.9 * ms, "p80": 1.5 * ms, "MiB": 3.0, "TFLOP/s": 7.0}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def record(*benchmarks: dict[str, Any], name: str = "gpu.json", device: str = "Some GPU") -> Path:
        content = {
            "machine_info": {"device": device, "torch": "2.13.0", "commit": "abc"},
            "datetime": "2026-11-23T10:00:00",
            "benchmarks": list(benchmarks),
        }
        (tmp_path / name).write_text(json.dumps(content))
        return tmp_path / name

    return record


def sweep() -> list[dict[str, Any]]:
    sizes = [(64, k, 4) for k in (16384, 4096, 65536)] + [(32, 16384, 4), (64, 16384, 0)]
    return [
        benchmark(
            f"test_loss[N{n}-K{k}-mix{m}]",
            triton=form(k / 1e4),
            eager=form(k / 1e3),
            **({"literal": form(k / 10)} if k < 10000 else {}),
        )
        for n, k, m in sizes
    ]


def lines_of(ax: Axes) -> dict[str, Any]:
    """Each form's (line, caps, bars)."""
    return {container.get_label(): container for container in ax.containers}


def test_time_over_k_with_whiskers_and_ratios(write: Write) -> None:
    over_k, over_n, over_mix = speed((write(*sweep()),)).axes
    forms = lines_of(over_k)
    assert list(forms) == ["Triton kernel (ours)", "eager torch, single pass", "literal, mixed banks stored"]
    line, _, (bars,) = forms["Triton kernel (ours)"]
    np.testing.assert_allclose(line.get_xdata(orig=False), [4096, 16384, 65536])
    np.testing.assert_allclose(line.get_ydata(orig=False), [0.4096, 1.6384, 6.5536])
    whiskers = np.array([segment[:, 1] for segment in bars.get_segments()])
    np.testing.assert_allclose(whiskers, np.outer(line.get_ydata(orig=False), (0.9, 1.5)))
    looks = {(to_hex(c[0].get_color()), c[0].get_marker()) for c in forms.values()}
    assert len(looks) == 3
    # at each form's last size: 10 times at K = 65,536, 1,000 times at 4,096
    assert [text.get_text() for text in over_k.texts] == ["10.0×", "1,000×"]
    assert over_k.get_title(loc="left") == "(a) N = 64, 4 shares"
    assert over_k.get_xlabel() == "bank rows K (k = 1,024)" and over_k.get_ylabel() == "time (ms)"
    assert [tick.get_text() for tick in over_k.get_xticklabels()] == ["4k", "16k", "64k"]
    assert (over_n.get_xlabel(), over_mix.get_xlabel()) == ("clips per step N", "mixing shares")
    assert [t.get_text() for t in over_mix.get_xticklabels()] == ["0", "4"]


def test_a_panel_varies_one_size_alone() -> None:
    def point(n: int, k: int) -> Point:
        return Point(size={"N": n, "K": k}, forms={})

    points = [point(64, 4), point(64, 1), point(32, 4)]
    assert [p.size for p in varied(points, "K")] == [{"N": 64, "K": 1}, {"N": 64, "K": 4}]
    assert [p.size["N"] for p in varied(points, "N")] == [32, 64]
    assert varied(points[:1], "K") == []


@pytest.mark.parametrize(
    "forms, ours", [("ours triton eager", "ours"), ("eager triton", "triton"), ("compiled eager", "eager")]
)
def test_ratios_are_to_the_fastest_form_of_ours(forms: str, ours: str) -> None:
    assert baseline([Point(size={}, forms=dict.fromkeys(forms.split(), (1, 1, 1)))]) == ours


PHASE_TIMES = dict(zip(PHASES, (3.0, 14.0, 1.0, 18.0, 1.5, 20.0, 2.0, 0.5)))


def test_bars_stack_the_phases(write: Write) -> None:
    notes = {"clips per second": 1163.6, "MFU": 0.21, "phases": PHASE_TIMES}
    path = write(benchmark("test_step_by_phase[bigru]", milliseconds=55.0, **notes))
    (ax,) = speed((path,)).axes
    by_phase = {c.get_label(): c.patches[0] for c in ax.containers}
    shares = {name: 100 * ms / sum(PHASE_TIMES.values()) for name, ms in PHASE_TIMES.items()}
    assert {name: bar.get_width() for name, bar in by_phase.items()} == pytest.approx(shares)
    end = 0.0
    for name in PHASES:
        assert by_phase[name].get_x() == pytest.approx(end)
        end += by_phase[name].get_width()
    assert end == pytest.approx(100)
    assert [text.get_text() for text in ax.texts] == ["55 ms per step, 1,164 clips/s, MFU 21.0%"]
    assert ax.get_xlabel() == "share of the step under the profiler (%)"
    looks = {(to_hex(b.get_facecolor()), b.get_hatch()) for b in by_phase.values()}
    assert len({color for color, _ in looks}) == len({hatch for _, hatch in looks}) == len(PHASES)


def test_steps_of_several_files_stand_below_each_other(write: Write) -> None:
    a = write(benchmark("test_step", phases=PHASE_TIMES), name="a.json", device="A")
    b = write(benchmark("test_step", phases={"views": 1.0, "backward": 2.0}), name="b.json", device="B")
    picture = speed((a, b))
    ax = picture.axes[0]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a", "b"]
    total = np.sum([[bar.get_width() for bar in c.patches] for c in ax.containers], 0)
    np.testing.assert_allclose(total, [100, 100])
    caption = picture.get_supxlabel().split("\n")
    assert caption == [
        "(a): A, torch 2.13.0, commit abc, 2026-11-23",
        "(a): B, torch 2.13.0, commit abc, 2026-11-23",
    ]


def test_comparisons_count_rates_then_memory_then_time(write: Write) -> None:
    path = write(
        benchmark("test_read[ours]", 2.0, "data", files_per_second=100.0),
        benchmark("test_read[public]", 2.0, "data", files_per_second=5.0),
        benchmark("test_memory[ours]", 2.0, "losses", **{"extra bytes": 10}),
        benchmark("test_memory[whole]", 2.0, "losses", **{"extra bytes": 30}),
        benchmark("test_loss[ours]", 2.0, "losses"),
        benchmark("test_loss[whole]", 8.0, "losses"),
        benchmark("test_against_a_public_style_trainer", 1.0, "step", ratio=16.2),
        benchmark("test_a_hundred_times_faster_than_literal", 1.0, "losses", **{"times faster": 731}),
        benchmark("test_alone[whole]", 1.0, "step"),
    )
    expected = [
        ("losses: literal", 731),
        ("data: read: public", 20),
        ("step: public style trainer", 16.2),
        ("losses: loss: whole", 4),
        ("losses: memory: whole", 3),
    ]
    assert [(r.name, r.times) for r in ratios(read(path))] == expected
    (ax,) = speed((path,)).axes
    assert [bar.get_width() for bar in ax.patches] == [times for _, times in expected]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [name for name, _ in expected]
    assert [t.get_text() for t in ax.texts] == ["731×", "20.0×", "16.2×", "4.0×", "3.0×"]


def test_the_recorded_files_are_drawn(tmp_path: Path) -> None:
    recorded = [read(path) for path in recorded_files()]
    assert sum(map(len, map(sweeps, recorded))) >= 2 and sum(map(len, map(steps, recorded))) >= 1
    picture = speed(())
    named = "".join(ax.get_title(loc="left") for ax in picture.axes)
    assert "training step by phase" in named and "ours against others" in named
    caption = picture.get_supxlabel()
    assert all(one.machine in caption for one in recorded)
    main(["--out", str(tmp_path / "speed.svg")])
    assert (tmp_path / "speed.svg").read_bytes().startswith(b"<?xml")


def test_bad_files_are_one_sentence(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text('{"benchmarks": [1]}')
    (tmp_path / "broken.json").write_text("{")
    for path, words in (
        (tmp_path / "none.json", "none.json not found; make it with: pytest bench"),
        (tmp_path / "other.json", "is not a file of pytest --benchmark-json"),
        (tmp_path / "broken.json", "is not JSON"),
        (write(benchmark("test_x")), "holds nothing to draw"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([str(path), "--out", str(tmp_path / "x.png")])
        said = capsys.readouterr().err.strip()
        assert stopped.value.code == 2 and words in said and "\n" not in said
    assert not (tmp_path / "x.png").exists()
    with pytest.raises(InputError, match="the suffix must be"):
        from a2mc_fast.plots.output import write_picture

        write_picture(tmp_path / "x.txt", lambda: speed(()))
