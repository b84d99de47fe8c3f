"""The settings of `own` that follow from the data: one function, `derive`, of what `facts` says of a set.

A flag wins over what is derived, and what follows from it (as epochs do from the batch) is derived from it.
The numbers come from small sets (`evaluation/README.md`, "What was found on small sets"); how they grow leads
towards the paper's.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from a2mc_fast.config import Config, EncoderConfig, LossConfig
from a2mc_fast.data import Clips
from a2mc_fast.encoders.build import own_class
from a2mc_fast.errors import tell
from a2mc_fast.run.opened import load_clips

_SHARE = 0.3  # bank rows per training clip
_LIFE = 10  # steps after which a key has replaced a row, where the batch has enough keys
_STEPS = 4000  # of a set of up to 1,000 clips
_WARMUP, _RAMP = 0.075, 0.01  # of these
_LARGEST_BANK = 16384  # the paper's
_MIX, _MANY = (0.1,), 10_000  # one share λ below so many clips, and from there on the paper's four
_FLAT_SHEAR = 0.3  # with two axes only, a shear of 1 is often near to a line
_RATE, _RATES = 0.03, {"bigru": 0.15, "stgcn": 0.1}
# whose BatchNorm sees every joint that jittering hits: the paper's views teach them little in so few steps,
# of which they get half as many, because one takes them several times as long
_PER_JOINT, _JITTER = ("stgcn", "dsta", "scd"), 0.3

DERIVED = (
    "views.frames",
    "views.shear",
    "views.jitter",
    "loss.mix",
    "encoder.feature_norm",
    "encoder.hidden",
    "encoder.channels",
    "encoder.size",
    "encoder.width",
    "bank.size",
    "bank.warmup_steps",
    "bank.refresh",
    "bank.lr",
    "optim.batch_size",
    "optim.epochs",
    "optim.lr",
    "optim.ramp_steps",
)
"""The fields that follow from the data."""


class Facts(NamedTuple):
    """What of a set of clips the settings follow."""

    clips: int  # training clips of the protocol
    frames: int  # their median length
    joints: int
    persons: int
    flat: bool = False  # 2-D keypoints


def facts(clips: Clips, split: str) -> Facts:
    """Those of a protocol's training clips. `InputError` if there is no such protocol."""
    training = clips.split(split)[0]
    median = int(clips.lengths[training].median()) if len(training) else 0
    flat = not bool(clips.has_depth)
    return Facts(len(training), median, clips.skeleton.num_joints, clips.num_persons, flat)


def derive(config: Config, known: Facts, given: Collection[str] = ()) -> Config:
    """The run for these clips. `given` names the fields that stay as they are, as "bank.size"."""

    def chosen(name: str, value: Any) -> Any:
        part, field = name.split(".")
        return getattr(getattr(config, part), field) if name in given else value

    clips = max(known.clips, 1)
    per_joint = config.encoder.name in _PER_JOINT
    frames = chosen("views.frames", 16 if known.frames <= 128 else 32)
    batch = chosen("optim.batch_size", max(2, min(64 if clips >= 512 else 32, clips)))
    rows = chosen("bank.size", max(batch, min(int(_SHARE * clips), _LARGEST_BANK) // 8 * 8))
    refresh = chosen("bank.refresh", min(batch, math.ceil(rows / _LIFE)))
    # a set a hundred times as large gets ten times the steps
    most = _STEPS * max(1.0, math.sqrt(clips / 1000))
    total = round(most / 2 if per_joint else most)
    warmup = chosen("bank.warmup_steps", max(math.ceil(rows / batch), round(_WARMUP * most)))
    epochs = chosen("optim.epochs", max(1, round((total - warmup) / max(clips // batch, 1))))
    # rows without mixing stay so
    mix = LossConfig().mix if clips >= _MANY else _MIX
    return replace(
        config,
        loss=replace(config.loss, mix=chosen("loss.mix", mix if config.loss.mix else ())),
        views=replace(
            config.views,
            frames=frames,
            shear=chosen("views.shear", _FLAT_SHEAR if known.flat else config.views.shear),
            jitter=chosen("views.jitter", _JITTER if per_joint else config.views.jitter),
        ),
        encoder=_sized(config.encoder, clips, chosen),
        bank=replace(
            config.bank,
            size=rows,
            warmup_steps=warmup,
            refresh=refresh,
            lr=chosen("bank.lr", round(max(3.0, min(12.0, 12.0 * _LIFE * refresh / rows)), 2)),
        ),
        optim=replace(
            config.optim,
            batch_size=batch,
            epochs=epochs,
            lr=chosen("optim.lr", _RATES.get(config.encoder.name, _RATE)),
            ramp_steps=chosen("optim.ramp_steps", round(_RAMP * most)),
        ),
        run=replace(
            config.run,
            eval_every=chosen("run.eval_every", max(1, round(epochs / 12))),
            checkpoint_every=chosen("run.checkpoint_every", max(1, round(epochs / 24))),
        ),
    )


def _sized(encoder: EncoderConfig, clips: int, chosen: Callable[[str, Any], Any]) -> EncoderConfig:
    """The encoder for so many clips: a width is doubled for four times the clips, up to the public codes'."""
    doubled = 2 ** max(0, round(math.log(clips / 1000, 4)))
    return replace(
        encoder,
        # of the others it made an ST-GCN worse
        feature_norm=chosen("encoder.feature_norm", encoder.feature_norm and encoder.name == "bigru"),
        hidden=chosen("encoder.hidden", min(512, 64 * doubled)),
        channels=chosen("encoder.channels", min(16, 8 * doubled)),
        size=chosen("encoder.size", "small" if clips < _MANY else "full"),
        width=chosen("encoder.width", min(2048, 128 * doubled)),
    )


def sentence(config: Config, known: Facts) -> str:
    """What was derived from what, as flags: what a run prints first."""
    sizes = {f"encoder.{option}" for option in config.encoder.options}
    sizes.add("encoder.feature_norm")
    read = [n for n in DERIVED if not n.startswith("encoder.") or n in sizes]
    flags = " ".join(_written(name, operator.attrgetter(name)(config)) for name in read)
    persons = "one person" if known.persons == 1 else f"{known.persons} persons"
    return (
        f"derived from {known.clips} training clips of {known.frames} frames (median), {known.joints} joints "
        f"{'in a plane ' * known.flat}and {persons}: {flags}"
    )


def _written(name: str, value: Any) -> str:
    """As a command line takes it."""
    part, field = name.replace("_", "-").split(".")
    if isinstance(value, bool):
        return f"--{part}.{'' if value else 'no-'}{field}"
    return f"--{part}.{field} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


def given_flags(args: Sequence[str]) -> frozenset[str]:
    """The fields that a command line names: "bank.size" for --bank.size 96, --bank.size=96, and
    "encoder.input_norm" for --encoder.no-input-norm."""
    flags = (arg.removeprefix("--").split("=")[0] for arg in args if arg.startswith("--"))
    return frozenset(flag.replace(".no-", ".").replace("-", "_") for flag in flags)


def fitted(config: Config, args: Sequence[str]) -> Config:
    """A run of `own` with what follows from its data, but for the flags in `args`; other runs as they are.

    A set's only protocol needs no flag.
    """
    if not config.preset.startswith("own"):
        return config
    if ":" in config.encoder.name:
        own_class(config.encoder.name)  # what cannot be imported is refused before anything is said
    clips, given = load_clips(config, torch.device("cpu")), given_flags(args)
    if "split" not in given and len(clips.splits) == 1:
        config = replace(config, split=next(iter(clips.splits)))
    known = facts(clips, config.split)
    config = derive(config, known, given)
    tell(sentence(config, known))
    return config
