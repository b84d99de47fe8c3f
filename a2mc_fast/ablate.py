"""The paper's ablations: `python -m a2mc_fast.ablate DATA ... [PRESET] [--rows ROW ...] [--FLAG VALUE ...]`.

Trains every row as an ordinary run in its own folder, evaluates it by kNN and by linear evaluation of the
centre crop, and prints Tables V and VI and the table of mixing shares λ (Fig. 7); of several sets, one table
with the untrained encoder beside the rows. What is finished is not run again: the same command continues
where it stopped. Flags are those of `a2mc_fast.train`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace
from typing import Annotated, get_args

import tyro

from a2mc_fast.config import BASE_PRESETS, Config, preset
from a2mc_fast.errors import Count, check_ranges, exit_on_error, require
from a2mc_fast.evaluation.rows import RowName
from a2mc_fast.evaluation.settings import LinearConfig


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What to run."""

    rows: tuple[RowName, ...] = get_args(RowName)
    """b1 .. b4 and full: Table V; a1 .. a3: Table VI; l0 .. l4: none to four mixing shares. Rows that are the
    same run are made once. Several sets: b1, b4 and full by default."""
    seeds: Count = 1
    """Runs per row, with seeds from --seed on."""
    linear: LinearConfig = field(default_factory=lambda: LinearConfig(crop="center"))
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    def __post_init__(self) -> None:
        require(len(self.rows) > 0, "rows must name at least one row")
        check_ranges(self)


def main(args: list[str] | None = None) -> None:
    """The command line: DATA ..., a preset (default own), then --rows, --seeds and any flag of the preset."""
    args = list(sys.argv[1:] if args is None else args)
    with exit_on_error():
        first = next((i for i, arg in enumerate(args) if arg.startswith("-")), len(args))
        files, args = args[:first], args[first:]
        # a file of clips has a suffix or a folder in its name
        base = files.pop() if len(files) > 1 and not {".", "/"} & set(files[-1]) else "own"
        require(base in BASE_PRESETS, f"unknown preset {base!r}; choose one of {', '.join(BASE_PRESETS)}")
        asked_for_help = bool({"-h", "--help"} & set(args))
        require(bool(files) or asked_for_help, "give the packed clips: python -m a2mc_fast.ablate DATA")
        config = replace(preset(base), data=files[0]) if files else preset(base)
        default = Ablation(config=config)
        if len(files) > 1:
            default = replace(default, rows=("b1", "b4", "full"), seeds=3)
        options = tyro.cli(
            Ablation,
            default=default,
            args=args,
            prog="python -m a2mc_fast.ablate",
            description="Train and evaluate the paper's ablations: python -m a2mc_fast.ablate DATA ... "
            f"[PRESET] [options]. Presets: {', '.join(BASE_PRESETS)}; default own.",
        )
        require(options.config.data == files[0], "the packed clips come first, without --data")
        for file in files:
            make = f"python -m a2mc_fast.prepare SOURCE INPUT {file}"
            require(os.path.exists(file), f"{file} not found: name packed clips, or make them with {make}")
        from a2mc_fast.evaluation.ablation import ablate, study
        from a2mc_fast.run.derive import fitted

        configs = [fitted(replace(options.config, data=file), args) for file in files]
        chosen = options.rows, options.seeds, options.linear
        ablate(configs[0], *chosen) if len(configs) == 1 else study(configs, *chosen)


if __name__ == "__main__":
    main()
