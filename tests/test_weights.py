"""Encoders from elsewhere: runs and released files to begin with or to evaluate, and own modules."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from a2mc_fast.config import EncoderConfig
from a2mc_fast.data import Clips
from a2mc_fast.encoders import build_encoder
from a2mc_fast.encoders.bigru import BiGRU
from a2mc_fast.evaluate import main as evaluate
from a2mc_fast.evaluation.inference import embed_clips, load_encoder
from a2mc_fast.run import checkpoint, weights
from a2mc_fast.run.start import pretrain
from a2mc_fast.skeleton import NTU25, Skeleton
from a2mc_fast.train import main as train
from tests.conftest import SMALL
from tests.test_encoders import reference_state
from tests.test_evaluate import result_of, tiny_config
from tests.test_train import refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cmd.pth.tar as CMD releases it, with two persons of NTU's joints in ntu.safetensors."""
    folder = tmp_path_factory.mktemp("weights")
    state = reference_state(8, 1, 150, "encoder_q.")[2]
    others = {name.replace("encoder_q", "encoder_k"): tensor for name, tensor in state.items()}
    content = {"epoch": 450, "arch": "gru", "state_dict": {**state, **others, "queue": torch.ones(3)}}
    torch.save(content, folder / "cmd.pth.tar")
    torch.manual_seed(1)
    split = torch.arange(32) // 4 % 4 != 3
    clips = Clips.pack(
        torch.randn(320, 2, 25, 3),
        [10] * 32,
        [n % 4 for n in range(32)],
        NTU25,
        splits={"xsub": split.numpy()},
    )
    clips.save(folder / "ntu.safetensors")
    return folder


def encoder_of(config_name: Path) -> dict[str, Tensor]:
    """The query encoder's weights in a checkpoint."""
    prefix = "model.query.encoder."
    tensors = checkpoint.load(config_name).tensors
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def test_a_released_file_is_an_encoder(folder: Path, tmp_path: Path) -> None:
    file = folder / "cmd.pth.tar"
    plain = BiGRU(NTU25, hidden=8, layers=1)
    weights.load_reference(plain, torch.load(file, weights_only=True)["state_dict"])
    encoder = load_encoder(file)
    x = torch.randn(4, 3, encoder.frames, 25, 2)
    torch.testing.assert_close(encoder(x), plain.eval()(x.transpose(1, 2)))
    evaluate(["knn", str(file), "--data", str(folder / "ntu.safetensors"), "--out", str(tmp_path / "k.json")])
    assert result_of(tmp_path / "k.json")["preset"] == "released"


@pytest.mark.parametrize("source", ["cmd.pth.tar", "a run"])
def test_a_run_begins_with_another_encoder(folder: Path, tmp_path: Path, source: str) -> None:
    config = tiny_config(folder / "ntu.safetensors", tmp_path / "first")
    config = replace(config, encoder=EncoderConfig(hidden=8, layers=1, projection=16))
    file = folder / source if source != "a run" else pretrain(replace(config, seed=3))
    begun = replace(config, init_from=str(file), run=replace(config.run, out=str(tmp_path / "second")))
    run = pretrain(replace(begun, optim=replace(begun.optim, lr=1e-9)))
    expected = weights.load(file).branch().encoder
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(encoder_of(run)[name], parameter, rtol=0, atol=1e-6)
    before = load_encoder(run, untrained=True).branch.encoder
    x = torch.randn(3, 8, 3, 25, 2)
    torch.testing.assert_close(before(x), expected.eval()(x))


class Hostile:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return exec, ("import pathlib; pathlib.Path('executed').touch()",)


def test_bad_files_are_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Hostile()}, "hostile.pth.tar")
    torch.save({"fc.weight": torch.ones(2)}, "other.pth")
    torch.save(reference_state(8, 1, 75, "encoder_q.")[2], "narrow.pt")
    Path("text.pth").write_text("no")
    state = reference_state(8, 2, 150, "encoder_q.")[2]
    del state["encoder_q.encoder.gru.bias_hh_l1_reverse"]
    torch.save(state, "part.pt")
    data = str(folder / "ntu.safetensors")
    for file, words in (
        ("hostile.pth.tar", "holds more than tensors, or is damaged"),
        ("other.pth", "holds no query encoder of CMD, ISC or PCM3"),
        ("narrow.pt", "its BiGRU reads [75] numbers a frame, not 150"),
        ("text.pth", "holds more than tensors, or is damaged"),
        ("part.pt", "part.pt is not whole"),
        ("none.pth.tar", "none.pth.tar not found"),
    ):
        error = refused(evaluate, ["knn", file, "--data", data], capsys)
        assert words in error and error.count("\n") == 1, error
    assert not Path("executed").exists()
    run = ["demo", "--data", data, "--run.out", "r", "--init-from", str(folder / "cmd.pth.tar")]
    run += ["--optim.batch-size", "8"]
    error = refused(train, run, capsys)
    assert "has name bigru, hidden 8" in error and "but asked for is name bigru, hidden 64" in error


class Pooled(nn.Module):
    """An encoder as users write them: [N, C, T, V, M] in, and nothing of ours but what it is built for."""

    def __init__(self, skeleton: Skeleton, *, persons: int, frames: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            nn.Linear(3 * skeleton.num_joints * persons, 12), nn.BatchNorm1d(12), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mean(2).flatten(1))


def test_an_own_module_is_an_encoder(tmp_path: Path, make_clips: Callable[..., Clips]) -> None:
    """Trained, saved, loaded and evaluated by its name alone."""
    clips = make_clips([10] * 40, persons=1, skeleton=SMALL, classes=4)
    clips.save(tmp_path / "data.safetensors")
    config = tiny_config(tmp_path / "data.safetensors", tmp_path / "run")
    run = pretrain(replace(config, encoder=EncoderConfig(name=f"{__name__}:Pooled", projection=16)))
    encoder = load_encoder(run)
    assert encoder.feature_dim == 12 and isinstance(encoder.branch.encoder.net, Pooled)
    x = torch.randn(5, 3, encoder.frames, SMALL.num_joints, 1)
    torch.testing.assert_close(encoder(x), encoder.branch.encoder.net(x))
    first = embed_clips(load_encoder(run, untrained=True), clips)
    assert not torch.allclose(first, embed_clips(encoder, clips))
    evaluate(["linear", str(run), "--epochs", "1"])
    assert result_of(run / "linear.json")["options"]["lr"] == 0.1


def test_what_is_no_encoder_is_one_sentence() -> None:
    for name, words in (
        ("nowhere:Net", "nowhere:Net cannot be imported: No module named 'nowhere'"),
        (f"{__name__}:Nothing", "cannot be imported"),
        ("os:abort", "is no class of nn.Module"),
        ("torch.nn:Identity", "must make features"),
    ):
        with pytest.raises(ValueError, match=words):
            build_encoder(name, SMALL, persons=1, frames=8)
    with pytest.raises(ValueError, match=r"encoder\.name must be bigru, stgcn, dsta, scd, or MODULE:CLASS"):
        EncoderConfig(name="gru")
    assert "nowhere" not in sys.modules


def test_what_is_no_encoder_is_refused_before_anything_is_derived(
    tmp_path: Path, make_clips: Callable[..., Clips], capsys: pytest.CaptureFixture[str]
) -> None:
    make_clips([10] * 40, persons=1, skeleton=SMALL, classes=4).save(tmp_path / "data.safetensors")
    run = ["own", "--data", str(tmp_path / "data.safetensors"), "--run.out", str(tmp_path / "run")]
    error = refused(train, [*run, "--encoder.name", "nowhere:Net"], capsys)
    assert error == "error: --encoder.name nowhere:Net cannot be imported: No module named 'nowhere'\n"


@pytest.mark.parametrize("before, after", [(False, True), (True, False), (True, True)])
def test_a_run_begins_with_an_encoder_whose_feature_is_normalised_or_not(
    tmp_path: Path, make_clips: Callable[..., Clips], before: bool, after: bool
) -> None:
    make_clips([10] * 40, persons=1, skeleton=SMALL, classes=4).save(tmp_path / "data.safetensors")
    config = tiny_config(tmp_path / "data.safetensors", tmp_path / "first")
    config = replace(config, encoder=replace(config.encoder, feature_norm=before))
    first = load_encoder(pretrain(config)).branch.encoder
    run = replace(
        config,
        init_from=str(tmp_path / "first"),
        encoder=replace(config.encoder, feature_norm=after),
        run=replace(config.run, out=str(tmp_path / "second")),
    )
    begun = load_encoder(pretrain(run), untrained=True).branch.encoder
    taken, given = begun.state_dict(), first.state_dict()
    assert ("feature_norm.running_mean" in taken) == after
    for name, tensor in taken.items():
        if before or not name.startswith("feature_norm."):
            assert torch.equal(tensor, given[name]), name
    if after and not before:
        assert not taken["feature_norm.running_mean"].any()
