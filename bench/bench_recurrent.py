"""The recurrent layers alone: two directions of one layer by cuDNN, and by the fused kernels where they are.

`pytest bench/bench_recurrent.py -s` times the forward pass, forward and backward with all gradients, and with
the input's gradient alone, which is what the attack needs; on a CPU torch's GRU stands for cuDNN's.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bench.harness import CUDA, DEVICE, TOY, Form, compare, compiled_all, product_rate, sized
from bench.records import Recorder

FRAMES, WIDTH, HIDDEN = sized((64, 2048, 1024), (64, 128, 64), (3, 16, 8))
DTYPE = torch.bfloat16 if CUDA else torch.float32
CLIPS = sized((64, 192), (64, 192), (2,))
# on a CPU they only run in Triton's interpreter
KERNELS = (CUDA or TOY) and importlib.util.find_spec("a2mc_fast.kernels.gru") is not None


def passes(layer: Callable[[Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> dict[str, Form]:
    """What a step asks of a layer, by name."""
    watched = x.clone().requires_grad_()
    upstream = torch.randn(*x.shape[:2], 2 * HIDDEN, device=x.device, dtype=x.dtype)

    def forward() -> Tensor:
        with torch.no_grad():
            return layer(x)

    def backward(wanted: list[Tensor]) -> object:
        for weight in weights:
            weight.requires_grad_(len(wanted) > 1)
        return torch.autograd.grad(layer(watched), wanted, upstream)

    return {
        "forward": forward,
        "forward and backward": lambda: backward([watched, *weights]),
        "forward and the input's gradient": lambda: backward([watched]),
    }


def by_cudnn(pair: nn.ModuleList, x: Tensor) -> dict[str, Form]:
    """x [N, T, W]; two calls, in the type of the input."""
    pair = copy.deepcopy(pair).to(x.dtype)
    return passes(lambda x: torch.cat([gru(x)[0] for gru in pair], 2), x, list(pair.parameters()))


def by_kernels(pair: nn.ModuleList, x: Tensor) -> dict[str, Form]:
    """The same by the fused kernels, time first as they want it; weights are cast beforehand."""
    from a2mc_fast.kernels.gru import gru_pair, make_operands

    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    weights = [getattr(gru, name).detach().clone() for name in names for gru in pair]
    operands = make_operands(weights, x.dtype)
    sequence = x.transpose(0, 1).contiguous()
    return passes(lambda sequence: gru_pair(sequence, weights, operands), sequence, weights)


@pytest.mark.parametrize("clips", CLIPS)
def test_pair_of_directions(record: Recorder, clips: int) -> None:
    torch.manual_seed(0)
    pair = nn.ModuleList(nn.GRU(WIDTH, HIDDEN, batch_first=True) for _ in range(2)).to(DEVICE)
    x = torch.randn(clips, FRAMES, WIDTH, device=DEVICE, dtype=DTYPE)
    forms = {"cudnn": by_cudnn(pair, x)}
    if KERNELS:
        forms = {"ours": by_kernels(pair, x), **forms}
        mine, theirs = (forms[form]["forward"]() for form in ("ours", "cudnn"))
        assert isinstance(mine, Tensor) and isinstance(theirs, Tensor)
        worst = ((mine.transpose(0, 1) - theirs).float().norm() / theirs.float().norm()).item()
        assert worst < 2e-2, f"the kernels differ by {worst:.1e}: no speed for it"
    for by_name in forms.values():
        for form in by_name.values():
            form()
    compiled_all()
    products = 2 * 2 * clips * FRAMES * 3 * HIDDEN * (WIDTH + HIDDEN)  # FLOP of a forward pass
    sizes = {"N": clips, "T": FRAMES, "W": WIDTH, "H": HIDDEN}
    for name, times in zip(forms["cudnn"], (1, 3, 2)):
        ways = {form: by_name[name] for form, by_name in forms.items()}
        found = compare("recurrent pair", sizes, ways, case=name)
        for way in found:
            rate = times * products / (1e-3 * (way.ms or 1))
            way.numbers["TFLOP/s"] = rate / 1e12
            way.numbers["share of a large product's rate"] = rate / product_rate(DTYPE)
        record(*found)
