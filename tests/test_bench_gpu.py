"""The command for a lent GPU, without one: its runner with toy parts, its table, and the real parts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from a2mc_fast.errors import InputError
from bench import gpu
from bench.records import Outcome, Record, Recorder, Results, read, write
from bench.runner import Part, Runner
from bench.table import TARGETS, table

ROOT = Path(__file__).parent.parent
START = Results(machine={"device": "Some GPU", "torch": "2.11"}, date="2026-11-27T10:00:00+00:00")
RECORDED = json.dumps({"machine": {}, "date": "", "records": [{"what": "half", "ms": 1.5}]})
WRITES = f"open(sys.argv[1], 'w').write({RECORDED!r}); "


def part(name: str, code: str, seconds: float = 20.0, **options: bool) -> Part:
    command = ("-c", f"import os, sys, time; {code}", "{record}")
    return Part(name=name, command=command, seconds=seconds, **options)


def run(tmp_path: Path, *parts: Part, seconds: float = 60.0, beside: float = 40.0) -> dict[str, Outcome]:
    """How each part went; results lie in tmp_path / "out"."""
    out, work = tmp_path / "out", tmp_path / "work"
    for folder in (out, work):
        folder.mkdir()
    now = time.monotonic()
    runner = Runner(out, work, START, now + seconds, {"SHARED": "yes"}, at_once=4)
    runner.run(parts, now + beside)
    assert {path.name for path in out.iterdir()} == {"gpu.json", "logs.txt"}
    told = read(out / "gpu.json")
    assert told == runner.results and told.machine == START.machine
    return {outcome.part: outcome for outcome in told.parts}


def test_what_fails_hangs_or_chatters_does_not_stop_the_rest(tmp_path: Path) -> None:
    began = time.monotonic()
    went = run(
        tmp_path,
        part("chatty", "print('x' * 1_000_000); print('the end')"),
        part("failing", "print('before'); sys.exit('it broke')"),
        part("hanging", WRITES + "print('so far', flush=True); time.sleep(60)", 1.0),
        part("half-written", "open(sys.argv[1], 'w').write('{'); print('fine')"),
        part("last", "assert os.environ['SHARED'] == 'yes'; print('well')"),
    )
    assert time.monotonic() - began < 30
    assert {name: outcome.outcome for name, outcome in went.items()} == {
        "chatty": "passed",
        "failing": "failed",
        "hanging": "out of time",
        "half-written": "failed",
        "last": "passed",
    }
    assert went["chatty"].note == "the end" and went["last"].note == "well"
    assert "it broke" in went["failing"].note and "exit code 1" in went["failing"].note
    assert "is not JSON" in went["half-written"].note
    # what it had recorded is kept, and so is where it hung
    assert [r.what for r in read(tmp_path / "out" / "gpu.json").records] == ["half"]
    logs = (tmp_path / "out" / "logs.txt").read_text()
    assert "so far" in logs and "=== last: passed" in logs
    assert len(logs) < 300_000 and "[...]" in logs


def test_records_are_kept_while_a_part_runs(tmp_path: Path) -> None:
    """The second part reads the first one's records, and its own, from the results so far."""
    own = f"import json; {WRITES} time.sleep(0.5); "
    names = "[r['what'] for r in json.load(open('{}'))['records']]".format(tmp_path / "out" / "gpu.json")
    went = run(tmp_path, part("one", WRITES), part("two", f"{own} print({names})"))
    assert went["two"].note == "['half', 'half']"


def test_neighbours_run_side_by_side_and_timed_parts_alone(tmp_path: Path) -> None:
    meet = (
        "open('{0}/' + {1!r}, 'w').close(); "
        "[time.sleep(0.01) for _ in range(1500) if not os.path.exists('{0}/' + {2!r})]; "
        "assert os.path.exists('{0}/' + {2!r})"
    )
    lonely = (
        f"p = '{tmp_path}/lock'; assert not os.path.exists(p); open(p, 'w'); time.sleep(0.3); os.remove(p)"
    )
    went = run(
        tmp_path,
        part("a", meet.format(tmp_path, "a", "b"), alone=False),
        part("b", meet.format(tmp_path, "b", "a"), alone=False),
        part("c", lonely),
        part("d", lonely),
    )
    assert {outcome.outcome for outcome in went.values()} == {"passed"}, went


def test_a_timed_part_prepares_beside_others_and_waits_for_its_turn(tmp_path: Path) -> None:
    prepare = "from bench.runner import wait_for_turn; print('ready'); wait_for_turn(); "
    lonely = f"p = '{tmp_path}/lock'; assert not os.path.exists(p); open(p, 'w'); "
    lonely += f"time.sleep(0.3); os.remove(p); open('{tmp_path}/order', 'a').write({{!r}})"
    waiting = f"len(glob.glob('*.ready', root_dir={str(tmp_path / 'work')!r}))"
    ready = f"import glob; [time.sleep(0.01) for _ in range(2000) if {waiting} < 2]; assert {waiting} == 2"
    went = run(
        tmp_path,
        # ends when both wait, so they were started beside it
        part("beside", ready, alone=False),
        part("no waiting", lonely.format("1")),
        part("first", prepare + lonely.format("2"), waits=True),
        part("second", prepare + lonely.format("3"), waits=True),
        part("broken", "sys.exit('broken before its turn')", waits=True),
    )
    assert [outcome.outcome for outcome in went.values()] == ["passed"] * 4 + ["failed"], went
    assert (tmp_path / "order").read_text() == "123"


def test_a_part_that_is_not_ready_in_time_goes_on_in_its_turn(tmp_path: Path) -> None:
    slow = "from bench.runner import wait_for_turn; time.sleep(2); wait_for_turn(); print('done')"
    went = run(tmp_path, part("slow", slow, waits=True), part("slower", slow, waits=True), beside=0.8)
    assert [outcome.note for outcome in went.values()] == ["done", "done"], went


def test_what_no_longer_fits_is_not_run(tmp_path: Path) -> None:
    went = run(tmp_path, part("long", "time.sleep(60)", 6.0), part("late", "print(1)", 6.0), seconds=3.0)
    assert went["late"].outcome == "not run" and went["long"].outcome == "out of time"
    assert went["long"].seconds < 5


def test_a_part_ends_with_all_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    child = f"import subprocess; p = subprocess.Popen(['sleep', '300']); open('{pid}', 'w').write(str(p.pid))"
    run(tmp_path, part("ends", child), part("next", "time.sleep(0.2)"))
    status = Path(f"/proc/{pid.read_text()}/status")
    assert not status.exists() or "zombie" in status.read_text()


def test_the_runner_takes_its_parts_along_when_it_is_told_to_end(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = f"""if True:
        import signal, time
        from pathlib import Path
        from tests.test_bench_gpu import part, run
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        hangs = "open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(300)"
        run(Path({str(tmp_path)!r}), part("hangs", hangs))
    """
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL) as runner:
        for _ in range(3000):
            if pid.exists() and pid.read_text():
                break
            time.sleep(0.01)
        runner.terminate()
        runner.wait(30)
    assert not Path(f"/proc/{pid.read_text()}").exists()


def test_the_table_says_all_and_hides_nothing() -> None:
    outcomes = (
        Outcome(part="step", outcome="passed", seconds=3.0, note="1 passed"),
        Outcome(part="views", outcome="failed", seconds=1.0, note="first\nValueError: no\n(exit code 1)"),
        Outcome(part="late", outcome="not run"),
    )
    step = Record(what="training step", case="bigru", sizes={"N": 64}, ms=12.0, numbers={"TFLOP/s": 161.0})
    both = "loss, gradients and ascent"
    records = (
        step,
        Record(what=both, ms=0.05),
        Record(what=both, form="compiled", ms=0.5),
        Record(what="equal bits", case="two runs", numbers={"that differ": 2.0}),
    )
    text = table(Results(machine=START.machine, date=START.date, parts=outcomes, records=records))
    lines = text.splitlines()

    def line(start: str) -> str:
        return next(" ".join(found.split()) for found in lines if found.startswith(start))

    assert lines[0] == "Some GPU, torch 2.11, 2026-11-27"
    assert line("BiGRU") == "BiGRU 3x1024, ms per step 12 <= 16, then 10.5: the first reached"
    assert line("loss, gradients and ascent, µs").endswith("50 <= 60, then 30: the first reached")
    assert line("tensors that differ: two runs").endswith("2 <= 0: MISSED")
    assert line("tensors that differ: after").endswith("<= 0: not measured")
    assert line("training step, bigru (N 64)") == "training step, bigru (N 64): ours 12 ms"
    assert line(f"{both} ()") == f"{both} (): ours 0.05 ms · compiled 0.5 ms (10.0x)"
    assert "    ours: TFLOP/s 161" in lines and "    ValueError: no" in lines
    assert lines[-1] == "1 of 3 parts passed"


def test_every_part_and_target_names_what_exists() -> None:
    """A benchmark that was renamed would cost a GPU's minutes."""
    parts = gpu.all_parts(data=True)
    assert len({part.name for part in parts}) == len(parts)
    assert sum(part.alone for part in parts) >= 10 and all(part.alone for part in parts if part.waits)
    first_alone = next(number for number, part in enumerate(parts) if part.alone)
    assert parts[first_alone].name == "main job"
    assert all(part.alone for part in parts if part.name.startswith(("step", "loss", "recurrent")))
    sources = {path.name: path.read_text() for path in (ROOT / "bench").glob("bench_*.py")}
    for one in parts:
        for word in one.command:
            if word.startswith("tests/"):
                assert (ROOT / word).is_file(), word
            elif word.startswith("bench/"):
                file, _, test = word.removeprefix("bench/").partition("::")
                name, _, case = test.partition("[")
                assert not test or f"def {name}(" in sources[file], word
                case = re.sub(r"(-\d)?\]$", "", case)
                assert not case or f'"{case}"' in sources[file], word
    for target in TARGETS:
        assert any(f'"{target.what}"' in text for text in sources.values()), target.name
        assert target.number == "ms" or any(f'"{target.number}"' in text for text in sources.values())


def test_records_survive_their_file_and_bad_ones_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    record = Recorder(path, commit="abc")
    record(Record(what="one", sizes={"N": 2}, ms=1.0, p20=0.9, p80=1.1, MiB=3.0))
    record(Record(what="two", case="a", form="eager", phases={"views": 0.5}, numbers={"points": 1.0}))
    assert record.results == read(path) and len(read(path).records) == 2
    record(Record(what="one", sizes={"N": 2}, ms=1.0, phases={"views": 0.5}))  # the same, with more to tell
    assert [one.phases for one in read(path).records] == [{"views": 0.5}] * 2
    assert read(path).machine["commit"] == "abc"
    for content, words in (
        ("[]", "is not a file of records"),
        ('{"records": []}', "has no machine, date"),
        ('{"machine": {}, "date": "", "records": [{"ms": 1}]}', "records[0] has no what"),
        ('{"machine": {}, "date": "", "records": [{"what": "x", "ms": "1"}]}', "records[0].ms must be float"),
        ('{"machine": {}, "date": "", "records": [{"what": "x", "speed": 1}]}', "unknown fields: speed"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=re.escape(words)):
            read(path)
    write(path, START)
    assert read(path) == START


@pytest.mark.parametrize("flag, interpreted", [("1", False), ("0", True)])
def test_workers_of_xdist_know_of_the_gpu(flag: str, interpreted: bool) -> None:
    """They do not see --gpu: the process that starts them says it in the environment."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTEST_XDIST_WORKER": "gw0", "A2MC_FAST_GPU_TESTS": flag}
    code = "import os, tests.conftest as c; print(c.GPU, 'TRITON_INTERPRET' in os.environ)"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == [str(not interpreted), str(interpreted)]


def test_without_a_gpu_it_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, words in (
        ([], "torch sees no GPU"),
        (["--minutes", "0"], "--minutes must be > 0"),
        (["--data", "none.safetensors"], "--data none.safetensors not found"),
        (["--parts", "nothing,nobody"], "--parts nothing,nobody names none of: compile: main job, GPU tests"),
    ):
        with pytest.raises(SystemExit) as stopped:
            gpu.main([str(tmp_path / "out"), *flags])
        said = capsys.readouterr().err.strip()
        assert stopped.value.code == 2 and words in said and "\n" not in said
    assert not (tmp_path / "out").exists()
