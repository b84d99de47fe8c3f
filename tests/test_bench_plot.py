"""The speed figure says what the recorded files say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from a2mc_fast.errors import InputError
from bench.plot import PHASES, main, ratios, speed, sweeps, varied
from bench.records import Record, Results, read, recorded_files, write

Write = Callable[..., Path]


@pytest.fixture
def recorded(tmp_path: Path) -> Write:
    def file(*records: Record, name: str = "gpu.json", device: str = "Some GPU", note: str = "") -> Path:
        machine = {"device": device, "torch": "2.13.0", "commit": "abc"}
        date = "2026-11-23T10:00:00"
        write(tmp_path / name, Results(machine=machine, date=date, note=note, records=records))
        return tmp_path / name

    return file


def sweep() -> list[Record]:
    """Two forms at five sizes, and a third at one."""

    def timed(form: str, n: int, k: int, mix: int, ms: float) -> Record:
        sizes = {"N": n, "K": k, "mix": mix}
        return Record(what="loss", form=form, sizes=sizes, ms=ms, p20=0.9 * ms, p80=1.5 * ms, MiB=3.0)

    sizes = [(64, k, 4) for k in (16384, 4096, 65536)] + [(32, 16384, 4), (64, 16384, 0)]
    found = []
    for n, k, mix in sizes:
        found += [timed("ours", n, k, mix, k / 1e4), timed("eager", n, k, mix, k / 1e3)]
    return [*found, timed("literal", 64, 4096, 4, 409.6)]


def lines_of(ax: Axes) -> dict[str, Any]:
    """Each form's (line, caps, bars)."""
    return {container.get_label(): container for container in ax.containers}


def test_launch_sizes_are_not_drawn(recorded: Write) -> None:
    sizes = [replace(record, what="launch sizes of the loss") for record in sweep()]
    assert len(speed((recorded(*sweep(), *sizes),)).axes) == len(speed((recorded(*sweep()),)).axes)


def test_time_over_k_with_whiskers_and_ratios(recorded: Write) -> None:
    over_k, over_n, over_mix = speed((recorded(*sweep()),)).axes
    forms = lines_of(over_k)
    assert list(forms) == ["ours", "eager torch", "literal, mixed banks stored"]
    line, _, (bars,) = forms["ours"]
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
    def timed(n: int, k: int) -> Record:
        return Record(what="x", sizes={"N": n, "K": k}, ms=1.0)

    records = [timed(64, 4), timed(64, 1), timed(32, 4)]
    assert [r.sizes for r in varied(records, "K")] == [{"N": 64, "K": 1}, {"N": 64, "K": 4}]
    assert [r.sizes["N"] for r in varied(records, "N")] == [32, 64]
    assert varied(records[:1], "K") == []


def test_one_form_alone_is_compared_with_nothing(recorded: Write) -> None:
    alone = [Record(what="x", case=case, sizes={"N": n}, ms=1.0) for case in "ab" for n in (1, 2)]
    assert sweeps(tuple(alone)) == {} and ratios(tuple(alone)) == []


PHASE_TIMES = dict(zip(PHASES, (3.0, 14.0, 1.0, 18.0, 1.5, 20.0, 2.0, 0.5)))


def test_bars_stack_the_phases(recorded: Write) -> None:
    share = {"share of a large product's rate": 0.21}
    step = Record(what="training step", case="bigru", ms=55.0, per_second=1163.6, numbers=share)
    path = recorded(replace(step, phases=PHASE_TIMES))
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


def test_steps_of_several_files_stand_below_each_other(recorded: Write) -> None:
    step = Record(what="training step", phases=PHASE_TIMES)
    a = recorded(step, name="a.json", device="A")
    b = recorded(replace(step, phases={"views": 1.0, "backward": 2.0}), name="b.json", device="B", note="hot")
    picture = speed((a, b))
    ax = picture.axes[0]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a", "b"]
    total = np.sum([[bar.get_width() for bar in c.patches] for c in ax.containers], 0)
    np.testing.assert_allclose(total, [100, 100])
    caption = picture.get_supxlabel().split("\n")
    assert caption == [
        "(a): A, torch 2.13.0, commit abc, 2026-11-23",
        "(a): B, torch 2.13.0, commit abc, 2026-11-23",
        "hot",
    ]


def test_comparisons_count_rates_then_memory_then_time(recorded: Write) -> None:
    def pair(what: str, other: str, **numbers: tuple[float, float]) -> list[Record]:
        return [
            Record(what=what, form=form, **{name: values[number] for name, values in numbers.items()})
            for number, form in enumerate(("ours", other))
        ]

    records = [
        *pair("read", "public", per_second=(100.0, 5.0), ms=(2.0, 2.0)),
        *pair("memory", "whole", MiB=(10.0, 30.0)),
        *pair("loss", "literal", ms=(2.0, 8.0), MiB=(1.0, 99.0)),
        Record(what="alone", form="whole", ms=1.0),
    ]
    path = recorded(*records)
    expected = [("read: public", 20), ("loss: literal, mixed banks stored", 4), ("memory: whole", 3)]
    assert [(r.name, r.times) for r in ratios(read(path).records)] == expected
    (ax,) = speed((path,)).axes
    assert [bar.get_width() for bar in ax.patches] == [times for _, times in expected]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [name for name, _ in expected]
    assert [t.get_text() for t in ax.texts] == ["20.0×", "4.0×", "3.0×"]


def test_the_recorded_files_are_drawn(tmp_path: Path) -> None:
    recorded = [read(path) for path in recorded_files()]
    assert sum(len(sweeps(one.records)) for one in recorded) >= 2
    assert sum(bool(r.phases) for one in recorded for r in one.records) >= 5
    picture = speed(())
    named = "".join(ax.get_title(loc="left") for ax in picture.axes)
    assert "training step by phase" in named and "ours against others" in named
    caption = picture.get_supxlabel()
    assert all(one.caption in caption for one in recorded)
    main(["--out", str(tmp_path / "speed.svg")])
    assert (tmp_path / "speed.svg").read_bytes().startswith(b"<?xml")


def test_bad_files_are_one_sentence(
    recorded: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text('{"benchmarks": [1]}')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "odd.json").write_text('{"machine": {}, "date": "", "records": [{"what": "x", "ms": "1"}]}')
    for path, words in (
        (tmp_path / "none.json", "none.json not found; make it with: pytest bench"),
        (tmp_path / "other.json", "is not a file of records"),
        (tmp_path / "broken.json", "is not JSON"),
        (tmp_path / "odd.json", "records[0].ms must be"),
        (recorded(Record(what="x")), "holds nothing to draw"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([str(path), "--out", str(tmp_path / "x.png")])
        said = capsys.readouterr().err.strip()
        assert stopped.value.code == 2 and words in said and "\n" not in said
    assert not (tmp_path / "x.png").exists()
    with pytest.raises(InputError, match="the suffix must be"):
        from a2mc_fast.plots.output import write_picture

        write_picture(tmp_path / "x.txt", lambda: speed(()))
