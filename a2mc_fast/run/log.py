"""What a run tells: its metrics file, the console line and the progress bar."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from a2mc_fast.config import Config, to_dict
from a2mc_fast.encoders.recurrence import waited_too_long
from a2mc_fast.errors import InputError, os_reason, require, tell
from a2mc_fast.files import atomic_path, remove_leftovers, write_json
from a2mc_fast.run.checkpoint import FILE, Checkpoint
from a2mc_fast.run.machine import machine, peak_memory
from a2mc_fast.run.metrics import lines_of, read_line

if TYPE_CHECKING:
    from a2mc_fast.trainer import Trainer

_CONSOLE_EVERY = 10.0  # seconds between console lines where there is no progress bar
_SLEEPS, _RUNS_AWAY = 5e-4, 0.5  # bank movement, distance of unit rows per step
_COLLAPSED = 1.5  # effective rank of a batch's features
_NAMED = 8  # clips named in an error
_NOT_FINITE = "start a new run with a lower --optim.lr or --precision fp32 (a resumed one would repeat this)"


class RunLog:
    """Writes one run's folder and tells the user how it goes. Its clock stands still while `paused`.

    Metrics that the disk refuses wait in memory for the next line.
    """

    def __init__(self, folder: Path, config: Config, total_steps: int, resumed: Checkpoint | None) -> None:
        self.folder, self.config, self.total_steps = folder, config, total_steps
        self.step = self._last_step = resumed.step if resumed else 0
        self._before = self._last_seconds = resumed.progress.get("seconds", 0.0) if resumed else 0.0
        self.watch: Callable[[dict[str, Any]], None] | None = None
        """Who else hears of every metrics line."""
        self._board = _tensorboard(folder, self.step + 1) if config.run.tensorboard else None
        for name in (FILE, "config.json", "metrics.jsonl", "result.json", "fault.json"):
            remove_leftovers(folder / name)
        self._metrics = folder / "metrics.jsonl"
        write_json(folder / "config.json", {**to_dict(config), "machine": machine()})
        (folder / "result.json").unlink(missing_ok=True)  # of a run that is prolonged
        self.lines = self._keep_metrics(resumed)
        """Of the metrics file, from the run's beginning."""
        self._file = self._metrics.open("ab", buffering=0)
        self._unwritten = b""
        self._concerns: set[str] = set()  # each is said once
        self._writing = threading.Lock()  # the thread that saves also asks for what is unwritten
        self._bar = tqdm(
            total=total_steps,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            disable=None,  # off where there is no terminal
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

    def metrics(self, trainer: Trainer, values: dict[str, Tensor]) -> dict[str, float]:
        """One metrics line of what the last step returned. Returns its numbers; fails as `check` does."""
        numbers = self.check(trainer, values)
        seconds, steps = self.seconds, self.step - self._last_step
        rate = steps / max(seconds - self._last_seconds, 1e-9)
        self._last_seconds, self._last_step = seconds, self.step
        record = {
            "step": self.step,
            "stage": "warm-up" if self.step <= self.config.warmup_steps else "train",
            "lr": trainer.schedule.learning_rate(self.step - 1),
            **numbers,
            "seconds": round(seconds, 3),
            "clips_per_second": round(rate * self.config.optim.batch_size, 1),
            "memory_bytes": peak_memory(trainer.device),
        }
        self._write(record)
        for concern in concerns(record):
            if concern not in self._concerns:
                self._concerns.add(concern)
                self.say(f"step {self.step}/{self.total_steps}  {concern}")
        # 80 columns hold this
        short = f"loss {record['loss']:.3f}  {self._speed(record)}  {self._left(rate)}"
        self._bar.set_postfix_str(short, refresh=False)
        quiet_for = time.perf_counter() - self._last_console
        if (self._bar.disable and quiet_for > _CONSOLE_EVERY) or self.step == self.total_steps:
            self._last_console = time.perf_counter()
            self.say(self._console_line(record, rate))
        return numbers

    def check(self, trainer: Trainer, values: dict[str, Tensor]) -> dict[str, float]:
        """What a step returned, as numbers: the only wait for the device.

        `InputError` if a loss or a gradient was not finite since the last check: the trainer's `fault`, int64
        [1] on the device, is the first such step, or -1. It names the step, counted from one as in the log,
        and its clips.
        """
        # float64 holds a step number exactly; one read for both
        stacked = torch.stack([v.detach().float() for v in values.values()]).double()
        fault: Tensor | None = getattr(trainer, "fault", None)
        first = stacked.new_full((1,), -1) if fault is None else fault.double().view(1)
        *read, faulty = torch.cat((stacked, first)).tolist()
        numbers = dict(zip(values, read, strict=True))
        if faulty >= 0:
            require(
                not waited_too_long(trainer.model.query.encoder, trainer.device),
                f"in step {int(faulty) + 1} programs of a recurrent layer waited for one another too long: "
                f"choose --encoder.recurrence fused; earlier checkpoints stay in {self.folder}",
            )
            raise InputError(
                f"the loss or a gradient is not finite in step {int(faulty) + 1} (clips "
                f"{self._clips(trainer, int(faulty))}): look at these clips, or {_NOT_FINITE}; earlier "
                f"checkpoints stay in {self.folder}"
            )
        require(
            math.isfinite(numbers["loss"]),
            f"the loss is {numbers['loss']} at or just before step {self.step}: {_NOT_FINITE}; earlier "
            f"checkpoints stay in {self.folder}",
        )
        return numbers

    def _clips(self, trainer: Trainer, step: int) -> str:
        """The names of a step's clips, the first few, and where all are."""
        names = [trainer.clips.names[index] for index in trainer.schedule.batch(step).tolist()]
        more = ""
        if len(names) > _NAMED:
            with suppress(OSError):
                write_json(self.folder / "fault.json", {"step": step + 1, "clips": names})
                more = f" and {len(names) - _NAMED} more, listed in {self.folder}/fault.json"
        return ", ".join(names[:_NAMED]) + more

    def _console_line(self, record: dict[str, Any], rate: float) -> str:
        """Fixed order, with units."""
        return (
            f"step {self.step}/{self.total_steps}  {record['stage']}  loss {record['loss']:.3f} "
            f"(L1 {record['loss_weak']:.3f}, L2 {record['loss_strong']:.3f}, L3 {record['loss_basic']:.3f})  "
            f"lr {record['lr']:.1e}  {self._speed(record)}  {1e3 / rate:.0f} ms/step  {self._left(rate)}"
        )

    @staticmethod
    def _speed(record: dict[str, Any]) -> str:
        return f"{record['clips_per_second']:.0f} clips/s  {record['memory_bytes'] / 2**30:.2f} GiB"

    def _left(self, rate: float) -> str:
        """The time left at `rate` steps per second. A step of the method proper takes several of the warm-up,
        which therefore foretells its own end alone."""
        warmup = self.config.warmup_steps
        end, what = (warmup, "of warm-up ") if self.step < warmup else (self.total_steps, "")
        return f"{(end - self.step) / rate:.0f} s {what}left"

    def accuracy(self, knn_top1: float | None, which: str = "") -> dict[str, float]:
        """A metrics line and a console line of an evaluation, after `step` steps; nothing without labels.

        Returns {"knn_top1" + which: percent}, what the result will hold.
        """
        if knn_top1 is None:
            return {}
        self._write({"step": self.step, "knn_top1": knn_top1})
        self.say(f"step {self.step}/{self.total_steps}  kNN top-1 {knn_top1:.1f} %")
        return {f"knn_top1{which}": knn_top1}

    def _write(self, record: dict[str, Any]) -> None:
        waited, self.lines = bool(self._unwritten), self.lines + 1
        try:
            self._append(json.dumps(record).encode() + b"\n")
        except OSError as error:
            if not waited:
                self.say(f"{self._metrics} cannot be written ({os_reason(error)}): its lines wait in memory")
        if self.watch is not None:
            self.watch(record)
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, self.step)

    def _append(self, line: bytes) -> None:
        """Write what is unwritten and `line`; what is left after an error stays for the next time."""
        with self._writing:
            self._unwritten += line
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def sync(self) -> None:
        """Have every metrics line on the disk: a checkpoint must not be ahead of them. Or `OSError`."""
        self._append(b"")
        os.fsync(self._file.fileno())

    def say(self, line: str) -> None:
        """Console lines, above the progress bar."""
        with self._bar.external_write_mode():
            tell(line)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        """Release the files and the progress bar."""
        self._bar.close()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _keep_metrics(self, resumed: Checkpoint | None) -> int:
        """Remove what was logged after the checkpoint: those steps are done again. Returns the lines left.

        Lines that the checkpoint knows and the file lacks are said, and marked by a line that counts them.
        """
        step = resumed.step if resumed else -1
        content, kept, count = lines_of(self._metrics), [], 0
        for line in content:
            with suppress(InputError):
                record = read_line(line)
                if record["step"] <= step and line.endswith(b"\n"):
                    kept.append(line)
                    count += record.get("lost", 1)
        lost = int(resumed.progress.get("lines", count)) - count if resumed else 0
        if lost > 0:
            tell(f"{self._metrics} lacks {lost} of the lines up to step {step}: a line there marks the gap")
            kept.append(json.dumps({"step": step, "lost": lost}).encode() + b"\n")
            count += lost
        if kept != content:
            with atomic_path(self._metrics) as temporary:
                temporary.write_bytes(b"".join(kept))
        return count


def concerns(record: dict[str, Any]) -> list[str]:
    """What a metrics line says is going wrong, each with the flag to change."""
    found = []
    if record.get("bank_movement", math.inf) < _SLEEPS:
        found.append(
            f"the bank sleeps: its rows move by less than {_SLEEPS:g} a step and grow older than the "
            "encoder; raise --bank.refresh, --bank.lr or --bank.temperature"
        )
    if record.get("bank_movement", 0.0) > _RUNS_AWAY:
        found.append(f"the bank runs away: its rows move by more than {_RUNS_AWAY:g} a step; lower --bank.lr")
    if record["stage"] == "train" and record.get("feature_rank", math.inf) < _COLLAPSED:
        found.append(
            f"features collapse: those of a batch vary in fewer than {_COLLAPSED:g} directions; "
            "start again with a lower --optim.lr, a longer --bank.warmup-steps, or --encoder.pool mean"
        )
    return found


class QuietLog(RunLog):
    """That of a rank which neither prints nor writes: it keeps count of the steps, and fails as the other."""

    def __init__(self, folder: Path, config: Config, total_steps: int, resumed: Checkpoint | None) -> None:
        self.folder, self.config, self.total_steps = folder, config, total_steps
        self.step = self._last_step = resumed.step if resumed else 0
        self._before = self._last_seconds = resumed.progress.get("seconds", 0.0) if resumed else 0.0
        self._concerns, self.lines = set(), 0
        self._bar = tqdm(disable=True)
        self._started = self._last_console = time.perf_counter()

    def _clips(self, trainer: Trainer, step: int) -> str:
        return "as rank 0 names them"

    def _write(self, record: dict[str, Any]) -> None: ...

    def sync(self) -> None: ...

    def say(self, line: str) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def _tensorboard(folder: Path, step: int) -> Any:
    """A writer that hides what an earlier process wrote from `step` on."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--run.tensorboard needs: pip install 'a2mc_fast[tensorboard]'") from None
    return SummaryWriter(str(folder), purge_step=step)
