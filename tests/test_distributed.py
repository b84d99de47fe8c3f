"""Several processes train as one: the same weights, bank and loss as one process with the joint batch."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
import torch

from a2mc_fast.config import AttackConfig, BankConfig, Config, LossConfig, RunConfig, preset
from a2mc_fast.data import Clips
from a2mc_fast.distributed import ALONE, World, join
from a2mc_fast.encoders.joint_norm import join_batch_norms
from a2mc_fast.trainer import Trainer
from tests.conftest import SMALL
from tests.test_step import TwoHalves

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload([__name__, "a2mc_fast.trainer", "torch._dynamo"])
WARMUP, STEPS = 3, 6  # rounding grows from step to step
State = dict[str, Any]


class Ranks:
    """W processes that have met; each test gives them something to do."""

    def __init__(self, size: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pairs = [_server.Pipe() for _ in range(size)]
        self.lines = [mine for mine, _ in pairs]
        self.processes = [
            _server.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """work(world, *args) on every rank -> their results."""
        for line in self.lines:
            line.send((work, args))
        results = []
        for rank, line in enumerate(self.lines):
            assert line.poll(60), f"rank {rank} hangs"
            results.append(line.recv())
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def close(self) -> None:
        for line in self.lines:
            line.send((None, ()))
        for process in self.processes:
            process.join(30)
            assert process.exitcode == 0


def _serve(rank: int, size: int, port: int, line: Connection) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    with join(preset("demo"), lambda: torch.device("cpu")) as world:
        while True:
            work, args = line.recv()
            if work is None:
                return
            torch.manual_seed(0)
            try:
                result = work(world, *args)
            except Exception as error:
                result = error
            line.send(result)


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def three() -> Iterator[Ranks]:
    ranks = Ranks(3)
    yield ranks
    ranks.close()


def small(name: str = "demo", **changes: Any) -> Config:
    """A preset at toy size, for one to three ranks."""
    config = replace(preset(name), **changes)
    return replace(
        config,
        views=replace(config.views, frames=8, min_frames=8),
        encoder=replace(config.encoder, hidden=8, layers=1, projection=16),
        # temperatures at which rounding grows little
        loss=replace(config.loss, temperature=0.3),
        bank=replace(config.bank, size=30, warmup_steps=WARMUP, lr_scaling=False, lr=0.5, temperature=0.3),
        optim=replace(config.optim, batch_size=12, lr=0.05),
    )


def some_clips() -> Clips:
    generator = np.random.default_rng(0)
    lengths, count = [10, 12, 9] * 16, 48
    joints = generator.standard_normal((sum(lengths), 1, 5, 3), np.float32)
    split = np.arange(count) % 4 != 3
    return Clips.pack(joints, lengths, np.arange(count) % 3, SMALL, splits={"xsub": split})


def trained(world: World, config: Config) -> State:
    """Everything that several steps leave, as this rank sees it."""
    trainer = Trainer(config, some_clips(), world)
    trainer.start()
    losses = []
    for step in range(STEPS):
        epoch, new = trainer.epochs_done(step)
        if new:
            trainer.model.refresh_classifier(epoch)
        losses.append([value.item() for value in trainer.step(step).values()])
    state = {name: t.numpy() for name, t in trainer.model.whole_state().items()}
    for name, parameter in trainer.model.query.named_parameters():
        state[f"optimizer.{name}"] = trainer.optimizer.state[parameter]["momentum_buffer"].numpy()
    return {**state, "losses": np.concatenate(losses), "knn": np.array(trainer.knn_accuracy())}


def assert_close(got: State, expected: State, tolerance: float = 1e-6) -> None:
    """Within the tolerance, relative to the tensor's largest entry where that exceeds one."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, float(np.abs(value).max()))
        np.testing.assert_allclose(got[name], value, rtol=0, atol=tolerance * scale, err_msg=name)


CONFIGS = {
    "full": small(),
    "infonce": small(bank=BankConfig(objective="infonce", reduction="sum")),
    "fifo": small("demo-b3"),
    "plain": small("demo-b1"),
    "live": small(loss=LossConfig(live_target=True)),
    "pseudo": small(attack=AttackConfig(classifier="pseudo_labels")),
    "keys": small(bank=BankConfig(init="keys_only"), attack=AttackConfig(grad_norm="none", reduction="mean")),
    "train": small(attack=AttackConfig(norm_mode="train", grad_norm="none")),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_equal_one_process(name: str, two: Ranks, three: Ranks) -> None:
    alone = trained(ALONE, CONFIGS[name])
    for ranks in (two, three):
        first, *others = ranks(trained, CONFIGS[name])
        for other in others:
            assert_close(other, first, 0)
        assert_close(first, alone)


@pytest.mark.parametrize("name", ["full", "infonce", "fifo", "plain", "pseudo", "keys"])
def test_a_bank_shared_by_ranks_equals_a_whole_one(name: str, two: Ranks, three: Ranks) -> None:
    """Three ranks hold ten rows each, fewer than the twelve keys of a batch."""
    alone = trained(ALONE, CONFIGS[name])
    shared = replace(CONFIGS[name], run=RunConfig(shard_bank=True))
    for ranks in (two, three):
        first, *others = ranks(trained, shared)
        assert_close(first, alone)
        for other in others:
            size = len(alone["banks.feature.rows"]) // len(ranks.lines)
            assert len(other["banks.feature.rows"]) == size
            for table in ("rows", "velocity"):
                other.pop(f"banks.feature.{table}", None)
            assert_close(other, {n: v for n, v in first.items() if n in other}, 0)


def levels_trained(world: World, config: Config) -> State:
    from a2mc_fast.encoders import build

    before = build._ENCODERS["bigru"]
    build._ENCODERS["bigru"] = TwoHalves
    try:
        return trained(world, config)
    finally:
        build._ENCODERS["bigru"] = before


@pytest.mark.parametrize("share", [False, True], ids=["whole", "shared"])
def test_pairs_of_levels_keep_the_order_of_the_joint_batch(share: bool, three: Ranks) -> None:
    config = small(run=RunConfig(shard_bank=share))
    alone = levels_trained(ALONE, config)
    assert "banks.t.rows" in alone
    assert_close(three(levels_trained, config)[0], alone)


def local_statistics(world: World) -> list[Any]:
    """What BatchNorm makes of one's own clips, and the running statistics after a step."""
    config = small()
    config = replace(config, encoder=replace(config.encoder, batch_norm="local"))
    trainer = Trainer(config, some_clips(), world)
    seen: list[torch.Tensor] = []
    norm = trainer.model.query.encoder.input_norm
    assert isinstance(norm, torch.nn.BatchNorm1d)
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    trainer.step(0)
    assert norm.running_mean is not None and norm.running_var is not None
    return [seen[0].numpy(), norm.running_mean.numpy(), norm.running_var.numpy()]


def test_local_batch_norm_averages_the_running_statistics(three: Ranks) -> None:
    seen, means, variances = zip(*three(local_statistics))
    expected = (
        0.1 * np.mean([x.mean(0) for x in seen], 0),
        0.9 + 0.1 * np.mean([x.var(0, ddof=1) for x in seen], 0),
    )
    for mean, variance in zip(means, variances):
        np.testing.assert_allclose(mean, expected[0], atol=1e-6)
        np.testing.assert_allclose(variance, expected[1], rtol=1e-6)
    alone = local_statistics(ALONE)
    np.testing.assert_array_equal(np.concatenate(seen), alone[0])
    np.testing.assert_allclose(means[0], alone[1], atol=1e-6)


def normalised(world: World, kind: str, x: torch.Tensor, up: torch.Tensor) -> list[Any]:
    """BatchNorm of this rank's part: output, gradients, running statistics."""
    norm = getattr(torch.nn, kind)(x.shape[1]).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, x.shape[1]))
    outer = torch.nn.Sequential(norm)
    join_batch_norms(outer, world)
    part = world.part(len(x))
    own = x[part].clone().requires_grad_()
    y = outer(own)
    (y * up[part]).sum().backward()
    gradients = [p.grad for p in outer.parameters() if p.grad is not None]
    assert isinstance(own.grad, torch.Tensor)
    outer.eval()
    results = [y, own.grad, outer(own), *(world.sum(g) for g in gradients), *outer.state_dict().values()]
    return [r.detach().numpy() for r in results]


@pytest.mark.parametrize(
    "kind, shape", [("BatchNorm1d", (6, 4)), ("BatchNorm1d", (6, 4, 5)), ("BatchNorm2d", (6, 4, 5, 3))]
)
def test_joint_batch_norm_equals_one_over_the_joint_batch(
    kind: str, shape: tuple[int, ...], three: Ranks
) -> None:
    # a mean that dwarfs the spread, which the mean of squares would not survive
    x = (
        torch.randn(shape, dtype=torch.float64)
        * torch.tensor([1e-3, 1, 10, 100]).view(1, 4, *[1] * (len(shape) - 2))
        + 1e4
    )
    up = torch.randn(shape, dtype=torch.float64)
    alone = normalised(ALONE, kind, x, up)
    ranks = three(normalised, kind, x, up)
    for number, expected in enumerate(alone):
        got = np.concatenate([r[number] for r in ranks]) if number < 3 else ranks[1][number]
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8, err_msg=str(number))
