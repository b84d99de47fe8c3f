"""Presets hold the paper's settings; JSON round trips; wrong fields are named."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

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
    from_dict,
    preset,
    to_dict,
)


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
    assert (b1.bank.kind, b1.attack.enabled, b1.loss) == (
        "fifo",
        False,
        LossConfig(mix=(), weak="off", strong="off"),
    )
    assert (b2.bank.kind, b2.attack.enabled, b2.loss) == (
        "gradient",
        False,
        LossConfig(weak="off", strong="off"),
    )
    assert (b3.bank.kind, b3.attack.enabled, b3.loss) == ("fifo", True, LossConfig(mix=(), strong="contrast"))
    assert (b4.bank.kind, b4.attack.enabled, b4.loss) == ("fifo", True, LossConfig(mix=()))
    a1, a2, a3 = (preset(f"ntu60-xsub-a{i}") for i in (1, 2, 3))
    assert replace(a1, preset="") == replace(b1, preset="")
    assert not a2.attack.enabled and a2.loss == LossConfig()
    assert a3.attack.enabled and (a3.views.weak, a3.views.strong) == ("none", "none")


def test_every_preset_survives_json() -> None:
    assert len(PRESETS) == 8 * len(BASE_PRESETS)
    for config in PRESETS.values():
        assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


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
        from_dict(content)
    assert words in str(error.value)


def test_cross_field_checks() -> None:
    with pytest.raises(ValueError, match=r"bank\.size 32 is smaller than optim\.batch_size 64"):
        Config(bank=BankConfig(size=32))
    with pytest.raises(ValueError, match=r"optim\.milestones must ascend, got \(9, 3\)"):
        OptimConfig(milestones=(9, 3))
    with pytest.raises(ValueError, match=r"loss\.mix must lie in \(0, 1\)"):
        LossConfig(mix=(1.0,))
    with pytest.raises(ValueError, match=r"run\.backend triton knows features of at most 256 alone, not 300"):
        Config(encoder=EncoderConfig(projection=300), run=RunConfig(backend="triton"))


def test_differences_are_listed_by_field() -> None:
    config = demo()
    other = replace(config, optim=replace(config.optim, lr=0.7), run=replace(config.run, log_every=3))
    assert differences(config, other) == [f"optim.lr: {config.optim.lr} -> 0.7"]


def test_small_banks_scale_the_ascent() -> None:
    assert Config(bank=BankConfig(size=1024)).bank_lr == pytest.approx(3.0 / 16)
    assert Config(bank=BankConfig(size=1024, lr_scaling=False)).bank_lr == 3.0


def test_help_needs_no_torch() -> None:
    code = "import sys, a2mc_fast.train, a2mc_fast.prepare; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
