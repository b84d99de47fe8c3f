"""Pretraining: `python -m a2mc_fast.train [PRESET] [--FLAG VALUE ...] [--resume]`.

Here is what is asked; `run.start.pretrain` is the run, `trainer.Trainer.step` the algorithm. torch is
imported when a run begins, so that `--help` and wrong flags answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import tyro

from a2mc_fast.config import BASE_PRESETS, Config, preset
from a2mc_fast.errors import InputError, exit_on_error, one_speaks, require


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
    """The command line: a preset by name (default demo), then any field as a flag, and --resume."""
    args = list(sys.argv[1:] if args is None else args)
    with exit_on_error(), out_of_memory_is_bad_input():
        with one_speaks():
            name = args.pop(0) if args and not args[0].startswith("-") else "demo"
            resume = "--resume" in args
            require(
                not any(arg.split("=")[0] == "--preset" for arg in args),
                "a preset's name comes first, without a flag: python -m a2mc_fast.train own",
            )
            config = tyro.cli(
                Config,
                default=preset(name),
                args=[arg for arg in args if arg != "--resume"],
                prog="python -m a2mc_fast.train",
                description="Pretrain a skeleton encoder: python -m a2mc_fast.train [PRESET] [options]. "
                f"Presets: {', '.join(BASE_PRESETS)}; append -b1 .. -b4 or -a1 .. -a3 for an ablation. "
                "--resume continues the run in its folder.",
            )
        from a2mc_fast.run import derive, start

        with one_speaks():
            config = derive.fitted(config, args)
        start.pretrain(config, resume=resume)


if __name__ == "__main__":
    main()
