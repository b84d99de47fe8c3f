"""Random numbers: the published vectors of Philox, uniformity, and purity."""

from __future__ import annotations

import math

import pytest
import torch
from a2mc_fast.kernels import philox as kernel

from a2mc_fast import rng

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


KNOWN_ANSWERS = pytest.mark.parametrize(
    "counter, key, words",
    [
        ([0, 0, 0, 0], 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, 0xFFFFFFFFFFFFFFFF, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)


@KNOWN_ANSWERS
def test_known_answers_of_random123(counter: list[int], key: int, words: str) -> None:
    got = rng.encrypt(tuple(torch.tensor([word]) for word in counter), key)  # type: ignore[arg-type]
    assert " ".join(f"{word:08x}" for word in got[:, 0].tolist()) == words


@pytest.mark.anywhere
@KNOWN_ANSWERS
def test_the_kernel_knows_the_same_answers(counter: list[int], key: int, words: str) -> None:
    step = signed(counter[2] | counter[3] << 32)
    got = kernel.philox(torch.tensor(step, device=DEVICE), signed(key), counter[1], counter[0], 3)
    assert " ".join(f"{word:08x}" for word in got[:, 0].tolist()) == words


def signed(value: int) -> int:
    """The same 64 bits as a signed number."""
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.anywhere
@pytest.mark.parametrize("seed", [0, 1, 5, 2**40 + 3, 2**63 - 1])
@pytest.mark.parametrize("count", [1, 512, 1300])
def test_the_kernel_draws_the_words_of_the_plain_form(seed: int, count: int) -> None:
    for step, stream, first in ((0, 0, 0), (1, 1, 1), (2**33 + 5, 2, 4096)):
        time = torch.tensor(step, device=DEVICE)
        plain = rng.philox(seed, torch.tensor(step), stream, count, "cpu", first)
        assert torch.equal(kernel.philox(time, seed, stream, first, count).cpu(), plain)
        assert torch.equal(rng.philox(seed, time, stream, count, DEVICE, first).cpu(), plain)


@pytest.mark.anywhere
def test_the_operation_is_what_torch_expects_of_one() -> None:
    step = torch.tensor(3, device=DEVICE)
    torch.library.opcheck(torch.ops.a2mc.philox.default, (step, 2**62, 1, 5, 9))


@pytest.mark.anywhere
def test_compiled_draws_are_the_same() -> None:
    step = torch.tensor(3, device=DEVICE)
    drawn = rng.normal(1, step, 2, (5, 9), DEVICE), rng.uniform(1, step, 2, (5, 9), DEVICE)

    def draw(step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rng.normal(1, step, 2, (5, 9), DEVICE), rng.uniform(1, step, 2, (5, 9), DEVICE)

    compiled = torch.compile(draw, fullgraph=True, dynamic=False)(step)
    torch.testing.assert_close(compiled[0], drawn[0])
    assert torch.equal(compiled[1], drawn[1])


def test_a_kernel_that_fails_or_draws_other_words_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = rng.kernel_refused.__wrapped__
    assert refused(torch.device("cpu")) == ""
    honest = kernel.philox
    monkeypatch.setattr(kernel, "philox", lambda *arguments: honest(*arguments) ^ 1)
    assert "not Philox's" in refused(torch.device("cpu"))

    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("at 1:2:\n^\nno such instruction")

    monkeypatch.setattr(kernel, "philox", fail)
    assert refused(torch.device("cpu")) == "RuntimeError: at 1:2: no such instruction"


def test_seed_step_stream_and_index_all_matter() -> None:
    base = rng.uniform(1, 2, 3, (1000,), "cpu")
    assert torch.equal(base, rng.uniform(1, torch.tensor(2), 3, (1000,), "cpu"))
    for other in (rng.uniform(9, 2, 3, (1000,), "cpu"), rng.uniform(1, 9, 3, (1000,), "cpu")):
        assert abs(torch.corrcoef(torch.stack((base, other)))[0, 1].item()) < 0.1
    assert abs(torch.corrcoef(torch.stack((base, rng.uniform(1, 2, 9, (1000,), "cpu"))))[0, 1].item()) < 0.1
    assert len(base.unique()) > 990
    high = 2**40  # beyond 32 bits in the step and in the seed
    assert not torch.equal(base, rng.uniform(1, 2 + high, 3, (1000,), "cpu"))
    assert not torch.equal(base, rng.uniform(1 + high, 2, 3, (1000,), "cpu"))


def test_uniform_is_uniform() -> None:
    """Chi-square over 256 cells: 255 ± 5 standard deviations of 22.6."""
    draws = rng.uniform(0, 0, 0, (2**18,), "cpu")
    observed = torch.bincount((draws * 256).long(), minlength=256).double()
    chi_square = ((observed - 1024) ** 2 / 1024).sum().item()
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)


def test_normal_has_the_moments_of_the_normal_distribution() -> None:
    draws = rng.normal(0, 0, 0, (2**18 + 1,), "cpu").double()
    assert len(draws) == 2**18 + 1
    error = 5 / math.sqrt(len(draws))  # five standard errors of the mean
    assert abs(draws.mean().item()) < error
    assert abs(draws.pow(2).mean().item() - 1) < error * math.sqrt(2)
    assert abs(draws.pow(4).mean().item() - 3) < error * math.sqrt(96)


def test_permutation_holds_each_number_once() -> None:
    first, second = (rng.permutation(0, step, 0, 1001, "cpu") for step in (0, 1))
    assert torch.equal(first.sort().values, torch.arange(1001))
    assert not torch.equal(first, second)
