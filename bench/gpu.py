"""Everything that is worth a GPU's minutes, in one command: `python -m bench.gpu OUT --minutes 8`.

First all timed parts start and compile side by side, beside the tests of operations; then each of them runs
alone, the most telling first, and whole runs that are not timed take the time that is left. OUT gets
`gpu.json` (machine, records, how each part went), `logs.txt`, and `table.txt`, which the command also prints
last. Exit code 1: a part failed, hung or had no time left. `--rehearse` goes the same way on a CPU at toy
sizes, where numbers mean nothing.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from a2mc_fast.errors import exit_on_error, require
from bench.records import here, write
from bench.runner import PASSED, ROOT, Part, Runner
from bench.table import table

SIDE_BY_SIDE = 0.5  # of the minutes, at most, before the first part that is timed
LEFT_OVER = 12.0  # seconds for ending what hangs and for the table


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure and how long it may take."""

    out: tyro.conf.Positional[Path]
    """Folder for the results."""
    minutes: float = 8.0
    """All of it ends within this time."""
    data: str = ""
    """Packed clips to train on: full method and baseline, two seeds each."""
    commit: str = ""
    """The source's commit, where no checkout can be asked."""
    rehearse: bool = False
    """On the CPU, at toy sizes."""
    parts: str = ""
    """Only those whose names contain one of these words, by commas; all by default."""


def bench(name: str, test: str, seconds: float, *, waits: bool = True) -> Part:
    """A benchmark, alone; if it `waits`, what it needs is compiled beside others."""
    command = ("-m", "pytest", "-s", "--tb=short", "-W", "ignore", f"bench/bench_{test}")
    return Part(name=name, command=(*command, "--record", "{record}"), seconds=seconds, waits=waits)


def gpu_tests(rehearse: bool) -> list[Part]:
    """The tests that need a GPU: of operations, of whole runs, which compile for minutes, and of several
    ranks, which can hang."""
    marked = {
        f"tests/{path.name}"
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if re.search(r"mark\.(gpu|anywhere)", path.read_text(encoding="utf-8"))
    }
    runs, ranks = "tests/test_gpu.py", "tests/test_distributed.py"
    command = ["-m", "pytest", "-v", "--tb=short", "-W", "ignore"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", "150"]

    def part(name: str, seconds: float, workers: int, files: Iterable[str], instead: list[str]) -> Part:
        many = ["-n", str(workers)] if importlib.util.find_spec("xdist") else []
        words = (*command, *many, *(instead if rehearse else ["--gpu", *sorted(files)]))
        return Part(name=name, command=words, seconds=seconds, alone=False)

    return [
        part("GPU tests of operations", 180, 4, marked - {runs, ranks}, ["tests/test_rng.py"]),
        part("GPU tests of runs", 180, 6, [runs], ["tests/test_rng.py"]),
        part("GPU tests of ranks", 120, 0, [ranks], ["--collect-only", ranks]),
    ]


def all_parts(rehearse: bool = False, data: bool = False) -> list[Part]:
    """In the order in which they run, those that compile beforehand aside."""
    short = ["--bank.warmup-steps", "8", "--optim.epochs", "1"]
    short += ["--synthetic.clips", "200"] if rehearse else []  # on a GPU sizes must be those of the main job
    operations, *later = gpu_tests(rehearse)
    parts = [
        Part(
            name="compile: main job",
            command=("-m", "a2mc_fast.train", *short, "--run.out", "{record}.run"),
            seconds=150,
            alone=False,
            prepares=True,
        ),
        operations,
        bench("main job", "runs.py::test_main_job", 90, waits=False),
        bench("step, bigru", "step.py::test_step_by_phase[bigru]", 45),
        bench("loss and ascent", "kernels.py", 60),
        bench("recurrent layers", "recurrent.py", 60),
        bench("step, own", "step.py::test_step_by_phase[own]", 30),
        bench("public-style trainer", "step.py::test_against_a_public_style_trainer", 45),
        bench("views", "views.py::test_views_of_a_step", 30),
        bench("launch sizes", "sizes.py", 45),
        # their compilation is the longest
        *(
            bench(f"step, {case}", f"step.py::test_step_by_phase[{case}]", 60)
            for case in ("stgcn", "dsta", "scd")
        ),
        # what compiles for long and is not timed gets the time that is left
        _beside(bench("equal bits", "runs.py::test_equal_bits", 150)),
        *later,
    ]
    for seed in () if not data else (0,) if rehearse else (0, 1):
        for method in ("own", "own-b1"):
            test = f"runs.py::test_real_data[{method}-{seed}]"
            parts.append(_beside(bench(f"{method}, seed {seed}", test, 150)))
    return [replace(part, seconds=7 * part.seconds) for part in parts] if rehearse else parts


def _beside(part: Part) -> Part:
    return replace(part, alone=False, waits=False)


def environment(options: Options, work: Path) -> dict[str, str]:
    """What all parts share: one place for compiled code, so that it is found again."""
    cache = Path(tempfile.gettempdir()) / f"a2mc_fast-bench-{os.getuid()}"
    shared = {
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": "4",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if options.data:
        shared["BENCH_DATA"] = str(Path(options.data).resolve())
    if options.rehearse:
        shared |= {
            "CUDA_VISIBLE_DEVICES": "",
            "BENCH_TOY": "1",
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
        }
        if not options.data:
            shared["BENCH_DATA"] = str(_toy_data(work))
    return shared


def _toy_data(work: Path) -> Path:
    from a2mc_fast.data.synthetic import synthetic_clips

    path = work / "toy.safetensors"
    synthetic_clips(clips=200).save(path)
    return path


def measure(options: Options) -> int:
    """Run everything; returns the exit code."""
    began = time.monotonic()
    require(options.minutes > 0, f"--minutes must be > 0, got {options.minutes}")
    require(
        not options.data or Path(options.data).is_file(),
        f"--data {options.data} not found: it takes packed clips",
    )
    require(
        importlib.util.find_spec("a2mc_fast.kernels") is not None,
        "the package is not installed: pip install --no-deps --no-build-isolation -e .",
    )
    known = all_parts(options.rehearse, bool(options.data) or options.rehearse)
    parts = [part for part in known if any(word in part.name for word in options.parts.split(","))]
    names = ", ".join(part.name for part in known)
    require(bool(parts), f"--parts {options.parts} names none of: {names}")
    import torch

    require(
        options.rehearse or torch.cuda.is_available(),
        "torch sees no GPU: this command measures one (--rehearse goes through it on a CPU)",
    )
    options.out.mkdir(parents=True, exist_ok=True)
    start = here(options.commit)
    write(options.out / "gpu.json", start)
    print(start.caption, flush=True)
    seconds = 60 * options.minutes
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        runner = Runner(
            options.out, Path(work), start, began + seconds - LEFT_OVER,
            environment(options, Path(work)), at_once=max(2, os.cpu_count() or 1),
        )  # fmt: skip
        # as Ctrl-C, so that no part outlives its runner
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        runner.run(parts, began + SIDE_BY_SIDE * seconds)
    text = table(runner.results)
    (options.out / "table.txt").write_text(text, encoding="utf-8")
    print(text)
    counted = {part.name for part in parts if not part.prepares}
    return int(any(o.outcome != PASSED for o in runner.results.parts if o.part in counted))


def main(args: list[str] | None = None) -> None:
    """The command line: OUT [--minutes M] [--data FILE] [--commit ID] [--parts WORDS] [--rehearse]."""
    with exit_on_error():
        options = tyro.cli(Options, args=args, prog="python -m bench.gpu", description=__doc__)
        sys.exit(measure(options))


if __name__ == "__main__":
    main()
