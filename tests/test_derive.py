"""The settings of `own` from its data: sane at every size, flags win, and a run stores what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from a2mc_fast.config import PRESETS, EncoderConfig, ViewConfig, differences, preset
from a2mc_fast.run.derive import DERIVED, Facts, derive, facts, fitted, given_flags, sentence
from a2mc_fast.train import main
from tests.test_protocols import class_clips


@pytest.mark.parametrize("clips", [1, 2, 31, 100, 270, 511, 512, 1019, 5000, 40091, 100000])
@pytest.mark.parametrize("name", ["own", "own-b1"])
def test_every_size_of_set_gets_a_run_that_fits_it(clips: int, name: str) -> None:
    config = derive(preset(name), Facts(clips, 40, 20, 1))
    batch, rows = config.optim.batch_size, config.bank.size
    assert batch <= max(clips, 2) and batch <= rows <= max(batch, 0.31 * clips)
    assert 1 <= config.bank.refresh <= batch and rows / config.bank.refresh >= 0.9 * min(10, rows / batch)
    steps = config.warmup_steps + config.optim.epochs * max(clips // batch, 1)
    assert steps == pytest.approx(4000 * max(1, clips / 1000) ** 0.5, rel=0.1)
    assert config.warmup_steps * batch >= rows and 0.06 < config.warmup_steps / steps < 0.09
    assert config.run.eval_every <= config.optim.epochs


def test_the_preset_is_what_a_thousand_clips_give() -> None:
    assert derive(preset("own"), Facts(1000, 40, 20, 1)) == preset("own")


def test_clips_in_a_plane_are_sheared_less() -> None:
    own, deep = preset("own"), facts(class_clips(), "xsub")
    clips = class_clips()
    clips.frames[:, 2] = 0
    flat = facts(clips, "xsub")
    assert (deep.flat, flat.flat) == (False, True)
    assert derive(own, deep).views.shear == own.views.shear > derive(own, flat).views.shear > 0
    assert derive(own, flat, {"views.shear"}).views.shear == own.views.shear


@pytest.mark.parametrize("name", ["stgcn", "dsta", "scd"])
def test_encoders_of_single_joints_get_easier_views_and_sizes_of_small_sets(name: str) -> None:
    own = preset("own")
    own = replace(own, encoder=replace(own.encoder, name=name))
    config, paper = derive(own, Facts(270, 112, 15, 1)), ViewConfig()
    assert (config.views.shear, config.views.jitter) == (0.5, 0.3)
    assert (
        config.views.frames == 16 and config.optim.lr < derive(preset("own"), Facts(270, 112, 15, 1)).optim.lr
    )
    steps = [
        c.warmup_steps + c.optim.epochs * (270 // 32)
        for c in (config, derive(preset("own"), Facts(270, 112, 15, 1)))
    ]
    assert steps[1] == pytest.approx(2 * steps[0], rel=0.01)  # one of theirs takes several times as long
    assert own.encoder.feature_norm and not config.encoder.feature_norm
    assert derive(own, Facts(270, 112, 15, 1), {"encoder.feature_norm"}).encoder.feature_norm
    assert config.encoder.options in ({"channels": 8}, {"size": "small"}, {"width": 128})
    flat = derive(own, Facts(270, 112, 15, 1, flat=True))
    assert flat.views.shear < config.views.shear
    # at the size of the paper's sets as in the public codes
    large, full = derive(own, Facts(40091, 80, 25, 2)).encoder, EncoderConfig(name=name)
    assert large.options == full.options or (name == "scd" and large.width == 1024)
    kept = derive(own, Facts(270, 112, 15, 1), {"views.shear", "views.jitter", "views.frames"})
    assert kept.views == own.views == replace(paper, frames=own.views.frames, shear=own.views.shear)


def test_a_sentence_names_the_sizes_of_its_encoder_alone() -> None:
    own, known = preset("own"), Facts(270, 112, 15, 1)
    for name, sizes in (("bigru", ["hidden"]), ("stgcn", ["channels"]), ("nets:Net", [])):
        said = sentence(derive(replace(own, encoder=replace(own.encoder, name=name)), known), known)
        found = [size for size in ("hidden", "channels", "size", "width") if f"--encoder.{size} " in said]
        assert found == sizes


def test_flags_win_and_what_follows_from_them_follows() -> None:
    known, own = Facts(270, 112, 15, 1), preset("own")
    plain = derive(own, known)
    assert (plain.optim.batch_size, plain.bank.size, plain.bank.refresh) == (32, 80, 8)
    assert derive(plain, known) == plain  # a second time changes nothing
    given = derive(own, known, {"optim.batch_size", "bank.refresh"})
    assert (given.optim.batch_size, given.bank.refresh) == (64, 30)
    # as many steps with half as many in an epoch
    assert given.optim.epochs == round((4000 - given.warmup_steps) / (270 // 64))
    assert derive(own, known, {"bank.size"}).bank.size == own.bank.size


def test_all_rows_of_a_set_take_the_same_steps() -> None:
    known = Facts(431, 40, 20, 1)
    runs = [derive(config, known) for name, config in PRESETS.items() if name.split("-")[0] == "own"]
    assert len(runs) == 8
    assert len({(run.warmup_steps, run.optim, run.bank.size, run.views.frames) for run in runs}) == 1


def test_what_is_derived_is_what_is_listed() -> None:
    changed = differences(preset("own"), derive(preset("own"), Facts(40000, 300, 25, 2)))
    assert {line.split(":")[0] for line in changed} <= set(DERIVED)
    assert derive(preset("own"), Facts(400, 300, 25, 2)).views.frames == 32


def test_flags_are_recognised_as_they_are_written() -> None:
    assert given_flags(["--bank.size", "96", "--optim.batch-size=8", "own"]) == {
        "bank.size",
        "optim.batch_size",
    }
    assert given_flags(["--encoder.no-feature-norm", "--views.noise-std", "0"]) == {
        "encoder.feature_norm",
        "views.noise_std",
    }


def test_a_run_says_and_stores_what_was_derived(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class_clips().save(tmp_path / "data.safetensors")
    args = ["--data", str(tmp_path / "data.safetensors"), "--run.out", str(tmp_path / "run")]
    small = [
        "--views.frames",
        "8",
        "--encoder.hidden",
        "8",
        "--bank.warmup-steps",
        "2",
        "--optim.epochs",
        "1",
    ]
    main(["own", *args, *small])
    printed = capsys.readouterr().out
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    unread = {"encoder.channels", "encoder.size", "encoder.width"}
    for name in DERIVED:
        part, field = name.split(".")
        if stored[part][field] is True:
            assert f" --{name.replace('_', '-')} " in printed
            continue
        assert (f"--{name.replace('_', '-')} " in printed) == (name not in unread)
        if name in unread:
            continue
        value = str(stored[part][field]).strip("[]")
        assert f"--{name.replace('_', '-')} {value}" in printed
    assert (stored["views"]["frames"], stored["bank"]["warmup_steps"]) == (8, 2)
    main(["own", *args, *small, "--resume"])
    assert "nothing to resume" in capsys.readouterr().out


def test_the_papers_presets_stay_the_papers() -> None:
    for name, config in PRESETS.items():
        if not name.startswith("own"):
            assert fitted(config, []) is config
