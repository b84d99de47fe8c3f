"""The recurrent layers alone: two directions of one layer by cuDNN, and by the fused kernels where they are.

`pytest bench/bench_recurrent.py -s` times the forward pass, forward and backward with all gradients, and with
the input's gradient alone, which is what the attack needs; on a CPU torch's GRU stands for cuDNN's.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bench.harness import CUDA, DEVICE, Form, compare, product_rate, sized
from bench.records import Recorder

FRAMES, WIDTH, HIDDEN = sized((64, 2048, 1024), (64, 128, 64), (3, 16, 8))
DTYPE = torch.bfloat16 if CUDA else torch.float32
CLIPS = sized((64, 192), (64, 192), (2,))

Pair = Callable[[Tensor], Tensor]


def cudnn(pair: nn.ModuleList, x: Tensor) -> Tensor:
    """x [N, T, W] -> [N, T, 2 H]"""
    return torch.cat([gru(x)[0] for gru in pair], 2)


def passes(layer: Pair, x: Tensor, weights: list[Tensor]) -> dict[str, Form]:
    """What a step asks of a layer, by name."""
    watched = x.clone().requires_grad_()
    upstream = torch.randn(len(x), x.shape[1], 2 * HIDDEN, device=x.device, dtype=x.dtype)

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


@pytest.mark.parametrize("clips", CLIPS)
def test_pair_of_directions(record: Recorder, clips: int) -> None:
    torch.manual_seed(0)
    pair = nn.ModuleList(nn.GRU(WIDTH, HIDDEN, batch_first=True) for _ in range(2)).to(DEVICE, DTYPE)
    x = torch.randn(clips, FRAMES, WIDTH, device=DEVICE, dtype=DTYPE)
    weights: list[Tensor] = list(pair.parameters())
    forms = {"cudnn": passes(lambda x: cudnn(pair, x), x, weights)}
    products = 2 * 2 * clips * FRAMES * 3 * HIDDEN * (WIDTH + HIDDEN)  # FLOP of a forward pass
    sizes = {"N": clips, "T": FRAMES, "W": WIDTH, "H": HIDDEN}
    for name, times in zip(forms["cudnn"], (1, 3, 2)):
        found = compare(
            "recurrent pair", sizes, {form: ways[name] for form, ways in forms.items()}, case=name
        )
        for way in found:
            rate = times * products / (1e-3 * (way.ms or 1))
            way.numbers["TFLOP/s"] = rate / 1e12
            way.numbers["share of a large product's rate"] = rate / product_rate(DTYPE)
        record(*found)
