"""Pretraining: `python -m a2mc_fast.train [PRESET] [--FLAG VALUE ...] [--resume [FOLDER]]`.

Here is what is asked; `run.start.pretrain` is the run, `trainer.Trainer.step` the algorithm. torch is
imported when a run begins, so that `--help` and wrong flags answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import tyro

from a2mc_fast.config import BASE_PRESETS, Config, preset
from a2mc_fast.errors import InputError, exit_on_error, one_speaks, rank, require, tell


@contextmanager
def out_of_memory_is_bad_input() -> Iterator[None]:
    """Turns an allocation that failed, on the GPU or the host, into an `InputError` with what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # a GPU's is a torch.OutOfMemoryError, which is a RuntimeError; a CPU's a plain one
        text = str(error).splitlines()[0] if str(error) else "no more memory"
        if not isinstance(error, MemoryError) and "memory" not in text:
            raise
        raise InputError(
            f"out of memory ({text}): lower --optim.batch-size, --views.frames, --bank.size or the encoder's "
            "width; a run with a checkpoint continues on a larger machine with --resume"
        ) from None


def main(args: list[str] | None = None) -> None:
    """The command line: a preset by name (default demo), then any field as a flag, and --resume [FOLDER]."""
    args = list(sys.argv[1:] if args is None else args)
    with exit_on_error(), out_of_memory_is_bad_input():
        with one_speaks():
            name = args.pop(0) if args and not args[0].startswith("-") else ""
            require(
                not any(arg.split("=")[0] == "--preset" for arg in args),
                "a preset's name comes first, without a flag: python -m a2mc_fast.train own",
            )
            folder = _take(args, "--resume")
            resume = folder is not None and not {"-h", "--help"} & set(args)
            default = _resumed(name, folder or "", args) if resume else preset(name or "demo")
            config = tyro.cli(
                Config,
                default=default,
                args=args,
                prog="python -m a2mc_fast.train",
                description="Pretrain a skeleton encoder: python -m a2mc_fast.train [PRESET] [options]. "
                f"Presets: {', '.join(BASE_PRESETS)}; append -b1 .. -b4 or -a1 .. -a3 for an ablation. "
                "--resume FOLDER continues a run with its settings, --resume the preset's last.",
            )
        from a2mc_fast.run import derive, start

        if not resume:
            with one_speaks():
                config = derive.fitted(config, args)
        start.pretrain(config, resume=resume)


def _take(args: list[str], flag: str) -> str | None:
    """Take a flag out of a command line, with its value if it has one. None if it is not there."""
    for number, arg in enumerate(args):
        name, _, value = arg.partition("=")
        if name == flag:
            if not value and args[number + 1 : number + 2] and not args[number + 1].startswith("-"):
                value = args.pop(number + 1)
            del args[number]
            return value
    return None


def _resumed(name: str, folder: str, args: list[str]) -> Config:
    """The settings of the run to resume: `folder`, --run.out, or the preset's last unfinished one."""
    from a2mc_fast.run.folder import stored, unfinished

    out = _take(args, "--run.out")
    require(not (folder and out), "--resume FOLDER names the run: leave --run.out away")
    found = Path(folder or out or unfinished(name or "demo"))
    # what another rank does not see here, it is told of once all have met
    config = stored(found) if rank() == 0 or found.is_dir() else preset(name or "demo")
    require(
        name in ("", config.preset),
        f"{found} holds a run of {config.preset}, not of {name}: python -m a2mc_fast.train --resume {found}",
    )
    if not (folder or out):
        tell(f"resuming {found}")
    return replace(config, run=replace(config.run, out=str(found)))


if __name__ == "__main__":
    main()
