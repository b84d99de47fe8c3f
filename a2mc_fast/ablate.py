"""The paper's ablations: `python -m a2mc_fast.ablate DATA [PRESET] [--rows ROW ...] [--FLAG VALUE ...]`.

Trains every row as an ordinary run in its own folder, evaluates it by kNN and by linear evaluation of the
centre crop, and prints Tables V and VI and the table of mixing shares λ (Fig. 7). What is finished is not run
again: the same command continues where it stopped. Flags are those of `a2mc_fast.train`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from a2mc_fast.config import BASE_PRESETS, Config, _ablations, differences, preset, to_dict
from a2mc_fast.errors import exit_on_error, require
from a2mc_fast.evaluate import Evaluation, Knn, Linear, evaluate, sha256
from a2mc_fast.evaluation.settings import LinearConfig
from a2mc_fast.evaluation.tables import align, mean_and_std, percent
from a2mc_fast.files import read_json, write_json

FORMAT = "a2mc-ablation/1"
RowName = Literal["b1", "b2", "b3", "b4", "full", "a1", "a2", "a3", "l0", "l1", "l2", "l3", "l4"]
_SHARES = (0.4, 0.3, 0.2, 0.1)  # row l3 mixes by the first three
_YES, _NO = "✓", "✗"


@dataclass(frozen=True)
class Table:
    """A table of the paper: its columns, and for each row its name, label and marks."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[RowName, tuple[str, ...]], ...]


TABLES = (
    Table(
        "Table V: components",
        ("Baseline", "Att-Aug", "PNM", "MC"),
        (
            ("b1", ("B1", _NO, _NO, _NO)),
            ("b2", ("B2", _NO, _YES, _NO)),
            ("b3", ("B3", _YES, _NO, _NO)),
            ("b4", ("B4", _YES, _NO, _YES)),
            ("full", ("A²MC", _YES, _YES, _YES)),
        ),
    ),
    Table(
        "Table VI: targeted attack and untargeted augmentation",
        ("Baseline", "Att", "Aug"),
        (
            ("a1", ("A1", _NO, _NO)),
            ("a2", ("A2", _NO, _YES)),
            ("a3", ("A3", _YES, _NO)),
            ("full", ("A²MC", _YES, _YES)),
        ),
    ),
    Table(
        "Mixing shares",
        ("λ",),
        (
            ("l0", ("none",)),
            ("l1", ("0.4",)),
            ("l2", ("0.4, 0.3",)),
            ("l3", ("0.4, 0.3, 0.2",)),
            ("l4", ("0.4, 0.3, 0.2, 0.1",)),
        ),
    ),
)

# linear evaluation on NTU-60, the paper's Tables V and VI
_PAPER: dict[str, dict[str, float]] = {
    "ntu60-xsub": {
        "b1": 75.6, "b2": 76.9, "b3": 78.5, "b4": 79.0, "full": 80.0, "a1": 75.6, "a2": 79.0, "a3": 79.9
    },
    "ntu60-xview": {
        "b1": 82.8, "b2": 84.2, "b3": 85.6, "b4": 86.7, "full": 87.9, "a1": 82.8, "a2": 86.7, "a3": 87.1
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What to run."""

    rows: tuple[RowName, ...] = get_args(RowName)
    """b1 .. b4 and full: Table V; a1 .. a3: Table VI; l0 .. l4: none to four mixing shares. Rows that are the
    same run are made once."""
    seeds: int = 1
    """Runs per row, with seeds from --seed on."""
    linear: LinearConfig = field(default_factory=lambda: LinearConfig(crop="center"))
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    def __post_init__(self) -> None:
        require(len(self.rows) > 0, "rows must name at least one row")
        require(self.seeds >= 1, f"seeds must be >= 1, got {self.seeds}")


def row_configs(config: Config) -> dict[str, Config]:
    """The configuration of every row, derived from the full method's."""
    shares = {
        f"l{count}": replace(
            config,
            preset=f"{config.preset}-l{count}",
            loss=replace(config.loss, mix=_SHARES[:count]),
        )
        for count in range(len(_SHARES) + 1)
    }
    rows: dict[str, Config] = {**_ablations(config), "full": config, **shares}
    # the preset of B1 has no warm-up, which is MoCo as B1 is; here every row takes the same number of steps
    warmup = config.bank.warmup_steps
    rows = {n: replace(row, bank=replace(row.bank, warmup_steps=warmup)) for n, row in rows.items()}
    return {name: rows[name] for name in get_args(RowName)}


def ablate(options: Ablation) -> dict[str, Any]:
    """Make or reuse the runs, print the tables and write ablation.json in the folder above the runs."""
    from a2mc_fast.run.machine import machine

    config = options.config
    base = Path(config.run.out or f"runs/{config.preset}-ablation")
    rows: dict[str, Any] = {}
    for name in dict.fromkeys(options.rows):
        runs: list[dict[str, Any]] = []
        for seed in range(config.seed, config.seed + options.seeds):
            configs = row_configs(replace(config, seed=seed))
            # rows that are one run share the folder of the first
            first = next(n for n in configs if not differences(configs[n], configs[name]))
            folder = base / f"{first}-seed{seed}"
            run = replace(configs[first], run=replace(config.run, out=str(folder)))
            runs.append({"seed": seed, "run": str(folder), **run_row(run, folder, options.linear)})
        rows[name] = {**mean_and_std(runs), "runs": runs}
    result = {
        "format": FORMAT,
        "preset": config.preset,
        "data": config.data or "synthetic",
        "split": config.split,
        "seeds": options.seeds,
        "rows": rows,
        "config": to_dict(config),
        **machine(),
    }
    write_json(base / "ablation.json", result)
    print(f"{tables(result)}\n\nwrote {base / 'ablation.json'}")
    return result


def run_row(config: Config, folder: Path, linear: LinearConfig) -> dict[str, float]:
    """Train and evaluate one row and seed, as far as its folder does not hold it already."""
    from a2mc_fast.run import checkpoint
    from a2mc_fast.run.start import pretrain

    begun = (folder / checkpoint.FILE).exists()
    if begun:
        changed = differences(checkpoint.load(folder).config, config)
        require(
            not changed,
            f"{folder} was run with another configuration ({'; '.join(changed)}): choose another --run.out",
        )
    else:
        # of a run that was stopped before its first checkpoint there is nothing to continue
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    if not begun or not (folder / "result.json").exists():
        pretrain(config, resume=begun)
    device = config.run.device
    knn = evaluated(Knn(run=folder, device=device), config)
    trained = evaluated(Linear(run=folder, device=device, **vars(linear)), config)
    return {
        "top1_linear_best": trained["top1_best"],
        "top1_linear_last": trained["top1_last"],
        "top1_knn": knn["top1"],
    }


def evaluated(options: Evaluation, config: Config) -> dict[str, Any]:
    """The run's saved result if it was made from this checkpoint with these options, or a new one."""
    from a2mc_fast.run.checkpoint import FILE

    path = options.run / f"{options.protocol}.json"
    if path.exists():
        saved = read_json(path)
        wanted = {
            "checkpoint_sha256": sha256(options.run / FILE),
            "data": config.data or "synthetic",
            "split": config.split,
            "options": json.loads(json.dumps(options.resolved(config.encoder.name))),
        }
        if all(saved.get(name) == value for name, value in wanted.items()):
            return saved
    return evaluate(options)


def tables(result: dict[str, Any]) -> str:
    """The paper's tables of the rows that were run, with the paper's numbers where it has them."""
    paper = _PAPER.get(result["preset"], {})
    seeds = f"{result['seeds']} seeds" if result["seeds"] > 1 else "one seed"
    parts = []
    for table in TABLES:
        chosen = [(name, cells) for name, cells in table.rows if name in result["rows"]]
        if not chosen:
            continue
        head = (*table.columns, "linear best %", "linear last %", "kNN %") + ("paper %",) * bool(paper)
        lines = [head]
        for name, cells in chosen:
            row = result["rows"][name]
            numbers = [percent(row, f"top1_{n}") for n in ("linear_best", "linear_last", "knn")]
            known = [f"{paper[name]:.1f}" if name in paper else ""] * bool(paper)
            lines.append((*cells, *numbers, *known))
        title = f"{table.title} ({Path(result['data']).stem} {result['split']}, {seeds})"
        parts.append(f"{title}\n{align(lines, len(table.columns))}")
    return "\n\n".join(parts)


def main(args: list[str] | None = None) -> None:
    """The command line: DATA, a preset (default own), then --rows, --seeds and any flag of the preset."""
    args = list(sys.argv[1:] if args is None else args)
    with exit_on_error():
        names = [args.pop(0) for _ in range(2) if args and not args[0].startswith("-")]
        base = names[1] if len(names) > 1 else "own"
        require(base in BASE_PRESETS, f"unknown preset {base!r}; choose one of {', '.join(BASE_PRESETS)}")
        asked_for_help = bool({"-h", "--help"} & set(args))
        require(bool(names) or asked_for_help, "give the packed clips: python -m a2mc_fast.ablate DATA")
        config = replace(preset(base), data=names[0]) if names else preset(base)
        options = tyro.cli(
            Ablation,
            default=Ablation(config=config),
            args=args,
            prog="python -m a2mc_fast.ablate",
            description="Train and evaluate the paper's ablations: python -m a2mc_fast.ablate DATA [PRESET] "
            f"[options]. Presets: {', '.join(BASE_PRESETS)}; default own.",
        )
        ablate(options)


if __name__ == "__main__":
    main()
