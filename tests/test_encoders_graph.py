"""ST-GCN and DSTA-Net against slow restatements of their definition, their graphs, and their counts."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from a2mc_fast.config import EncoderConfig, preset
from a2mc_fast.encoders import build_encoder
from a2mc_fast.encoders.branch import Encoder, frozen, projection_head
from a2mc_fast.encoders.build import build_branch
from a2mc_fast.encoders.dsta import DSTANet
from a2mc_fast.encoders.graph import directed_partitions, spatial_partitions
from a2mc_fast.encoders.stgcn import STGCN
from a2mc_fast.errors import InputError
from a2mc_fast.skeleton import NTU25, Skeleton
from bench.count import parameters_and_macs
from tests.conftest import SMALL

KINECT20 = Skeleton(
    parents=(1, 1, 1, 2, 2, 4, 5, 6, 2, 8, 9, 10, 0, 12, 13, 14, 0, 16, 17, 18),
    mirror=(0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15),
    center=1,
    axis_z=(0, 1),
    axis_x=(4, 8),
)
SMALLEST: list[tuple[str, dict[str, Any]]] = [
    ("stgcn", {"channels": 2}),
    ("dsta", {"size": "small"}),
]
each_encoder = pytest.mark.parametrize(("name", "options"), SMALLEST)


@contextmanager
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def scrambled(encoder: Encoder) -> Encoder:
    """No parameter or statistic at its neutral start, and no dropout."""
    for parameter in encoder.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return encoder


# the definitions, one entry at a time


def slow_partitions(skeleton: Skeleton) -> Tensor:
    """Entry [j, i] belongs to the neighbours further than i from the root, or as far, or closer."""
    v = skeleton.num_joints
    root = next(j for j in range(v) if skeleton.parents[j] == j)
    linked = torch.eye(v, dtype=torch.bool)
    for j, p in enumerate(skeleton.parents):
        linked[j, p] = linked[p, j] = True

    def distance(joint: int) -> float:
        return 0 if joint == root else 1 if linked[joint, root] else math.inf

    partitions = torch.zeros(3, v, v)
    for j in range(v):
        for i in range(v):
            if linked[j, i]:
                which = 0 if i == j else 1 if distance(j) >= distance(i) else 2
                partitions[which, j, i] = 1 / sum(linked[:, i].tolist())
    return partitions


def slow_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """BatchNorm of x [B, C, ...]."""
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    y = torch.empty_like(x)
    for c in range(x.shape[1]):
        values = x[:, c]
        mean, variance = values.mean(), (values - values.mean()).square().mean()
        if not norm.training:
            assert norm.running_mean is not None and norm.running_var is not None
            mean, variance = norm.running_mean[c], norm.running_var[c]
        y[:, c] = (values - mean) / (variance + 1e-5).sqrt() * norm.weight[c] + norm.bias[c]
    return y


def slow_conv(conv: nn.Module, x: Tensor, kernel: int = 1, stride: int = 1) -> Tensor:
    """Convolution of x [B, C, T, V] over time, zeros beyond its ends."""
    assert isinstance(conv, nn.Conv2d) and conv.weight.shape[2:] == (kernel, 1) and conv.bias is not None
    b, _, t, v = x.shape
    frames = range(0, t, stride)
    y = conv.bias.view(1, -1, 1, 1).repeat(b, 1, len(frames), v)
    for position, center in enumerate(frames):
        for tap in range(kernel):
            frame = center + tap - kernel // 2
            if 0 <= frame < t:
                y[:, :, position] += torch.einsum("oi,biv->bov", conv.weight[:, :, tap, 0], x[:, :, frame])
    return y


def slow_conv_norm(pair: nn.Module, x: Tensor, kernel: int = 1, stride: int = 1) -> Tensor:
    conv, norm = pair.children()
    return slow_norm(norm, slow_conv(conv, x, kernel, stride))


def by_person(x: Tensor) -> Tensor:
    """[N, T, C, V, M] -> [N M, C, T, V]"""
    return torch.stack([clip[..., m].transpose(0, 1) for clip in x for m in range(x.shape[4])])


def slow_stgcn(encoder: Encoder, x: Tensor, skeleton: Skeleton, options: dict[str, Any]) -> Tensor:
    assert isinstance(encoder, STGCN)
    n, t, c, v, m = x.shape
    flat = torch.empty(n * m, v * c, t)
    for joint in range(v):
        for axis in range(c):
            flat[:, joint * c + axis] = by_person(x)[:, axis, :, joint]
    flat = slow_norm(encoder.input_norm, flat)
    h = torch.stack([flat[:, axis::c].mT for axis in range(c)], 1)
    partitions = slow_partitions(skeleton)
    strides = [1, 1, 1, 1, 2, 1, 1, 2, 1, 1]
    for number, (block, stride) in enumerate(zip(encoder.blocks, strides, strict=True)):
        spread: Any = slow_conv(block.spread, h)  # type: ignore[arg-type]
        edges = partitions * block.importance
        out = spread.shape[1] // 3
        y = torch.zeros(len(h), out, h.shape[2], v)
        for k in range(3):
            for source in range(v):
                for target in range(v):
                    part = spread[:, k * out : (k + 1) * out, :, source]
                    y[:, :, :, target] += part * edges[k, source, target]
        before, _, conv, after, _ = block.temporal.children()  # type: ignore[union-attr]
        y = slow_norm(after, slow_conv(conv, slow_norm(before, y).clamp_min(0), 9, stride))
        if number > 0 and h.shape == y.shape:
            y = y + h
        elif number > 0:
            y = y + slow_conv_norm(block.residual, h, stride=stride)  # type: ignore[arg-type]
        h = y.clamp_min(0)
    return torch.stack([h[i * m : (i + 1) * m].mean((0, 2, 3)) for i in range(n)])


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.1 * x)


def slow_code(width: int, count: int) -> Tensor:
    """[width, count]"""
    code = torch.empty(width, count)
    for channel in range(width):
        wave = torch.sin if channel % 2 == 0 else torch.cos
        for position in range(count):
            angle = torch.tensor(position / 10000 ** (channel // 2 * 2 / width))
            code[channel, position] = wave(angle)
    return code


def slow_attention(layer: Any, x: Tensor, changes: bool) -> Tensor:
    """Attention over the joints of x [B, C, T, V]."""
    _, width, frames, count = x.shape
    coded = slow_conv(layer.query_key, (x + slow_code(width, count)[None, :, None]))
    heads = 3
    inter = coded.shape[1] // (2 * heads)
    values = []
    for head in range(heads):
        query = coded[:, head * inter : (head + 1) * inter]
        key = coded[:, (heads + head) * inter : (heads + head + 1) * inter]
        mixed = torch.zeros_like(x)
        for u in range(count):
            for v in range(count):
                score = (query[:, :, :, u] * key[:, :, :, v]).sum((1, 2)) / (inter * frames)
                attention = score.tanh() * layer.scale[head, 0, 0] + layer.joint_map[head, u, v]
                mixed[:, :, :, v] += attention[:, None, None] * x[:, :, :, u]
        values.append(mixed)
    y = slow_conv_norm(layer.project, torch.cat(values, 1))
    y = leaky((slow_conv_norm(layer.project_shortcut, x) if changes else x) + y)
    y = slow_conv_norm(layer.feed_forward, y)
    return leaky((slow_conv_norm(layer.feed_forward_shortcut, x) if changes else x) + y)


def slow_dsta(encoder: Encoder, x: Tensor, skeleton: Skeleton, options: dict[str, Any]) -> Tensor:
    assert isinstance(encoder, DSTANet)
    n, m = x.shape[0], x.shape[4]
    conv, norm, _ = encoder.input_map.children()
    h = leaky(slow_norm(norm, slow_conv(conv, by_person(x))))
    configuration = [(32, 1), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (128, 1), (256, 1)]
    layers: Any = list(encoder.blocks)
    for number, (out, stride) in enumerate(configuration):
        spatial, temporal = layers[2 * number : 2 * number + 2]
        changes = h.shape[1] != out
        h = slow_attention(spatial, h, changes)
        shortcut = slow_conv_norm(temporal.shortcut, h, stride=stride) if changes else h
        h = leaky(shortcut + slow_conv_norm(temporal.convolution, h, 7, stride))
    return torch.stack([h[i * m : (i + 1) * m].mean((0, 2, 3)) for i in range(n)])


SLOW: dict[str, Callable[..., Tensor]] = {"stgcn": slow_stgcn, "dsta": slow_dsta}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@each_encoder
def test_forward_is_the_definition(name: str, options: dict[str, Any], training: bool) -> None:
    # deep enough that a bone has no end near the root; an odd number of frames is halved upwards
    skeleton = Skeleton(
        parents=(1, 1, 1, 2, 3), mirror=(0, 1, 2, 3, 4), center=1, axis_z=(0, 1), axis_x=(3, 4)
    )
    with double_precision(), torch.no_grad():
        encoder = scrambled(build_encoder(name, skeleton, **options)).train(training)
        x = torch.randn(2, 7, 3, 5, 2)
        expected = SLOW[name](encoder, x, skeleton, options)
        torch.testing.assert_close(encoder(x), expected, rtol=1e-9, atol=1e-9)


# graphs


def test_partitions_of_the_kinect_skeleton() -> None:
    clipped = spatial_partitions(NTU25.parents)
    assert (clipped != 0).sum((1, 2)).tolist() == [25, 40, 8]
    torch.testing.assert_close(clipped.sum((1, 2)), torch.tensor([8.95, 13.3, 2.75]))
    assert {(row + 1, column + 1) for row, column in clipped[2].nonzero().tolist()} == {
        (2, 1), (3, 4), (5, 6), (9, 10), (21, 2), (21, 3), (21, 5), (21, 9)
    }  # fmt: skip
    directed = directed_partitions(NTU25.parents)
    assert (directed != 0).sum((1, 2)).tolist() == [25, 24, 24]
    torch.testing.assert_close(directed.sum((1, 2)), torch.tensor([25.0, 24, 20]))
    assert {tuple(entry) for entry in directed[1].nonzero().tolist()} == {(p, j) for j, p in NTU25.bones}
    assert torch.equal(directed[2] != 0, (directed[1] != 0).T)


@pytest.mark.parametrize("skeleton", [NTU25, KINECT20, SMALL], ids=["ntu", "kinect", "small"])
def test_partitions_are_the_definition(skeleton: Skeleton) -> None:
    partitions = spatial_partitions(skeleton.parents)
    torch.testing.assert_close(partitions, slow_partitions(skeleton))
    torch.testing.assert_close(partitions.sum((0, 1)), torch.ones(skeleton.num_joints))


# counts


@pytest.mark.parametrize(
    ("channels", "parameters", "macs"),
    [(16, 854_276, 0.7593), (32, 1_347_252, 1.3853), (64, 3_116_308, 3.6465)],
)
def test_counts_of_stgcn(channels: int, parameters: int, macs: float) -> None:
    encoder = build_encoder("stgcn", NTU25, channels=channels)
    counted = parameters_and_macs(nn.Sequential(encoder, nn.Linear(256, 128)))
    assert (counted[0], round(counted[1] / 1e9, 4)) == (parameters, macs)
    if channels == 16:
        assert parameters_and_macs(encoder) == (821_380, 759_296_000)
        assert parameters_and_macs(nn.Sequential(encoder, projection_head(256, 128)))[0] == 920_068
        assert round(parameters_and_macs(encoder, 50)[1] / 1e9, 4) == 0.6124
        assert round(parameters_and_macs(encoder, 300)[1] / 1e9, 3) == 3.559


@pytest.mark.parametrize(
    ("size", "parameters", "macs"),
    [
        ("full", (3_817_388, 3_801_968), (3.265, 4.081, 8.162)),
        ("small", (1_561_900, 1_546_480), (1.232, 1.533, 3.066)),
    ],
)
def test_counts_of_dsta(size: str, parameters: tuple[int, int], macs: tuple[float, ...]) -> None:
    encoder = build_encoder("dsta", NTU25, size=size)
    classifier = nn.Sequential(encoder, nn.Linear(256, 60))
    assert parameters_and_macs(classifier)[0] == parameters[0]
    assert parameters_and_macs(encoder)[0] == parameters[1]
    assert tuple(round(parameters_and_macs(classifier, t)[1] / 1e9, 3) for t in (50, 64, 128)) == macs


def test_counting_leaves_the_encoder_as_it_was() -> None:
    encoder = build_encoder("stgcn", SMALL, channels=2).eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    one = parameters_and_macs(encoder, 8, 5, 1)[1]
    assert parameters_and_macs(encoder, 16, 5, 3)[1] == 6 * one
    assert not encoder.training
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name])


# what the trainer asks of an encoder


@each_encoder
def test_several_views_in_one_pass_equal_separate_passes(name: str, options: dict[str, Any]) -> None:
    one, many = (scrambled(build_encoder(name, SMALL, **options)) for _ in range(2))
    many.load_state_dict(one.state_dict())
    views = [scale * torch.randn(3, 9, 3, 5, 2) for scale in (1, 2, 3)]
    together = torch.cat(views)
    torch.testing.assert_close(many(together, views=3), torch.cat([one(view) for view in views]))
    for (key, expected), value in zip(one.state_dict().items(), many.state_dict().values()):
        assert torch.equal(value, expected), key


@pytest.mark.parametrize(("frames", "persons"), [(1, 2), (6, 1), (11, 3)])
@each_encoder
def test_any_number_of_joints_frames_and_persons(
    name: str, options: dict[str, Any], frames: int, persons: int
) -> None:
    with double_precision():
        encoder = build_encoder(name, KINECT20, persons=persons, frames=frames, **options).eval()
        x = torch.randn(3, frames, 3, 20, persons)
        feature = encoder(x)
        assert feature.shape == (3, encoder.feature_dim)
        # clips do not see one another, and persons have no order
        torch.testing.assert_close(encoder(x[1:2]), feature[1:2])
        torch.testing.assert_close(encoder(x.flip(4)), feature)


@each_encoder
def test_the_attack_reaches_every_coordinate(name: str, options: dict[str, Any]) -> None:
    encoder = build_encoder(name, SMALL, **options).train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    x = torch.randn(2, 8, 3, 5, 2, requires_grad=True)
    weight = torch.randn(encoder.feature_dim)
    with frozen(encoder):
        feature = encoder(x)
        torch.testing.assert_close(encoder(x), feature)  # no dropout
        (gradient,) = torch.autograd.grad((feature @ weight).sum(), x)
    assert (gradient.abs().amax((1, 3, 4)) > 0).all()
    assert (gradient.abs().amax((0, 2, 3)) > 0).all(), "a frame has no gradient"
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, before[key]), key


@each_encoder
def test_half_precision_stays_near(name: str, options: dict[str, Any]) -> None:
    encoder = build_encoder(name, SMALL, **options)
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = torch.randn(4, 8, 3, 5, 2)
    exact = encoder(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = encoder(x)
    rounded.float().square().sum().backward()
    assert (rounded - exact).norm() < 0.15 * exact.norm()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_dropout_in_all_blocks_but_the_first() -> None:
    encoder = STGCN(SMALL)
    assert [m.p for m in encoder.modules() if isinstance(m, nn.Dropout)] == [0] + [0.5] * 9
    x = torch.randn(2, 8, 3, 5, 2)
    assert not torch.equal(encoder(x), encoder(x))


@pytest.mark.parametrize(
    ("case", "views", "blocks", "backend"),
    # the first, one that keeps the width, and one that changes it; inductor takes seconds for each
    [(0, 2, (0, 1, 4), "aot_eager"), (1, 2, (2, 3, 4, 5), "aot_eager"), (0, 1, (0,), "inductor")],
)
def test_compiles_into_one_graph(case: int, views: int, blocks: tuple[int, ...], backend: str) -> None:
    name, options = SMALLEST[case]
    eager, compiled = (scrambled(build_encoder(name, SMALL, **options)) for _ in range(2))
    compiled.load_state_dict(eager.state_dict())
    for encoder in (eager, compiled):
        assert isinstance(encoder, STGCN | DSTANet)
        encoder.blocks = nn.Sequential(*(encoder.blocks[i] for i in blocks))
    run = torch.compile(compiled, fullgraph=True, dynamic=False, backend=backend)
    inputs = [torch.randn(4, 6, 3, 5, 2).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0])
    for function, x in zip((eager, run), inputs):
        function(x, views).square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-3, atol=1e-3)
    for (key, p), q in zip(eager.named_parameters(), compiled.parameters()):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-3, msg=lambda m, k=key: f"{k}: {m}")


# initialisation, options


def test_a_narrow_stgcn_keeps_what_random_weights_tell_apart() -> None:
    encoder = STGCN(NTU25, channels=8)
    assert not any(m.p for m in encoder.modules() if isinstance(m, nn.Dropout))
    assert encoder.feature_dim == 128 and encoder(torch.randn(2, 8, 3, 25, 1)).shape == (2, 128)
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 1000:
            expected = math.sqrt(2 / module.weight[0].numel())
            assert module.weight.std().item() == pytest.approx(expected, rel=0.1)


def test_initialisation_of_stgcn() -> None:
    encoder = STGCN(NTU25)
    last = encoder.blocks[-1]
    weight = torch.cat([last.spread.weight.flatten(), last.temporal[2].weight.flatten()])  # type: ignore
    assert abs(weight.mean().item()) < 1e-3 and abs(weight.std().item() - 0.02) < 1e-3
    scale = torch.cat([m.weight for m in encoder.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)])
    assert abs(scale.mean().item() - 1) < 5e-3 and abs(scale.std().item() - 0.02) < 3e-3
    for key, value in encoder.named_parameters():
        if key.endswith("bias"):
            assert not value.any(), key
        if key.endswith("importance"):
            assert value.shape == (3, 25, 25) and (value == 1).all(), key


def test_initialisation_of_dsta() -> None:
    for key, value in DSTANet(KINECT20, size="small").named_parameters():
        if value.ndim == 4 and value.numel() > 4000:
            expected = math.sqrt(2 / (value.shape[0] * value.shape[2]))
            assert abs(value.std().item() / expected - 1) < 0.05, key
        elif key.endswith("scale"):
            assert (value == 1).all(), key
        elif key.endswith("joint_map"):
            assert value.shape == (3, 20, 20) and (value == 1 / 20).all(), key


def test_unknown_options_are_named() -> None:
    with pytest.raises(InputError, match="encoder stgcn has no option hidden; it takes persons, frames"):
        build_encoder("stgcn", NTU25, hidden=64)
    with pytest.raises(InputError, match="unknown size 'tiny'; choose one of full, small"):
        build_encoder("dsta", NTU25, size="tiny")


NARROW = """
import sys, torch
from a2mc_fast.encoders import build_encoder
from a2mc_fast.skeleton import NTU25

for channels in (*range(1, 17), 20, 24):
    print(channels, flush=True)
    encoder = build_encoder("stgcn", NTU25, persons=2, frames=4, channels=channels)
    encoder(torch.randn(2, 4, 3, 25, 2)).square().sum().backward()
print("all", flush=True)
"""


def test_stgcn_of_any_width_trains_on_a_cpu() -> None:
    """In a process of its own, since what goes wrong is memory that a library overwrites."""
    checked = {**os.environ, "MALLOC_CHECK_": "3", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", NARROW], capture_output=True, text=True, env=checked)
    assert done.stdout.split()[-1] == "all", f"ended at {done.stdout.split()[-1]} channels: {done.stderr}"


def test_what_is_compiled_sees_one_view_at_a_time() -> None:
    config = preset("demo")
    config = replace(config, encoder=EncoderConfig(name="stgcn", channels=4, projection=8))
    branch = build_branch(config, NTU25, persons=1)
    x = torch.randn(6, 8, 3, 25, 1) * torch.tensor([1.0, 1.0, 5.0, 5.0, 9.0, 9.0]).view(6, 1, 1, 1, 1)
    encode, seen = branch.encoder.encode, []
    features = []
    for one in (encode, lambda x: (seen.append(len(x)), encode(x))[1]):
        branch.encoder.encode = one  # type: ignore[method-assign]
        torch.manual_seed(0)  # for its dropout
        features.append(branch.feature(x, views=3))
    assert torch.equal(*features) and seen == [2, 2, 2]
