"""One whole run as a frozen dataclass, the presets that are such runs, and their JSON form.

Every field is a flag of the command line (`--optim.lr 0.02`). Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from a2mc_fast.config.settings import (
    AttackConfig,
    BankConfig,
    EncoderConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    SyntheticConfig,
    ViewConfig,
)
from a2mc_fast.errors import InputError, Seed, check_ranges, require
from a2mc_fast.files import read_json, typed


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One whole run. The defaults are the paper's for NTU RGB+D 60, cross-subject."""

    preset: str = "ntu60-xsub"
    """Name of the preset this came from."""
    data: str = ""
    """Packed clips (.safetensors) made by a2mc_fast.prepare; empty = the built-in synthetic set."""
    split: str = "xsub"
    """Protocol: its training clips are pretrained on, kNN tests on the others."""
    init_from: str = ""
    """Begin with the encoder of this run, checkpoint, or released CMD, ISC or PCM3 file; empty = random."""
    stream: Literal["joint", "motion", "bone"] = "joint"
    """What the encoder sees: coordinates, their differences in time, or bone vectors."""
    seed: Seed = 0
    """Seed of weights, batch order and views."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "bf16"
    """Arithmetic of the encoder on a GPU; features, loss, bank and master weights stay float32. On a CPU
    everything runs in fp32."""
    views: ViewConfig = field(default_factory=ViewConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check_ranges(self)
        require(
            self.bank.size >= self.optim.batch_size,
            f"bank.size {self.bank.size} is smaller than optim.batch_size {self.optim.batch_size}: "
            "a batch of keys must fit into the bank",
        )
        require(
            self.fits_kernels or self.run.backend != "triton",
            f"run.backend triton knows features of at most 256 alone, not {self.encoder.projection}: lower "
            "--encoder.projection, or use --run.backend torch",
        )

    @property
    def about(self) -> dict[str, Any]:
        """What of a run its results tell."""
        data = self.data or "synthetic"
        return {"data": data, "split": self.split, "stream": self.stream, "encoder": self.encoder.name}

    @property
    def fits_kernels(self) -> bool:
        """Whether the Triton kernels know features of this width."""
        return self.encoder.projection <= 256

    def require_fit(self, clips: int, classes: int, ranks: int) -> None:
        """`InputError` unless so many ranks can train on so many training clips of so many classes."""
        batch = self.optim.batch_size
        require(
            batch % ranks == 0,
            f"--optim.batch-size {batch}, the joint batch, cannot be shared evenly by {ranks} ranks: choose "
            f"a multiple of {ranks}",
        )
        require(
            clips > 1,
            f"protocol {self.split!r} has {clips} training clips: choose another with --split, or prepare "
            "the data with one",
        )
        require(
            clips >= batch,
            f"protocol {self.split!r} has {clips} training clips, fewer than one batch: lower "
            f"--optim.batch-size {batch}",
        )
        require(
            classes >= 2 or not self.attack.radius,
            f"the data has {classes} labelled classes and the attack needs at least 2: give --attack.classes",
        )

    @property
    def bank_lr(self) -> float:
        """Step size of the ascent at this bank size."""
        return self.bank.lr * (self.bank.size / 16384)

    @property
    def warmup_steps(self) -> int:
        """MoCo steps before the method proper begins."""
        if self.bank.warmup_steps >= 0:
            return self.bank.warmup_steps
        return -(-self.bank.size // self.optim.batch_size)


def _paper(preset: str, data: str, split: str, *, epochs: int = 450, milestone: int = 350) -> Config:
    """The paper's run on one protocol (sec. IV-B)."""
    optim = OptimConfig(epochs=epochs, milestones=(milestone,))
    # an epoch takes a GPU some seconds, and a checkpoint has 600 MB
    return Config(preset=preset, data=data, split=split, optim=optim, run=RunConfig(checkpoint_every=10))


def own_data() -> Config:
    """Any skeleton's clips, from a hundred on, as for a thousand; `derive` fits it to those at hand.

    The feature is the mean over time, which tells clips apart before any step, so that a short warm-up is
    enough, beside the last output, which learns their order in time, and the deviation over time, which
    knows how much moved; normalised, so that none of them drowns the others. Keys replace the rows every few
    steps, because the encoder of a short run outruns them, and views are sheared half as much as in the
    paper, which leaves more of a clip to learn from.
    """
    return Config(
        preset="own",
        data="clips.safetensors",
        views=ViewConfig(frames=16, shear=0.5),
        encoder=EncoderConfig(
            hidden=64, layers=1, pool="mean+last+std", feature_norm=True, channels=8, size="small", width=128
        ),
        loss=LossConfig(mix=(0.1,)),
        bank=BankConfig(size=296, lr=12.0, temperature=0.07, warmup_steps=300, refresh=30),
        optim=OptimConfig(lr=0.15, epochs=247, milestones=(), ramp_steps=40, ema=0.99),
        run=RunConfig(eval_every=21, checkpoint_every=10),
    )


def demo() -> Config:
    """The no-argument default: the whole method on the built-in set, sized for two CPU cores.

    The feature is that of `own`; 16 frames tell these clips apart as well as 32, in half the time, and half
    the paper's shear leaves more of them to learn from.
    A batch of keys replaces the oldest rows in every step, and the others climb at the paper's rate: rows
    that lived longer fell behind the encoder of so short a run.
    """
    return Config(
        preset="demo",
        precision="fp32",
        views=ViewConfig(frames=16, shear=0.5),
        encoder=EncoderConfig(hidden=64, layers=1, pool="mean+last+std", feature_norm=True),
        loss=LossConfig(mix=(0.1,)),
        bank=BankConfig(size=256, temperature=0.07, warmup_steps=300, refresh=64),
        optim=OptimConfig(lr=0.15, epochs=70, milestones=(), ramp_steps=40, ema=0.99),
        run=RunConfig(threads=1),
    )


def _ablations(config: Config) -> dict[str, Config]:
    """The paper's ablation rows (Tables V and VI) of one run, as complete configurations."""
    plain = replace(config.loss, mix=())
    fifo = replace(config.bank, kind="fifo")
    no_attack = replace(config.attack, radius=0.0)
    basic_only = replace(plain, weak="off", strong="off")
    infonce = replace(plain, strong="contrast")
    no_views = replace(config.views, augment=False)
    b1 = replace(config, attack=no_attack, loss=basic_only, bank=replace(fifo, warmup_steps=0))
    variants = {
        "b1": b1,
        "b2": replace(config, attack=no_attack, loss=replace(basic_only, mix=config.loss.mix)),
        "b3": replace(config, loss=infonce, bank=fifo),
        "b4": replace(config, loss=plain, bank=fifo),
        "a1": b1,
        "a2": replace(config, attack=no_attack),
        "a3": replace(config, views=no_views),
    }
    return {suffix: replace(v, preset=f"{config.preset}-{suffix}") for suffix, v in variants.items()}


_RUNS = (
    demo(),
    _paper("ntu60-xsub", "ntu60.safetensors", "xsub"),
    _paper("ntu60-xview", "ntu60.safetensors", "xview"),
    _paper("ntu120-xsub", "ntu120.safetensors", "xsub"),
    _paper("ntu120-xset", "ntu120.safetensors", "xset"),
    _paper("pku1", "pku1.safetensors", "xsub"),
    _paper("pku2", "pku2.safetensors", "xsub", epochs=1000, milestone=800),
    own_data(),
)

PRESETS: dict[str, Config] = {run.preset: run for base in _RUNS for run in (base, *_ablations(base).values())}
"""Complete runs by name: each data set, and with -b1 .. -b4, -a1 .. -a3 appended its ablations."""

BASE_PRESETS: tuple[str, ...] = tuple(run.preset for run in _RUNS)


def preset(name: str) -> Config:
    """The preset of this name; `InputError` lists them otherwise."""
    if name not in PRESETS:
        raise InputError(
            f"unknown preset {name!r}; choose one of {', '.join(BASE_PRESETS)}, "
            "or one of them with -b1, -b2, -b3, -b4, -a1, -a2 or -a3 appended for an ablation"
        )
    return PRESETS[name]


def located(config: Config) -> Config:
    """The same run, with paths that hold in any folder."""
    paths = {name: getattr(config, name) for name in ("data", "init_from")}
    return replace(config, **{name: os.path.abspath(path) for name, path in paths.items() if path})


def to_dict(config: Any) -> dict[str, Any]:
    """JSON form of a configuration."""
    return dataclasses.asdict(config)


def flat(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """Every setting by its name on the command line, such as "optim.lr", of a run or its JSON form."""
    groups = config if isinstance(config, Mapping) else to_dict(config)
    return {
        f"{group}.{name}".rstrip("."): value
        for group, held in groups.items()
        for name, value in (held if isinstance(held, Mapping) else {"": held}).items()
    }


def differences(old: Config, new: Config) -> list[str]:
    """Fields in which two runs differ, as "name: old -> new".

    The preset's name, `run`, and where the data lies do not count: what they are, `Clips.identity` tells.
    """
    after = flat(new)
    return [
        f"{name}: {value} -> {after[name]}"
        for name, value in flat(old).items()
        if value != after[name] and name not in ("preset", "data") and not name.startswith("run.")
    ]


def read_settings(path: Path) -> Config:
    """What a run's config.json holds. `InputError` if it is none."""
    content = read_json(path)
    if isinstance(content, dict):
        content.pop("machine", None)
    config: Config = typed(content, Config, str(path))
    return config
