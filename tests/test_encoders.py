"""The BiGRU against the frame-by-frame loop of the reference, its counts, and batch statistics per view."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from a2mc_fast.config import EncoderConfig, preset
from a2mc_fast.encoders import build_encoder
from a2mc_fast.encoders.bigru import BiGRU, outputs, recurrent_dtype
from a2mc_fast.encoders.branch import frozen, projection_head
from a2mc_fast.encoders.build import build_branch
from a2mc_fast.run.weights import load_reference
from a2mc_fast.skeleton import NTU25
from bench.count import parameters_and_macs
from tests.conftest import SMALL


def reference_state(
    hidden: int, layers: int, width: int, prefix: str
) -> tuple[nn.GRU, nn.BatchNorm1d, dict[str, Tensor]]:
    """A query encoder as CMD builds it, with its state dict."""
    gru = nn.GRU(width, hidden, layers, bidirectional=True, batch_first=True)
    norm = nn.BatchNorm1d(width)
    norm.running_mean, norm.running_var = torch.randn(width), torch.rand(width) + 0.5
    state = {f"{prefix}encoder.gru.{n}": p.detach() for n, p in gru.named_parameters()}
    state |= {f"{prefix}input_norm.{n}": p.detach() for n, p in norm.state_dict().items()}
    state |= {f"{prefix}fc.0.weight": torch.zeros(3, 3), "queue": torch.zeros(2)}
    return gru, norm, state


def frame_by_frame(gru: nn.GRU, norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    """The reference forward pass: one call per frame with the hidden state carried."""
    n, t, c, v, m = x.shape
    sequence = torch.zeros(n, t, v * 6)
    for joint in range(v):
        for axis in range(c):
            for person in range(m):
                sequence[:, :, joint * 6 + axis * 2 + person] = x[:, :, axis, joint, person]
    sequence = norm(sequence.permute(0, 2, 1).contiguous()).permute(0, 2, 1)
    hidden, output = None, None
    for frame in range(t):
        output, hidden = gru(sequence[:, frame : frame + 1], hidden)
    assert output is not None
    return output[:, -1]


@pytest.mark.parametrize("hidden", [12, 75, 150])  # widths that could be taken for the input's
@pytest.mark.parametrize("prefix", ["encoder_q.", "module.encoder_q."])
def test_released_weights_give_the_reference_features(prefix: str, hidden: int) -> None:
    gru, norm, state = reference_state(hidden, 3, 150, prefix)
    state |= {k.replace("encoder_q", "encoder_k"): v + 1 for k, v in state.items() if "encoder_q" in k}
    state |= {
        k.replace("encoder_q.", "encoder_q_motion."): v + 1 for k, v in state.items() if "encoder_q." in k
    }
    encoder = BiGRU(NTU25, hidden=hidden, layers=3)
    load_reference(encoder, state)
    x = torch.randn(4, 16, 3, 25, 2)
    torch.testing.assert_close(encoder.eval()(x), frame_by_frame(gru, norm.eval(), x))


def test_incomplete_released_weights_are_named() -> None:
    state = reference_state(12, 3, 150, "encoder_q.")[2]
    del state["encoder_q.encoder.gru.bias_hh_l2_reverse"]
    with pytest.raises(ValueError, match=r"has no encoder_q\.encoder\.gru\.bias_hh_l2_reverse"):
        load_reference(BiGRU(NTU25, hidden=12, layers=3), state)
    with pytest.raises(ValueError, match="holds no query encoder"):
        load_reference(BiGRU(NTU25, hidden=12, layers=3), {"fc.weight": torch.zeros(1)})


def test_bidirectional_is_the_true_time_reversal() -> None:
    gru, _, state = reference_state(12, 2, 150, "")
    encoder = BiGRU(NTU25, hidden=12, layers=2, time_mode="bidirectional", input_norm=False)
    load_reference(encoder, state)
    x = torch.randn(4, 16, 3, 25, 2)
    output = gru(x.permute(0, 1, 3, 2, 4).flatten(2))[0]
    torch.testing.assert_close(encoder(x), torch.cat((output[:, -1, :12], output[:, 0, 12:]), 1))


@pytest.mark.parametrize("time_mode", ["forward_pair", "bidirectional"])
def test_the_feature_is_pooled_from_what_the_layers_put_out(time_mode: str) -> None:
    gru = nn.GRU(75, 12, bidirectional=True, batch_first=True)
    encoder = BiGRU(
        NTU25,
        persons=1,
        hidden=12,
        layers=1,
        time_mode=time_mode,  # type: ignore[arg-type]
        pool="mean+last",
        input_norm=False,
    )
    assert encoder.feature_dim == 48
    ahead, also_ahead = encoder.directions[0]  # type: ignore[misc]
    for name, weight in gru.named_parameters():
        one = also_ahead if name.endswith("_reverse") else ahead
        weight.data = one.get_parameter(name.removesuffix("_reverse")).data
    x = torch.randn(4, 16, 3, 25, 1)
    sequence = x.flatten(2)
    states = gru(sequence)[0]
    last = torch.cat((states[:, -1, :12], states[:, 0, 12:]), 1)
    if time_mode == "forward_pair":
        states = torch.cat((ahead(sequence)[0], also_ahead(sequence)[0]), 2)
        last = states[:, -1]
    mean, std = states.mean(1), (states.var(1, correction=0) + 1e-4).sqrt()
    pooled = {
        "mean": mean,
        "last": last,
        "mean+last": torch.cat((mean, last), 1),
        "mean+last+std": torch.cat((mean, last, std), 1),
    }
    for encoder.pool, expected in pooled.items():  # type: ignore[assignment]
        torch.testing.assert_close(encoder(x), expected)


def test_parameter_and_mac_counts() -> None:
    encoder = build_encoder("bigru", NTU25)
    assert isinstance(encoder, BiGRU)
    assert parameters_and_macs(encoder) == (44_998_656 + 300, 2_877_554_688)
    assert round(2_877_554_688 / 1e9, 4) == 2.8776
    head = projection_head(encoder.feature_dim, 128)
    assert sum(p.numel() for p in head.parameters()) == 4_458_624
    assert sum(p.numel() for p in [*encoder.parameters(), *head.parameters()]) == 49_457_580
    assert sum(p.numel() for p in encoder.directions[0].parameters()) == 7_225_344


@pytest.mark.parametrize("time_mode", ["forward_pair", "bidirectional"])
def test_several_views_in_one_pass_equal_separate_passes(time_mode: str) -> None:
    one, many = (
        BiGRU(NTU25, hidden=8, layers=2, time_mode=time_mode)  # type: ignore[arg-type]
        for _ in range(2)
    )
    many.load_state_dict(one.state_dict())
    views = [scale * torch.randn(5, 12, 3, 25, 2) for scale in (1, 2, 3)]
    separate = torch.cat([one(view) for view in views])
    together = many(torch.cat(views), views=3)
    torch.testing.assert_close(together, separate)
    for (name, a), b in zip(one.named_buffers(), many.buffers(), strict=True):
        assert "_norm." in name and torch.equal(a, b)


def test_a_normalised_feature_has_no_mean_and_unit_variance() -> None:
    """Of each view over the clips of a batch in training, by the running statistics in use, and of a clip
    alone."""
    encoder = EncoderConfig(hidden=4, layers=1, pool="mean+last+std", feature_norm=True)
    branch = build_branch(replace(preset("demo"), encoder=encoder), SMALL, 1)
    assert not [name for name, _ in branch.encoder.named_parameters() if "feature" in name]
    views = [scale * torch.randn(50, 6, 3, 5, 1) for scale in (1, 2)]
    feature = branch.feature(torch.cat(views), views=2)
    assert feature.shape == (100, 24)
    for part in feature.chunk(2):
        torch.testing.assert_close(part.mean(0), torch.zeros(24), atol=1e-6, rtol=0)
        # where the variance is large beside what BatchNorm adds to it
        std = part.std(0, correction=0)
        assert (std <= 1).all() and (std[:16] > 0.9).all()
    before = {name: t.clone() for name, t in branch.encoder.feature_norm.state_dict().items()}  # type: ignore[union-attr]
    alone = branch.feature(views[0][:1])
    assert alone.shape == (1, 24) and alone.isfinite().all()
    for name, t in branch.encoder.feature_norm.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(t, before[name])
    branch.eval()
    plain = branch.encoder(branch.stream(views[0]))
    expected = (plain - before["running_mean"]) / (before["running_var"] + 1e-5).sqrt()
    torch.testing.assert_close(branch.feature(views[0]), expected)


def test_the_pair_is_causal() -> None:
    """Later frames cannot alter what an earlier frame put out: dropping them leaves the shorter clip's
    feature."""
    encoder = BiGRU(NTU25, hidden=8, layers=2).eval()
    x = torch.randn(2, 20, 3, 25, 2)
    changed = torch.cat((x[:, :15], torch.randn(2, 5, 3, 25, 2)), 1)
    torch.testing.assert_close(encoder(x[:, :15]), encoder(changed[:, :15]))
    assert not torch.equal(encoder(x), encoder(changed))


def test_any_skeleton_and_one_person() -> None:
    encoder = build_encoder("bigru", SMALL, persons=1, hidden=8, layers=1)
    assert encoder(torch.randn(3, 10, 3, 5, 1)).shape == (3, encoder.feature_dim)


def test_initialisation_is_xavier_over_the_stacked_gates() -> None:
    weight = BiGRU(NTU25, hidden=64, layers=1).directions[0][0].weight_ih_l0  # type: ignore[index]
    bound = (6 / (3 * 64 + 150)) ** 0.5
    assert 0.98 * bound < weight.abs().max().item() <= bound


def test_unknown_encoder() -> None:
    with pytest.raises(ValueError, match="unknown encoder 'lstm'"):
        build_encoder("lstm", NTU25)


def test_lower_precision_outputs_follow_the_weights_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of autocast on a GPU: weights and sequence in bf16, gradients in float32."""
    gru = nn.GRU(6, 5, batch_first=True)
    x = torch.randn(3, 7, 6, requires_grad=True)
    full, low = outputs(gru, x, torch.float32), outputs(gru, x, torch.bfloat16)
    assert (full.dtype, low.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(low.float(), full, rtol=0, atol=0.02)
    wanted = torch.autograd.grad(full.sum(), [x, *gru.parameters()])
    for got, want in zip(torch.autograd.grad(low.float().sum(), [x, *gru.parameters()]), wanted):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05 * want.abs().max().item())
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    for version, dtype in ((91300, torch.bfloat16), (91299, torch.float32), (None, torch.float32)):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda version=version: version)
        assert recurrent_dtype() == dtype


def test_frozen_trains_recurrent_layers_alone_and_restores_everything() -> None:
    def state(module: nn.Module) -> list[tuple[bool, list[bool]]]:
        return [(m.training, [p.requires_grad for p in m.parameters(False)]) for m in module.modules()]

    for mode in (True, False):
        module = nn.Sequential(BiGRU(SMALL, persons=1, hidden=4, layers=1), nn.Dropout(), nn.BatchNorm1d(8))
        module.train(mode)
        before = state(module)
        with frozen(module):
            assert all(m.training == isinstance(m, nn.GRU) for m in module.modules())
            assert not any(p.requires_grad for p in module.parameters())
        assert state(module) == before
