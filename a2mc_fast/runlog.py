"""The run folder, its metrics file, the console line and the progress bar.

A folder holds `config.json`, `metrics.jsonl` (one object per log line), `checkpoint.safetensors` and, when
the run has ended, `result.json`.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from a2mc_fast import __version__
from a2mc_fast.checkpoint import FILE, Checkpoint, load
from a2mc_fast.config import Config, differences, to_dict
from a2mc_fast.errors import InputError, require
from a2mc_fast.files import atomic_path, write_json

_CONSOLE_EVERY = 10.0  # seconds between console lines where there is no progress bar


def open_folder(config: Config, resume: bool) -> tuple[Path, Checkpoint | None]:
    """The folder of a new run, or of the run to resume with its checkpoint.

    A run is never written over: an explicit folder that holds one is refused, and runs/PRESET moves on to
    runs/PRESET-2, -3, ... `InputError` lists the fields in which a resumed run would differ.
    """
    base = Path(config.run.out or f"runs/{config.preset}")
    numbered = [] if config.run.out else [Path(f"{base}-{number}") for number in range(2, 1000)]
    taken = list(itertools.takewhile(_holds_run, [base, *numbered]))
    if not resume:
        require(
            len(taken) <= len(numbered),
            f"{base} already holds a run: continue it with --resume, or choose another --run.out",
        )
        return [base, *numbered][len(taken)], None
    require(bool(taken), f"{base} holds no run to resume")
    checkpoint = load(taken[-1])
    changed = differences(checkpoint.config, config)
    require(
        not changed,
        f"{taken[-1]} was run with another configuration ({'; '.join(changed)}): "
        "resume it with the same flags, or choose another --run.out",
    )
    return taken[-1], checkpoint


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (FILE, "metrics.jsonl", "result.json"))


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "device": gpu or f"{_processor()} ({torch.get_num_threads()} threads)",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "a2mc_fast": __version__,
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    """The source's git commit, with + where files differ from it; empty outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's resident peak on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class RunLog:
    """Writes one run's folder and tells the user how it goes. Its clock stands still while `paused`."""

    def __init__(self, folder: Path, config: Config, total_steps: int, resumed: Checkpoint | None) -> None:
        self.folder, self.config, self.total_steps = folder, config, total_steps
        self.step = self._last_step = resumed.step if resumed else 0
        self._before = self._last_seconds = resumed.progress["seconds"] if resumed else 0.0
        self._board = _tensorboard(folder) if config.run.tensorboard else None
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics = folder / "metrics.jsonl"
        if resumed:
            self._drop_metrics_after(resumed.step)
        else:
            write_json(folder / "config.json", {**to_dict(config), "machine": machine()})
        self._file = self._metrics.open("a", encoding="utf-8")
        self._bar = tqdm(
            total=total_steps,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            disable=None if config.run.progress else True,  # None: off where there is no terminal
        )
        self._started = self._last_console = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Training time so far, that before a resume included."""
        return self._before + time.perf_counter() - self._started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluation and saving do not count as training time."""
        start = time.perf_counter()
        yield
        self._started += time.perf_counter() - start

    def advance(self) -> bool:
        """One step is done. Returns whether to log it."""
        self.step += 1
        self._bar.update()
        return self.step % self.config.run.log_every == 0 or self.step == self.total_steps

    def due(self, epochs: int, steps_per_epoch: int) -> bool:
        """Whether something that is done every so many epochs (0: never), and at the end, is due now."""
        return self.step == self.total_steps or (epochs > 0 and self.step % (epochs * steps_per_epoch) == 0)

    def metrics(
        self, values: dict[str, Tensor], lr: float, stage: str, device: torch.device
    ) -> dict[str, float]:
        """One metrics line. Reading the values is the step's only wait for the device.

        `InputError` if the loss is not finite.
        """
        names, stacked = list(values), torch.stack([v.detach().float() for v in values.values()])
        numbers = dict(zip(names, stacked.tolist(), strict=True))
        if not math.isfinite(numbers["loss"]):
            raise InputError(
                f"the loss is {numbers['loss']} at or just before step {self.step}: lower --optim.lr, or use "
                f"--precision fp32; the last checkpoint is in {self.folder}"
            )
        seconds, steps = self.seconds, self.step - self._last_step
        rate = steps / max(seconds - self._last_seconds, 1e-9)
        self._last_seconds, self._last_step = seconds, self.step
        record = {
            "step": self.step,
            "stage": stage,
            "lr": lr,
            **numbers,
            "seconds": round(seconds, 3),
            "clips_per_second": round(rate * self.config.optim.batch_size, 1),
            "memory_bytes": peak_memory(device),
        }
        self._write(record)
        self._bar.set_postfix_str(self._state(record), refresh=False)
        quiet_for = time.perf_counter() - self._last_console
        if (self._bar.disable and quiet_for > _CONSOLE_EVERY) or self.step == self.total_steps:
            self._last_console = time.perf_counter()
            self.say(self._console_line(record, rate))
        return numbers

    def _console_line(self, record: dict[str, Any], rate: float) -> str:
        """Fixed order, with units."""
        left = (self.total_steps - self.step) / rate
        return (
            f"step {self.step}/{self.total_steps}  {record['stage']}  {self._state(record)}  "
            f"{1e3 / rate:.0f} ms/step  {left:.0f} s left"
        )

    @staticmethod
    def _state(record: dict[str, Any]) -> str:
        """Loss and its parts, learning rate, speed and memory."""
        return (
            f"loss {record['loss']:.3f} (L1 {record['loss_weak']:.3f}, L2 {record['loss_strong']:.3f}, "
            f"L3 {record['loss_basic']:.3f})  lr {record['lr']:.1e}  "
            f"{record['clips_per_second']:.0f} clips/s  {record['memory_bytes'] / 2**30:.2f} GiB"
        )

    def accuracy(self, knn_top1: float | None) -> None:
        """A metrics line and a console line of an evaluation, after `step` steps; nothing without labels."""
        if knn_top1 is not None:
            self._write({"step": self.step, "knn_top1": knn_top1})
            self.say(f"step {self.step}/{self.total_steps}  kNN top-1 {knn_top1:.1f} %")

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, self.step)

    def say(self, line: str) -> None:
        """A console line, above the progress bar."""
        self._bar.write(line, file=sys.stdout)
        sys.stdout.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        """Release the files and the progress bar."""
        self._bar.close()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _drop_metrics_after(self, step: int) -> None:
        """Remove what was logged after the checkpoint: those steps are done again."""
        if not self._metrics.exists():
            return
        kept = []
        for line in self._metrics.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):  # a line cut off by a crash
                continue
        with atomic_path(self._metrics) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--run.tensorboard needs: pip install 'a2mc_fast[tensorboard]'") from None
    return SummaryWriter(str(folder))
