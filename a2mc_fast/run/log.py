"""What a run tells: its metrics, the console line and the progress bar, its first and last lines."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from a2mc_fast.config import Config, to_dict
from a2mc_fast.encoders.recurrence import waited_too_long
from a2mc_fast.errors import InputError, require, tell
from a2mc_fast.files import remove_leftovers, write_json
from a2mc_fast.run.checkpoint import FILE, Checkpoint
from a2mc_fast.run.machine import machine, peak_memory
from a2mc_fast.run.metrics import MetricsFile

if TYPE_CHECKING:
    from a2mc_fast.trainer import Trainer

_CONSOLE_EVERY = 10.0  # seconds between console lines where there is no progress bar
_SLEEPS, _RUNS_AWAY = 5e-4, 0.5  # bank movement, distance of unit rows per step
_COLLAPSED = 1.5  # effective rank of a batch's features
_NAMED = 8  # clips named in an error
_NOT_FINITE = "start a new run with a lower --optim.lr or --precision fp32 (a resumed one would repeat this)"


class RunLog(ExitStack):
    """How far a run is, and whether it goes well. Rank 0's, the `main` one, writes the run's folder and tells
    the user; the others' neither write nor print.

    Its clock stands still while `paused`.
    """

    def __init__(
        self, folder: Path, config: Config, total_steps: int, resumed: Checkpoint | None, main: bool = True
    ) -> None:
        super().__init__()
        self.folder, self.config, self.total_steps, self.main = folder, config, total_steps, main
        self.step = resumed.step if resumed else 0
        self._before = resumed.progress.get("seconds", 0.0) if resumed else 0.0
        self.watch: Callable[[dict[str, Any]], None] | None = None
        """Who else hears of every metrics line."""
        self._concerns: set[str] = set()  # each is said once
        self._board: Any = None
        if main:
            if config.run.tensorboard:
                self._board = self.enter_context(_tensorboard(folder, self.step + 1))
            for name in (FILE, "config.json", "metrics.jsonl", "result.json", "fault.json"):
                remove_leftovers(folder / name)
            write_json(folder / "config.json", {**to_dict(config), "machine": machine()})
            (folder / "result.json").unlink(missing_ok=True)  # of a run that is prolonged
            known = resumed.progress.get("lines") if resumed else None
            self._file = MetricsFile(folder, resumed.step if resumed else -1, known)
            self.callback(self._file.close)
            self._bar = tqdm(
                total=total_steps,
                initial=self.step,
                unit="step",
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
                disable=None,  # off where there is no terminal
            )
            self.callback(self._bar.close)
        self._last_step, self._last_seconds = self.step, self._before
        self._started = self._last_console = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Training time so far, that before a resume included."""
        return self._before + time.perf_counter() - self._started

    @property
    def lines(self) -> int:
        """Of the metrics file, from the run's beginning."""
        return self._file.lines if self.main else 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluation and saving do not count as training time."""
        start = time.perf_counter()
        yield
        self._started += time.perf_counter() - start

    def advance(self) -> bool:
        """One step is done. Returns whether to log it."""
        self.step += 1
        if self.main:
            self._bar.update()
        return self.step % self.config.run.log_every == 0 or self.step == self.total_steps

    def due(self, epochs: int, steps_per_epoch: int) -> bool:
        """Whether something that is done every so many epochs (0: never), and at the end, is due now."""
        return self.step == self.total_steps or (epochs > 0 and self.step % (epochs * steps_per_epoch) == 0)

    def metrics(self, trainer: Trainer, values: dict[str, Tensor]) -> dict[str, float]:
        """One metrics line of what the last step returned. Returns its numbers; fails as `check` does."""
        numbers = self.check(trainer, values)
        if not self.main:
            return numbers
        seconds, steps = self.seconds, self.step - self._last_step
        rate = steps / max(seconds - self._last_seconds, 1e-9)
        self._last_seconds, self._last_step = seconds, self.step
        record: dict[str, Any] = {
            "step": self.step,
            "stage": "warm-up" if self.step <= self.config.warmup_steps else "train",
            "lr": trainer.schedule.learning_rate(self.step - 1),
            **numbers,
            "seconds": round(seconds, 3),
            "clips_per_second": round(rate * self.config.optim.batch_size, 1),
            "memory_bytes": peak_memory(trainer.device),
        }
        self._write(record)
        place = f"step {self.step}/{self.total_steps}"
        for concern in concerns(record):
            if concern not in self._concerns:
                self._concerns.add(concern)
                self.say(f"{place}  {concern}")
        speed = f"{record['clips_per_second']:.0f} clips/s  {record['memory_bytes'] / 2**30:.2f} GiB"
        left = time_left(self.config, self.step, self.total_steps, rate)
        # 80 columns hold this
        self._bar.set_postfix_str(f"loss {record['loss']:.3f}  {speed}  {left}", refresh=False)
        quiet_for = time.perf_counter() - self._last_console
        if (self._bar.disable and quiet_for > _CONSOLE_EVERY) or self.step == self.total_steps:
            self._last_console = time.perf_counter()
            self.say(
                f"{place}  {record['stage']}  loss {record['loss']:.3f} (L1 {record['loss_weak']:.3f}, "
                f"L2 {record['loss_strong']:.3f}, L3 {record['loss_basic']:.3f})  lr {record['lr']:.1e}  "
                f"{speed}  {1e3 / rate:.0f} ms/step  {left}"
            )
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
            clips = clips_of(trainer, int(faulty), self.folder) if self.main else "as rank 0 names them"
            raise InputError(
                f"the loss or a gradient is not finite in step {int(faulty) + 1} (clips {clips}): look at "
                f"these clips, or {_NOT_FINITE}; earlier checkpoints stay in {self.folder}"
            )
        require(
            math.isfinite(numbers["loss"]),
            f"the loss is {numbers['loss']} at or just before step {self.step}: {_NOT_FINITE}; earlier "
            f"checkpoints stay in {self.folder}",
        )
        return numbers

    def accuracy(self, knn_top1: float | None, which: str = "") -> dict[str, float]:
        """A metrics line and a console line of an evaluation, after `step` steps; nothing without labels.

        Returns {"knn_top1" + which: percent}, what the result will hold.
        """
        if knn_top1 is None:
            return {}
        if self.main:
            self._write({"step": self.step, "knn_top1": knn_top1})
            self.say(f"step {self.step}/{self.total_steps}  kNN top-1 {knn_top1:.1f} %")
        return {f"knn_top1{which}": knn_top1}

    def _write(self, record: dict[str, Any]) -> None:
        refused = self._file.add(record)
        if refused:
            self.say(refused)
        if self.watch is not None:
            self.watch(record)
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, self.step)

    def sync(self) -> None:
        """Have every metrics line on the disk: a checkpoint must not be ahead of them. Or `OSError`."""
        self._file.sync()

    def say(self, line: str) -> None:
        """Console lines, above the progress bar."""
        if self.main:
            with self._bar.external_write_mode():
                tell(line)


def clips_of(trainer: Trainer, step: int, folder: Path) -> str:
    """The names of a step's clips: the first few, and where all are."""
    names = [trainer.clips.names[index] for index in trainer.schedule.batch(step).tolist()]
    more = ""
    if len(names) > _NAMED:
        with suppress(OSError):
            write_json(folder / "fault.json", {"step": step + 1, "clips": names})
            more = f" and {len(names) - _NAMED} more, listed in {folder}/fault.json"
    return ", ".join(names[:_NAMED]) + more


def time_left(config: Config, step: int, total_steps: int, rate: float) -> str:
    """The time left at `rate` steps per second. A step of the method proper takes several of the warm-up,
    which therefore foretells its own end alone."""
    warmup = config.warmup_steps
    end, what = (warmup, "of warm-up ") if step < warmup else (total_steps, "")
    return f"{(end - step) / rate:.0f} s {what}left"


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
            "start again with a lower --optim.lr, a longer --bank.warmup-steps or, of a BiGRU, "
            "--encoder.pool mean"
        )
    return found


def _tensorboard(folder: Path, step: int) -> Any:
    """A writer that hides what an earlier process wrote from `step` on."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--run.tensorboard needs: pip install 'a2mc_fast[tensorboard]'") from None
    return SummaryWriter(str(folder), purge_step=step)


# the first and the last lines of a run


def command(folder: Path) -> str:
    """What continues a run."""
    return f"python -m a2mc_fast.train --resume {shlex.quote(str(folder))}"


def heading(trainer: Trainer, folder: Path) -> str:
    """The first line of a run."""
    config, schedule, world = trainer.config, trainer.schedule, trainer.world
    ranks = "" if world.alone else f"{world.size} x "
    return (
        f"{config.preset}: {len(schedule.train_index)} training clips, {schedule.total_steps} steps "
        f"({config.warmup_steps} of warm-up) on {ranks}{machine()['device']} -> {folder}"
    )


def outcome(config: Config, trainer: Trainer, log: RunLog, progress: dict[str, float]) -> dict[str, Any]:
    """The content of result.json. It needs no step of this process: the last checkpoint holds the numbers."""
    return {
        "preset": config.preset,
        "steps": log.step,
        "seconds": round(log.seconds, 2),
        "clips_per_second": round(log.step * config.optim.batch_size / log.seconds, 1),
        "peak_memory_bytes": peak_memory(trainer.device),
        "loss": progress["loss"],
        "knn_top1": progress.get("knn_top1"),
        "knn_top1_untrained": progress.get("knn_top1_untrained"),
        **machine(),
    }


def summary(result: dict[str, Any], folder: Path) -> str:
    """The last lines of a run."""
    lines = [
        f"{result['steps']} steps in {result['seconds']:.0f} s, {result['clips_per_second']:.0f} clips/s, "
        f"peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB, loss {result['loss']:.3f}"
    ]
    if result["knn_top1"] is not None:
        gain = result["knn_top1"] - result["knn_top1_untrained"]
        lines.append(
            f"kNN top-1 {result['knn_top1']:.1f} %, untrained encoder {result['knn_top1_untrained']:.1f} % "
            f"({gain:+.1f} points)"
        )
    return "\n".join([*lines, f"wrote {folder}/checkpoint.safetensors and {folder}/result.json"])
