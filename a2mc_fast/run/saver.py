"""A run's checkpoints: written in the background, the newest ones kept, a full disk survived.

`checkpoint.safetensors` is replaced by renaming, never opened for writing, and before that it gets a second
name, `checkpoint-STEP.safetensors`: whenever the process is killed, a whole checkpoint is in the folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from a2mc_fast.errors import InputError, os_reason
from a2mc_fast.files import atomic_path
from a2mc_fast.run.checkpoint import FILE, Checkpoint, numbered, numbered_steps, write_content


class Saver:
    """Keeps a run's newest checkpoint and the `keep_last` - 1 before it.

    A save costs the training the copy to host memory; checksum, disk and sync run in the background, one save
    at a time. A save that the disk refuses is said by `warn`, and the last good checkpoint stays.
    """

    def __init__(
        self,
        folder: Path,
        resumed: Checkpoint | None = None,
        *,
        keep_last: int = 2,
        before: Callable[[], None] = lambda: None,
        warn: Callable[[str], None] = print,
    ) -> None:
        """`before` runs ahead of each write, in the same thread: what must be on the disk first."""
        self.folder, self.keep_last = folder, keep_last
        self._before, self._warn = before, warn
        self._good = resumed.step if resumed else None
        # a newest file that the run did not resume from is damaged: it is replaced, not kept
        self._keep_newest = resumed is not None and resumed.path.name == FILE
        self._host: dict[str, Tensor] = {}
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save(self, saved: Checkpoint, *, last: bool = False) -> None:
        """Save in the background; the `last` state is on the disk on return, or it is an `InputError`."""
        self.wait()
        if last:
            self._write(saved, last=True)
        else:
            copy = replace(saved, tensors=self._copy(saved.tensors))
            self._pending = self._pool.submit(self._write, copy)

    def wait(self) -> None:
        """Until the save that is under way has ended. Raises what went wrong, unless it was the disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        """A save that is under way is finished, also when the run fails."""
        with self._pool, suppress(Exception) if kind else nullcontext():
            self.wait()

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in host memory, pinned for a GPU, that are used again by the next save."""
        for name, tensor in tensors.items():
            if name not in self._host:
                self._host[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._host[name].copy_(tensor.detach(), non_blocking=True)
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return {name: self._host[name] for name in tensors}

    def _write(self, saved: Checkpoint, last: bool = False) -> None:
        """What the disk refuses is an `InputError` if this was the `last` state, and said otherwise."""
        try:
            self._before()
            with atomic_path(self.folder / FILE) as temporary:
                write_content(temporary, saved)
                self._set_newest_aside()
            self._good, self._keep_newest = saved.step, True
            self._prune(saved.step)
        except OSError as error:
            good = "there is none yet" if self._good is None else f"the last good one is of step {self._good}"
            failure = (
                f"the checkpoint of step {saved.step} could not be saved ({os_reason(error)}), {good}: "
                f"make {self.folder} writable, with room for it"
            )
            if last:
                raise InputError(f"{failure}; then continue with --resume") from None
            self._warn(f"{failure}; training goes on")

    def _set_newest_aside(self) -> None:
        """Give the newest checkpoint the name under which it stays, beside the one it has."""
        newest = self.folder / FILE
        if newest.is_dir():  # none of ours, and nothing could be renamed over it
            os.replace(newest, newest.with_suffix(".folder"))
        if not self._keep_newest or self._good is None or not newest.exists():
            return
        older = numbered(self.folder, self._good)
        older.unlink(missing_ok=True)
        try:
            os.link(newest, older)
        except OSError:  # no hard links here: for a moment the newest is the numbered one
            os.replace(newest, older)

    def _prune(self, newest: int) -> None:
        """Delete older checkpoints beyond those to keep, and what is not older: it belongs to no run."""
        steps = sorted(numbered_steps(self.folder), reverse=True)
        last = [step for step in steps if step < newest][: self.keep_last - 1]
        for step in steps:
            if step not in last:
                with suppress(OSError):
                    numbered(self.folder, step).unlink()
