"""SCD-Net's encoder against a slow restatement, its counts, statistics per view, dropout, compilation."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from a2mc_fast.encoders import build_encoder, scd
from a2mc_fast.encoders.branch import frozen, projection_head
from a2mc_fast.encoders.scd import GraphBlock, GraphStack, MultiScaleTime, SCDNet, TokenTransformer
from a2mc_fast.errors import InputError
from a2mc_fast.skeleton import NTU25, Skeleton
from bench.count import parameters_and_macs
from tests.conftest import SMALL

FRAMES = 6
_HEADS = 8
CHAIN20 = Skeleton(
    parents=(0, *range(19)), mirror=tuple(range(20)), center=0, axis_z=(0, 1), axis_x=(2, 3), joint_names=()
)


def small(skeleton: Skeleton = SMALL, **options: Any) -> SCDNet:
    return SCDNet(skeleton, **({"frames": FRAMES, "width": 16} | options))


def scrambled(encoder: SCDNet) -> SCDNet:
    """With every parameter and statistic random, so that each one matters; without dropout."""
    for name, value in encoder.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.dtype.is_floating_point:
            value.add_(torch.randn_like(value), alpha=0.1)
        if "norm.weight" in name:
            value.add_(0.5)
    for layer in encoder.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return encoder


def clips(count: int = 3, skeleton: Skeleton = SMALL, persons: int = 2, **kind: Any) -> Tensor:
    """[N, T, C, V, M]"""
    return torch.randn(count, FRAMES, 3, skeleton.num_joints, persons, **kind)


# the restatement: rows of channels last, loops over persons, frames, joints and heads


def normalised(norm: nn.Module, rows: Tensor, where: slice = slice(None)) -> Tensor:
    """BatchNorm of the last dimension, by the channels `where` of a norm over more."""
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    assert norm.running_mean is not None and norm.running_var is not None
    mean, var = norm.running_mean[where], norm.running_var[where]
    if norm.training:
        flat = rows.reshape(-1, rows.shape[-1])
        mean = flat.sum(0) / len(flat)
        var = ((flat - mean) ** 2).sum(0) / len(flat)
    return (rows - mean) / (var + norm.eps).sqrt() * norm.weight[where] + norm.bias[where]


def pointwise(layer: nn.Module, rows: Tensor, where: slice = slice(None)) -> Tensor:
    assert isinstance(layer, nn.Conv2d) and layer.bias is not None
    return rows @ layer.weight[where, :, 0, 0].T + layer.bias[where]


def over_time(layer: nn.Module, rows: Tensor, dilation: int) -> Tensor:
    """A convolution of 5 frames, zeros beyond the clip. rows [N, T, V, C]"""
    assert isinstance(layer, nn.Conv2d) and layer.bias is not None
    frames = rows.shape[1]
    result = torch.zeros_like(rows) + layer.bias
    for t in range(frames):
        for tap in range(5):
            source = t + (tap - 2) * dilation
            if 0 <= source < frames:
                result[:, t] += rows[:, source] @ layer.weight[:, :, tap, 0].T
    return result


def graph_convolution(block: GraphBlock, x: Tensor) -> Tensor:
    joints = x.shape[2]
    total = torch.zeros(*x.shape[:3], block.graph_norm.num_features, dtype=x.dtype)
    for k, graph in enumerate(block.graphs):
        relations = graph.relate.out_channels // 2
        first = pointwise(graph.relate, x, slice(0, relations)).mean(1)
        second = pointwise(graph.relate, x, slice(relations, None)).mean(1)
        value = pointwise(graph.value, x)
        for u in range(joints):
            for v in range(joints):
                relation = pointwise(graph.refine, torch.tanh(first[:, u] - second[:, v]))
                weight = relation * block.alpha + block.partitions[k, u, v]
                total[:, :, u] += weight[:, None] * value[:, :, v]
    convolution, norm = block.graph_residual
    return F.relu(normalised(block.graph_norm, total) + normalised(norm, pointwise(convolution, x)))


def multi_scale(time: MultiScaleTime, x: Tensor) -> Tensor:
    quarter, frames = x.shape[-1] // 4, x.shape[1]
    convolution, norm = time.reduce
    wheres = [slice(i * quarter, (i + 1) * quarter) for i in range(4)]
    near, far, peak, frame = (normalised(norm, pointwise(convolution, x, w), w) for w in wheres)
    near, far, peak = near.clamp(0), far.clamp(0), peak.clamp(0)
    peaks = [peak[:, max(0, t - 1) : t + 2].amax(1) for t in range(frames)]
    return torch.cat(
        (
            normalised(time.near[1], over_time(time.near[0], near, 1)),
            normalised(time.far[1], over_time(time.far[0], far, 2)),
            normalised(time.peak[1], torch.stack(peaks, 1)),
            frame,
        ),
        -1,
    )


def stack(graph: GraphStack, x: Tensor) -> Tensor:
    """x [N, T, C, V, M] -> [N, M, T, V, 64]"""
    n, t, c, v, m = x.shape
    rows = torch.zeros(n, m, t, v, c, dtype=x.dtype)
    for person in range(m):
        for joint in range(v):
            for axis in range(c):
                at = axis * v * m + joint * m + person
                values = x[:, :, axis, joint, person].unsqueeze(-1)
                rows[:, person, :, joint, axis] = normalised(graph.input_norm, values, slice(at, at + 1))[
                    ..., 0
                ]
    rows = rows.flatten(0, 1)
    for i, block in enumerate(graph.blocks):
        assert isinstance(block, GraphBlock)
        y = multi_scale(block.time, graph_convolution(block, rows))
        if i > 0:
            assert block.residual is not None
            y = y + normalised(block.residual[1], pointwise(block.residual[0], rows))
        rows = y.clamp(0)
    return rows.unflatten(0, (n, m))


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.Linear)
    return x @ layer.weight.T + layer.bias


def layer_norm(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.LayerNorm)
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def transformer(part: TokenTransformer, tokens: Tensor) -> Tensor:
    x = linear(part.embed[3], layer_norm(part.embed[1], linear(part.embed[0], tokens)).clamp(0))
    width = x.shape[-1]
    projected = linear(part.query_key_value, x)
    query, key, value = projected[..., :width], projected[..., width : 2 * width], projected[..., 2 * width :]
    size = width // _HEADS
    heads = []
    for h in range(_HEADS):
        at = slice(h * size, (h + 1) * size)
        scores = torch.einsum("nqd,nkd->nqk", query[..., at], key[..., at]) / math.sqrt(size)
        shares = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(torch.einsum("nqk,nkd->nqd", shares, value[..., at]))
    x = layer_norm(part.attention_norm, x + linear(part.output, torch.cat(heads, -1)))
    x = layer_norm(part.mlp_norm, x + linear(part.mlp[3], linear(part.mlp[0], x).clamp(0)))
    return x.max(1).values


def restated(encoder: SCDNet, x: Tensor) -> Tensor:
    n, t, _, v, m = x.shape
    of_time, of_space = stack(encoder.temporal_graph, x), stack(encoder.spatial_graph, x)
    frames = [torch.cat([of_time[:, p, f, j] for p in range(m) for j in range(v)], -1) for f in range(t)]
    joints = [torch.cat([of_space[:, p, f, j] for f in range(t)], -1) for p in range(m) for j in range(v)]
    temporal = transformer(encoder.temporal, torch.stack(frames, 1))
    spatial = transformer(encoder.spatial, torch.stack(joints, 1))
    assert temporal.shape == spatial.shape == (n, encoder.feature_dim // 2)
    return torch.cat((temporal, spatial), 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("persons", [1, 2])
def test_equals_the_restatement(training: bool, persons: int) -> None:
    encoder = scrambled(small(persons=persons)).double().train(training)
    x = clips(persons=persons, dtype=torch.float64)
    with torch.no_grad():
        # the running statistics are read before the encoder moves them
        expected = restated(encoder, x)
        torch.testing.assert_close(encoder(x), expected, rtol=1e-9, atol=1e-9)


def test_parameter_counts() -> None:
    with torch.device("meta"):
        encoder = build_encoder("scd", NTU25)
        heads = [
            projection_head(len(range(encoder.feature_dim)[part]), 128, encoder.head_hidden)
            for part in encoder.levels.values()
        ]
    assert isinstance(encoder, SCDNet)

    def count(*modules: nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    assert count(encoder.temporal_graph) == count(encoder.spatial_graph) == 363_928
    assert count(encoder.temporal.embed) == 10_756_096
    assert count(encoder.spatial.embed) == 12_591_104
    for part in (encoder.temporal, encoder.spatial):
        assert count(part) - count(part.embed) == 25_186_304
    assert count(encoder) == 74_447_664
    assert count(encoder) + 60 * (encoder.feature_dim + 1) == 74_693_484
    assert [count(head) for head in heads] == [4_458_624, 4_458_624, 8_652_928]
    assert count(encoder, *heads) == 92_017_840


def test_macs() -> None:
    """The public code's 6.560 G, less what averaging over time before the relations' convolutions saves."""
    with torch.device("meta"):
        encoder = build_encoder("scd", NTU25)
    assert isinstance(encoder, SCDNet)
    linear = 64 * 3200 * 2048 + 50 * 4096 * 2048 + 7 * (64 + 50) * 2048**2
    matmul = 2 * 2 * 3 * (64 + 256 + 64) * 64 * 25**2
    # the public code's count has no products of queries, keys and values
    attention = 2 * (64**2 + 50**2) * 2048
    # per stack: 3 graphs, 2 convolutions to 8, 8, 32 channels, at one frame and not 64, both persons
    saved = 3 * 2 * (3 * 8 + 64 * 8 + 256 * 32) * (64 - 1) * 25 * 2
    macs = parameters_and_macs(encoder)[1] - attention + 2 * saved
    convolution = macs - linear - matmul
    giga = [round(count / 1e9, 3) for count in (macs, convolution, linear, matmul)]
    assert giga == [6.560, 2.190, 4.186, 0.184]
    for graph in (encoder.temporal_graph, encoder.spatial_graph):
        assert round((parameters_and_macs(graph)[1] + saved) / 1e9, 3) == 1.187


def test_levels_and_pairs() -> None:
    encoder = small()
    feature = torch.arange(encoder.feature_dim)
    assert [feature[encoder.levels[name]].tolist() for name in "tsi"] == [
        list(range(16)), list(range(16, 32)), list(range(32)),
    ]  # fmt: skip
    assert encoder.pairs == (("t", "i"), ("s", "i"), ("i", "t"), ("i", "s"))
    assert copy.deepcopy(encoder).levels == encoder.levels


def test_first_half_is_temporal_and_second_spatial() -> None:
    encoder = scrambled(small()).eval()
    x = clips()
    before = encoder(x)
    nn.init.zeros_(encoder.spatial_graph.blocks[0].graph_norm.bias)
    after = encoder(x)
    assert torch.equal(before[:, encoder.levels["t"]], after[:, encoder.levels["t"]])
    assert not torch.equal(before[:, encoder.levels["s"]], after[:, encoder.levels["s"]])


def test_several_views_in_one_pass_equal_separate_passes() -> None:
    one = scrambled(small())
    many = copy.deepcopy(one)
    views = [scale * clips() for scale in (1, 2, 3)]
    with torch.no_grad():
        separate = torch.cat([one(view) for view in views])
        together = many(torch.cat(views), views=3)
    torch.testing.assert_close(together, separate, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[:3], together[3:6], atol=0.01)
    for (name, a), b in zip(one.named_buffers(), many.buffers()):
        assert torch.equal(a, b), name


def test_twenty_joints_and_one_person() -> None:
    encoder = small(CHAIN20, persons=1)
    x = clips(2, CHAIN20, persons=1)
    assert encoder(x).shape == (2, encoder.feature_dim)
    encoder.eval()
    # the order in memory does not matter
    torch.testing.assert_close(encoder(x), encoder(x.transpose(1, 2).contiguous().transpose(1, 2)))


@pytest.mark.parametrize("shape", [(2, 7, 3, 5, 2), (2, 6, 3, 25, 2), (2, 6, 3, 5, 1)])
def test_other_clips_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"= \[N, 6, 3, 5, 2\], got \[2, [67], 3, "):
        small()(torch.zeros(shape))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(InputError, match=r"width 12 must be a multiple of SCD-Net's 8 attention heads"):
        SCDNet(SMALL, width=12)


def test_dropout_is_off_while_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, x = small(), clips()
    of_attention: list[float] = []
    attend = F.scaled_dot_product_attention

    def recorded(*args: Any, dropout_p: float, **kwargs: Any) -> Tensor:
        of_attention.append(dropout_p)
        return attend(*args, dropout_p=dropout_p, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    # one clip many times: rows differ by dropout alone
    same = x[:1].expand(8, -1, -1, -1, -1)
    assert encoder(same).std(0).min() > 0
    assert of_attention == [0.1, 0.1]
    with frozen(encoder):
        assert encoder(same).std(0).max() < 1e-6
        held = encoder(x)
    assert of_attention == [0.1, 0.1, 0, 0, 0, 0]
    assert torch.equal(held, encoder.eval()(x))


def test_input_gradient_of_the_frozen_encoder() -> None:
    encoder = scrambled(small()).double()
    x = clips(dtype=torch.float64).requires_grad_()
    direction, weights = torch.randn_like(x), torch.randn(encoder.feature_dim, dtype=torch.float64)
    with frozen(encoder):
        (encoder(x) @ weights).sum().backward()
        assert x.grad is not None and (x.grad != 0).all()
        with torch.no_grad():
            # so short that no unit changes sides on the way
            step = 1e-9 * direction
            difference = ((encoder(x + step) - encoder(x - step)) @ weights).sum() / 2e-9
    torch.testing.assert_close((x.grad * direction).sum(), difference, rtol=1e-4, atol=0)
    assert all(p.grad is None for p in encoder.parameters())


def test_every_parameter_gets_a_gradient() -> None:
    encoder = scrambled(small())
    encoder(clips()).square().sum().backward()
    for name, p in encoder.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_initialisation() -> None:
    encoder = small(NTU25, width=128)
    block = encoder.temporal_graph.blocks[2]
    assert isinstance(block, GraphBlock)
    assert block.partitions.count_nonzero((1, 2)).tolist() == [25, 24, 24]
    torch.testing.assert_close(block.partitions.sum((1, 2)), torch.tensor([25.0, 24.0, 20.0]))
    assert block.alpha.item() == 0 and (block.graph_norm.weight == 1e-6).all()
    # convolutions that share a tensor keep the scale they have apart: 32 relations, 16 channels a branch
    for weight, channels in ((block.graphs[0].relate.weight, 32), (block.time.reduce[0].weight, 16)):
        torch.testing.assert_close(weight.std().item(), math.sqrt(2 / channels), rtol=0.05, atol=0)
    bound = math.sqrt(6 / (128 + 3 * 128))
    assert 0.98 * bound < encoder.spatial.query_key_value.weight.abs().max().item() <= bound


def test_compiles_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stack the first block and one with a residual, narrow and with one graph instead of three: the
    time is that of tracing every layer."""
    monkeypatch.setattr(scd, "_CHANNELS", (3, 8, 16))
    encoder = small()
    for block in (*encoder.temporal_graph.blocks, *encoder.spatial_graph.blocks):
        assert isinstance(block, GraphBlock)
        block.graphs = block.graphs[:1]
    scrambled(encoder)
    compiled = torch.compile(copy.deepcopy(encoder), fullgraph=True, dynamic=False, backend="aot_eager")
    x = clips(6)
    results = []
    for model in (encoder, compiled):
        leaf = x.clone().requires_grad_()
        feature = model(leaf, views=2)
        (feature * torch.linspace(-1, 1, feature.shape[1])).sum().backward()
        results.append((feature.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
