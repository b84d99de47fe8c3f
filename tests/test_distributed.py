"""Several processes train as one: the same weights, bank and loss as one process with the joint batch."""

from __future__ import annotations

import functools
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from a2mc_fast import evaluate, train
from a2mc_fast.config import BankConfig, Config, EncoderConfig, RunConfig, preset
from a2mc_fast.data import Clips
from a2mc_fast.encoders import build_encoder
from a2mc_fast.errors import InputError
from a2mc_fast.losses import PAPER_MIX
from a2mc_fast.ranks import ALONE, World
from a2mc_fast.ranks import joining as distributed
from a2mc_fast.ranks.batch_norm import join_batch_norms
from a2mc_fast.ranks.joining import join
from a2mc_fast.run import snapshot
from a2mc_fast.run.checkpoint import FILE
from a2mc_fast.run.parts import Parts
from a2mc_fast.run.start import knn_top1
from a2mc_fast.trainer import Trainer
from tests import processes
from tests.conftest import SMALL
from tests.test_step import TwoHalves

_server = processes._server
WARMUP, STEPS = 3, 6  # rounding grows from step to step
State = dict[str, Any]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Ranks:
    """W processes that have met; each test gives them something to do."""

    def __init__(self, size: int) -> None:
        port = free_port()
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
        views=replace(config.views, frames=8),
        encoder=EncoderConfig(hidden=8, layers=1, projection=16),
        # temperatures at which rounding grows little
        loss=replace(config.loss, temperature=0.3, mix=config.loss.mix and PAPER_MIX),
        bank=BankConfig(
            kind=config.bank.kind, size=30, warmup_steps=WARMUP, lr=0.5 * 16384 / 30, temperature=0.3
        ),
        optim=replace(config.optim, batch_size=12, lr=0.05),
    )


def some_clips(device: torch.device | str = "cpu") -> Clips:
    generator = np.random.default_rng(0)
    lengths, count = [10, 12, 9] * 16, 48
    joints = generator.standard_normal((sum(lengths), 1, 5, 3), np.float32)
    split = np.arange(count) % 4 != 3
    return Clips.pack(joints, lengths, np.arange(count) % 3, SMALL, splits={"xsub": split}, device=device)


def trained(world: World, config: Config) -> State:
    """Everything that several steps leave, as this rank sees it."""
    trainer = Trainer(config, some_clips(), world)
    parts = Parts(trainer)
    losses = []
    for step in range(STEPS):
        losses.append([value.item() for value in trainer.step(step).values()])
    state = {name: t.numpy() for name, t in trainer.model.state_dict().items()}
    for name, parameter in trainer.model.query.named_parameters():
        state[f"optimizer.{name}"] = trainer.optimizer.state[parameter]["momentum_buffer"].numpy()
    return {**state, "losses": np.concatenate(losses), "knn": np.array(knn_top1(trainer, parts))}


def assert_close(got: State, expected: State, tolerance: float = 1e-6) -> None:
    """Within the tolerance, relative to the tensor's largest entry where that exceeds one."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, float(np.abs(value).max()))
        np.testing.assert_allclose(got[name], value, rtol=0, atol=tolerance * scale, err_msg=name)


CONFIGS = {
    "full": small(),
    "fifo": small("demo-b3"),
    "plain": small("demo-b1"),
    "normalised": replace(small(), encoder=replace(preset("own").encoder, hidden=8, projection=16)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_equal_one_process(name: str, two: Ranks, three: Ranks) -> None:
    alone = trained(ALONE, CONFIGS[name])
    for ranks in (two, three):
        first, *others = ranks(trained, CONFIGS[name])
        for other in others:
            assert_close(other, first, 0)
        # small differences of features are normalised, too
        assert_close(first, alone, 1e-5 if name == "normalised" else 1e-6)


def test_kernels_climb_with_the_features_of_all_ranks(two: Ranks) -> None:
    full = replace(CONFIGS["full"], precision="fp32")
    fused = replace(full, run=RunConfig(backend="triton"))
    assert_close(two(trained, fused)[0], trained(ALONE, full), 1e-5)


def levels_trained(world: World, config: Config) -> State:
    from a2mc_fast.encoders import build

    before = build._ENCODERS["bigru"]
    build._ENCODERS["bigru"] = TwoHalves
    try:
        return trained(world, config)
    finally:
        build._ENCODERS["bigru"] = before


def test_pairs_of_levels_keep_the_order_of_the_joint_batch(three: Ranks) -> None:
    alone = levels_trained(ALONE, small())
    assert "banks.t.rows" in alone
    assert_close(three(levels_trained, small())[0], alone)


ENCODERS: dict[str, dict[str, Any]] = {
    "bigru": {"hidden": 6, "layers": 1, "pool": "mean+last+std"},
    "stgcn": {"channels": 2},
    "dsta": {"size": "small"},
    "scd": {"width": 16},
}


def encoded(world: World, name: str, x: torch.Tensor) -> list[Any]:
    """Features of this rank's clips, as two views, and the gradient of the joint batch; in float64."""
    encoder = build_encoder(name, SMALL, persons=1, frames=8, **ENCODERS[name]).double()
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # whose random numbers are each rank's own
    outer = torch.nn.Sequential(encoder)
    join_batch_norms(outer, world)
    views = [view[world.part(len(view))] for view in x.chunk(2)]
    feature = encoder(torch.cat(views), views=2)
    feature.pow(3).mean().backward()
    gradients = [p.grad for p in outer.parameters() if p.grad is not None]
    world.average_(gradients)
    both = torch.stack(feature.detach().chunk(2), 1)
    return [both.numpy(), *(g.numpy() for g in gradients)]


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_see_the_joint_batch(name: str, two: Ranks) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 8, 3, 5, 1, dtype=torch.float64)
    torch.manual_seed(0)
    alone = encoded(ALONE, name, x)
    ranks = two(encoded, name, x)
    for number, expected in enumerate(alone):
        got = np.concatenate([r[0] for r in ranks]) if number == 0 else ranks[1][number]
        np.testing.assert_allclose(
            got, expected, atol=1e-9 * np.abs(expected).max() + 1e-12, err_msg=str(number)
        )


# set up wrongly


def refused(world: World, config: Config, other: Config) -> str:
    """What a trainer with one configuration on rank 0, and another on the others, is refused for."""
    with pytest.raises(InputError) as caught:
        Trainer(config if world.main else other, some_clips(), world)
    return str(caught.value)


def test_ranks_must_share_evenly_and_be_told_the_same(two: Ranks, three: Ranks) -> None:
    config = small()
    odd = replace(config, optim=replace(config.optim, batch_size=11))
    for said in two(refused, odd, odd):
        assert said.startswith("--optim.batch-size 11, the joint batch, cannot be shared evenly by 2 ranks")
    seed = replace(config, seed=1)
    for said in three(refused, config, seed):
        assert said.startswith("ranks 1, 2 got other flags or other data than rank 0")


def other_data(world: World) -> str:
    clips = some_clips()
    if world.rank == 1:
        # the same numbers in another order
        clips.frames[:3] = clips.frames[:3].flip(0)
    with pytest.raises(InputError) as caught:
        Trainer(small(), clips, world)
    return str(caught.value)


def drifted(world: World) -> str:
    trainer = Trainer(small(), some_clips(), world)
    trainer.step(0)
    snapshot.state(trainer, 1, {})
    if world.rank == 1:
        with torch.no_grad():
            next(trainer.model.query.parameters())[0] *= 1 + 1e-6
    with pytest.raises(InputError) as caught:
        snapshot.state(trainer, 1, {})
    return str(caught.value)


def test_ranks_that_differ_are_noticed(two: Ranks) -> None:
    assert all("rank 1 got other flags or other data than rank 0" in said for said in two(other_data))
    assert all("rank 1 no longer held what rank 0 held after step 1" in said for said in two(drifted))


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name, value in {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    device = torch.device("cpu")
    with join(preset("demo"), lambda: device) as world:
        assert world == World(device=device) and chosen == [1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with (
        pytest.raises(InputError, match=r"4 ranks on a machine with 2 GPUs: use at most .* 2"),
        join(preset("demo"), lambda: device),
    ):
        pass


# command lines


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "clips.safetensors"
    some_clips().save(path)
    return path


# 15 steps, an epoch of three
SETTINGS = {
    "views.frames": "8",
    "encoder.hidden": "8",
    "encoder.projection": "16",
    "optim.batch-size": "12",
    "optim.epochs": "4",
    "optim.milestones": "2",
    "optim.lr": "0.05",
    "loss.temperature": "0.3",
    "bank.size": "30",
    "bank.warmup-steps": "3",
    "bank.lr": "100",
    "bank.temperature": "0.3",
    "run.log-every": "2",
}
FLAGS = [part for name, value in SETTINGS.items() for part in (f"--{name}", value)]


def flags(data: Path, folder: Path, *more: str) -> list[str]:
    return ["demo", "--data", str(data), "--run.out", str(folder), *FLAGS, *more]


def _rank(rank: int, size: int, port: int, args: list[str], output: str, trick: str, count: int) -> None:
    processes.TRICKS |= TRICKS
    if args[0] in ("knn", "finetune"):
        train.main = evaluate.main
    names = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    distributed._LINGER = 0.0
    processes._main(args, output, trick, count)


def _at_step(number: int, then: Callable[[], None]) -> None:
    processes._at_call(Trainer, "step", number, lambda *_: then(), after=True)


def _bad_input() -> None:
    raise InputError("clip 7 is spoilt")


def _defect() -> None:
    raise ZeroDivisionError("a defect")


TRICKS: dict[str, Callable[[int], None]] = {
    "SIGTERM": lambda n: _at_step(n, lambda: os.kill(os.getpid(), signal.SIGTERM)),
    "hangs": lambda n: _at_step(n, lambda: time.sleep(60)),
    "dies": lambda n: _at_step(n, processes._die),
    "bad input": lambda n: _at_step(n, _bad_input),
    "defect": lambda n: _at_step(n, _defect),
    "elsewhere": lambda n: os.chdir(Path(__file__).parent),
}


def together(
    size: int, args: list[str], folder: Path, trick: str = "", count: int = 0, *, missing: int = 0
) -> list[tuple[int | None, str]]:
    """A command line on several ranks, of which the last does a trick. -> exit code and words of each"""
    port = free_port()
    said = [folder / f"said{rank}" for rank in range(size - missing)]
    ranks = [
        _server.Process(
            target=_rank, args=(rank, size, port, args, str(path), trick if rank == size - 1 else "", count)
        )
        for rank, path in enumerate(said)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(0 if trick == "hangs" and process is ranks[-1] else 60)
        process.kill()
        process.join()
    return [(process.exitcode, path.read_text()) for process, path in zip(ranks, said)]


def tensors(folder: Path) -> State:
    return {name: t.numpy() for name, t in load_file(folder / FILE).items()}


def test_a_run_goes_on_with_another_number_of_ranks(data: Path, tmp_path: Path) -> None:
    """One rank of two gets SIGTERM: both stop at the same step. Three go on, then one."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert processes.run(flags(data, whole), tmp_path / "said")[0] == 0
    ended = together(2, flags(data, folder), tmp_path, "SIGTERM", 5)
    assert [code for code, _ in ended] == [143, 143], ended
    assert "stopped after step 6 of 15" in ended[0][1] and ended[1][1] == ""
    ended = together(3, flags(data, folder, "--resume"), tmp_path, "SIGTERM", 5)
    assert [code for code, _ in ended] == [143] * 3, ended
    assert "resumed after step 6" in ended[0][1] and "stopped after step 12 of 15" in ended[0][1]
    assert [said for _, said in ended[1:]] == ["", ""]
    assert processes.run(flags(data, folder, "--resume"), tmp_path / "said")[0] == 0
    assert_close(tensors(folder), tensors(whole), 1e-5)
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").open()] for f in (whole, folder)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    losses = [[line["loss"] for line in run if "loss" in line] for run in lines]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) >= 7
    ended = together(2, flags(data, folder, "--resume"), tmp_path)
    assert [code for code, _ in ended] == [0, 0] and "nothing to resume" in ended[0][1] and not ended[1][1]
    ended = together(2, ["knn", str(folder)], tmp_path)
    assert [code for code, _ in ended] == [0, 0] and "wrote" in ended[0][1] and not ended[1][1], ended
    assert json.loads((folder / "knn.json").read_text())["top1"] == pytest.approx(lines[1][-1]["knn_top1"])
    ended = together(2, ["finetune", str(folder)], tmp_path)
    assert [code for code, _ in ended] == [2, 2] and "start it without torchrun" in ended[0][1], ended


def test_a_rank_that_does_not_see_the_checkpoint_says_so(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert processes.run(flags(data, folder), tmp_path / "said")[0] == 0
    (folder / "result.json").unlink()
    args = flags(data, Path(os.path.relpath(folder)), "--resume")
    ended = together(2, args, tmp_path, "elsewhere")
    assert [code for code, _ in ended] == [1, 2] and ended[0][1] == "", ended
    assert "checkpoint.safetensors of step 15 is not here: every rank reads it" in ended[1][1], ended


@pytest.mark.parametrize(
    "trick, codes, says",
    [
        ("bad input", [1, 2], ["", "error: rank 1: clip 7 is spoilt\n"]),
        ("defect", [1, 1], ["", "ZeroDivisionError: a defect\non rank 1 of 2\n"]),
        ("hangs", [1, -9], ["error: rank 0 has lost another rank, which died or did not answer for 2 s", ""]),
        ("dies", [1, -9], ["error: rank 0 has lost another rank, which died or did not answer for 2 s", ""]),
    ],
)
def test_a_rank_that_fails_ends_the_run_and_says_so_once(
    trick: str, codes: list[int], says: list[str], data: Path, tmp_path: Path
) -> None:
    start = time.monotonic()
    ended = together(2, flags(data, tmp_path / "run", "--run.timeout", "2"), tmp_path, trick, 5)
    assert time.monotonic() - start < 60
    assert [code for code, _ in ended] == codes, ended
    for (_, said), expected in zip(ended, says):
        assert expected in said and said.count("rror:") == (expected != ""), said


def test_what_is_wrong_with_all_ranks_is_said_once(data: Path, tmp_path: Path) -> None:
    for wrong, expected in (
        (["--optim.lr", "-1"], "optim.lr must be in"),
        (["--optim.batch-size", "11"], "cannot be shared evenly by 2 ranks"),
        (["--nosuch"], "nosuch"),
    ):
        ended = together(2, flags(data, tmp_path / "run", *wrong), tmp_path)
        assert [code for code, _ in ended] == [2, 2], ended
        assert expected in ended[0][1] and ended[1][1] == ""
    ended = together(2, flags(data, tmp_path / "run", "--run.timeout", "1"), tmp_path, missing=1)
    assert ended[0][0] == 2 and ended[0][1].startswith("error: 2 ranks could not meet within 1 s"), ended


def test_torchrun_names_the_rank_that_was_killed(tmp_path: Path) -> None:
    """On the command line, with the built-in set."""
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "a2mc_fast.train",
    ]
    args = ["demo", "--synthetic.clips", "60", "--run.out", str(folder), *FLAGS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = functools.partial(subprocess.Popen, text=True, stdout=PIPE, stderr=STDOUT, env=environment)
    with run([*command, *args, "--optim.epochs", "100000"]) as launcher:
        processes.wait_for(folder / "metrics.jsonl", 5)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        ranks = {
            _environment(child)["RANK"]: int(child) for child in children if "RANK" in _environment(child)
        }
        os.kill(ranks["1"], signal.SIGKILL)
        killed = time.monotonic()
        said = launcher.communicate(timeout=60)[0]
        assert time.monotonic() - killed < 60 and launcher.returncode == 1
        root_cause = said.split("Root Cause")[1]
        assert "rank      : 1" in root_cause and "SIGKILL" in root_cause, said
    with run([*command, *args, "--run.out", str(tmp_path / "other")]) as launcher:
        said = launcher.communicate(timeout=100)[0]
        assert launcher.returncode == 0 and said.count("15 steps in") == 1 and "on 2 x " in said, said


def _environment(process: str) -> dict[str, str]:
    content = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in content if "=" in entry)


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("encoder", ["bigru", "stgcn"])
def test_a_captured_step_holds_what_ranks_say(encoder: Any, tmp_path: Path) -> None:
    """A group of one rank, whose messages go through NCCL all the same."""
    device = torch.device("cuda", torch.cuda.current_device())
    config = small()
    config = replace(config, encoder=replace(config.encoder, name=encoder, channels=4))
    plain = replace(config, run=replace(config.run, compile="off", graph="off", backend="torch"))
    clips = some_clips(device)

    def losses(config: Config, world: World) -> list[float]:
        trainer = Trainer(config, clips, world)
        Parts(trainer)
        return [trainer.step(step)["loss"].item() for step in range(12)]

    alone = losses(plain, World(device=device))
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    try:
        one = World(0, 1, device, alone=False)
        for chosen in (plain, config):  # launched, then captured
            # rounding grows from step to step
            got = losses(chosen, one)
            assert got == pytest.approx(alone, rel=2e-2)
            assert got[:3] == pytest.approx(alone[:3], rel=1e-3)
    finally:
        gc.collect()  # a captured step holds on to the group
        torch.distributed.destroy_process_group()
