"""Presets hold the paper's settings; JSON round trips; wrong fields are named."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from a2mc_fast.ablate import Ablation
from a2mc_fast.config import (
    BASE_PRESETS,
    PRESETS,
    BankConfig,
    Config,
    EncoderConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    demo,
    differences,
    preset,
    settings,
    to_dict,
)
from a2mc_fast.data import Clips
from a2mc_fast.embed import Embed
from a2mc_fast.errors import InputError, ranges
from a2mc_fast.evaluation import settings as asked
from a2mc_fast.files import typed
from a2mc_fast.plots import __main__ as plots
from a2mc_fast.predict import Predict
from a2mc_fast.run.log import time_left
from a2mc_fast.trainer import Trainer
from tests.conftest import SMALL
from tests.test_train import tiny


def test_the_default_is_the_paper() -> None:
    config = preset("ntu60-xsub")
    assert (config.bank.size, config.bank.lr, config.bank.temperature, config.bank_lr) == (
        16384,
        3.0,
        0.03,
        3.0,
    )
    assert (config.loss.temperature, config.loss.mix) == (0.07, (0.4, 0.3, 0.2, 0.1))
    assert (config.optim.lr, config.optim.batch_size, config.optim.epochs) == (0.01, 64, 450)
    assert (config.attack.lr, config.attack.radius, config.warmup_steps) == (0.1, 0.5, 256)
    assert preset("pku2").optim == OptimConfig(epochs=1000, milestones=(800,))


def test_ablations() -> None:
    b1, b2, b3, b4 = (preset(f"ntu60-xsub-b{i}") for i in (1, 2, 3, 4))
    assert (b1.bank.kind, b1.attack.radius, b1.loss) == (
        "fifo",
        0,
        LossConfig(mix=(), weak="off", strong="off"),
    )
    assert (b2.bank.kind, b2.attack.radius, b2.loss) == (
        "gradient",
        0,
        LossConfig(weak="off", strong="off"),
    )
    assert (b3.bank.kind, b3.attack.radius, b3.loss) == ("fifo", 0.5, LossConfig(mix=(), strong="contrast"))
    assert (b4.bank.kind, b4.attack.radius, b4.loss) == ("fifo", 0.5, LossConfig(mix=()))
    a1, a2, a3 = (preset(f"ntu60-xsub-a{i}") for i in (1, 2, 3))
    assert replace(a1, preset="") == replace(b1, preset="")
    assert not a2.attack.radius and a2.loss == LossConfig()
    assert a3.attack.radius and not a3.views.augment


def test_every_preset_survives_json() -> None:
    assert len(PRESETS) == 8 * len(BASE_PRESETS)
    for config in PRESETS.values():
        assert typed(json.loads(json.dumps(to_dict(config))), Config, "config") == config


@pytest.mark.parametrize(
    "content, words",
    [
        ({"optim": {"lr": "fast"}}, "config.optim.lr must be float, got 'fast'"),
        ({"optim": {"epochs": True}}, "config.optim.epochs must be int, got True"),
        ({"bank": {"kind": "lifo"}}, "config.bank.kind must be one of gradient, fifo, got 'lifo'"),
        ({"banks": {}}, "config has unknown fields: banks"),
        ({"loss": {"mix": 3}}, "config.loss.mix must be a list, got 3"),
        ({"loss": []}, "config.loss must be an object, got list"),
    ],
    ids=str,
)
def test_damaged_json_is_named(content: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError) as error:
        typed(content, Config, "config")
    assert words in str(error.value)


def test_cross_field_checks() -> None:
    with pytest.raises(ValueError, match=r"bank\.size 32 is smaller than optim\.batch_size 64"):
        Config(bank=BankConfig(size=32))
    with pytest.raises(ValueError, match=r"optim\.milestones must ascend, got \(9, 3\)"):
        OptimConfig(milestones=(9, 3))
    with pytest.raises(ValueError, match=r"loss\.mix must be in \(0, 1\)"):
        LossConfig(mix=(1.0,))
    with pytest.raises(ValueError, match=r"run\.backend triton knows features of at most 256 alone, not 300"):
        Config(encoder=EncoderConfig(projection=300), run=RunConfig(backend="triton"))


def test_differences_are_listed_by_field() -> None:
    config = demo()
    other = replace(config, optim=replace(config.optim, lr=0.7), run=replace(config.run, log_every=3))
    assert differences(config, other) == [f"optim.lr: {config.optim.lr} -> 0.7"]


def test_small_banks_scale_the_ascent() -> None:
    assert Config(bank=BankConfig(size=1024)).bank_lr == pytest.approx(3.0 / 16)


def test_help_needs_no_torch() -> None:
    code = "import sys, a2mc_fast.train, a2mc_fast.prepare; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


KINDS = [
    *(kind for room in (settings, asked) for kind in vars(room).values() if dataclasses.is_dataclass(kind)),
    *(plots.Curves, plots.Confusion, plots.Tsne, plots.Attack, plots.Neighbours),
    *(Config, Ablation, Embed, Predict),
]
NUMBERS = (math.inf, math.nan, -1, 1e300, 10**400, 1e-300)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_number_has_a_range(kind: Any) -> None:
    required = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory]
    given: dict[str, Any] = {name: Path("x") if name == "run" else (Path("x"),) for name in required}
    given |= {"data": "x"} if kind is asked.Transfer else {"export": "x.pt2"} if kind is Embed else {}
    given |= {"out": Path("x.csv"), "window": 1} if kind is Predict else {}
    good = kind(**given)
    for name, inside in ranges(kind).items():
        assert inside is not None, f"{kind.__name__}.{name} has no range"
        for number in NUMBERS:
            value = (number,) if isinstance(getattr(good, name), tuple) else number
            if number in inside:
                kind(**{**given, name: value})
            else:
                with pytest.raises(InputError, match=rf"{name} must be in [\[(]"):
                    kind(**{**given, name: value})


@pytest.mark.parametrize("end", [0, 1], ids=["lowest", "highest"])
def test_a_run_at_the_ends_of_the_ranges_stays_finite(make_clips: Callable[..., Clips], end: int) -> None:
    clips = make_clips([8] * 24, persons=1, skeleton=SMALL)
    config = tiny(Path("none"), Path("none"))
    config = replace(config, bank=replace(config.bank, warmup_steps=1))
    for part in ("views", "attack", "loss", "bank", "optim"):
        group, changes = getattr(config, part), {}
        for name, inside in ranges(type(group)).items():
            value = getattr(group, name)
            if isinstance(value[0] if isinstance(value, tuple) else value, float) and inside:
                extreme = inside.ends[end]
                extreme = extreme if extreme in inside else math.nextafter(extreme, 0.5)
                changes[name] = (extreme,) if isinstance(value, tuple) else extreme
        trainer = Trainer(replace(config, **{part: replace(group, **changes)}), clips)
        for step in range(3):
            values = trainer.step(step)
        assert int(trainer.fault) == -1 and all(math.isfinite(value) for value in values.values()), part


def test_the_warm_up_foretells_its_own_end_alone() -> None:
    config = preset("demo")
    warmup = config.warmup_steps
    assert time_left(config, warmup - 100, warmup + 500, rate=10.0) == "10 s of warm-up left"
    assert time_left(config, warmup, warmup + 500, rate=10.0) == "50 s left"
