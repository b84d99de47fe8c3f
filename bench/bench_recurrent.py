"""The recurrent layers alone: by cuDNN, by fused kernels, and by those with a forward pass in one launch.

`pytest bench/bench_recurrent.py -s` times two directions of one layer: the forward pass, forward and backward
with all gradients, and with the input's gradient alone, which is what the attack needs. Then all passes of a
step through an encoder's layers, with the weights cast as a step casts them. On a CPU torch's GRU stands for
cuDNN's.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from a2mc_fast.config import preset
from a2mc_fast.encoders.bigru import BiGRU
from a2mc_fast.encoders.branch import weights_held
from a2mc_fast.encoders.recurrence import Recurrence, step_passes
from a2mc_fast.skeleton import NTU25
from bench.harness import CUDA, DEVICE, TOY, Form, compare, compiled_all, product_rate, sized
from bench.records import Recorder

if TYPE_CHECKING:
    from a2mc_fast.kernels.gru_plan import Form as Kind

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


def by_kernels(pair: nn.ModuleList, x: Tensor, kind: Kind = "fused") -> dict[str, Form]:
    """The same by the fused kernels, time first as they want it; weights are cast beforehand."""
    from a2mc_fast.kernels.gru import gru_pair, make_operands

    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    weights = [getattr(gru, name).detach().clone() for name in names for gru in pair]
    operands = make_operands(weights, x.dtype)
    sequence = x.transpose(0, 1).contiguous()

    def layer(sequence: Tensor) -> Tensor:
        return gru_pair(sequence, weights, operands, form=kind)

    return passes(layer, sequence, weights)


@pytest.mark.parametrize("clips", CLIPS)
def test_pair_of_directions(record: Recorder, clips: int) -> None:
    torch.manual_seed(0)
    pair = nn.ModuleList(nn.GRU(WIDTH, HIDDEN, batch_first=True) for _ in range(2)).to(DEVICE)
    x = torch.randn(clips, FRAMES, WIDTH, device=DEVICE, dtype=DTYPE)
    forms = {"cudnn": by_cudnn(pair, x)}
    if KERNELS:
        forms = {"ours": by_kernels(pair, x), **forms}
        if CUDA:
            forms["resident"] = by_kernels(pair, x, "resident")
        for one in forms.keys() - {"cudnn"}:
            mine, theirs = (forms[name]["forward"]() for name in (one, "cudnn"))
            assert isinstance(mine, Tensor) and isinstance(theirs, Tensor)
            worst = ((mine.transpose(0, 1) - theirs).float().norm() / theirs.float().norm()).item()
            assert worst < 2e-2, f"{one} differs by {worst:.1e}: no speed for it"
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


@pytest.mark.parametrize(
    "layers, hidden",
    [(sized(3, 3, 1), HIDDEN), (1, HIDDEN // 4), (1, sized(64, 64, 8))],
    ids=["paper", "large set", "own"],
)
def test_passes_of_a_step(record: Recorder, layers: int, hidden: int) -> None:
    """Key, attack and query, as `a2mc_fast.encoders.recurrence` times them to choose."""
    config = preset("ntu60-xsub")
    if not CUDA:
        config = replace(config, precision="fp32")
    encoder = BiGRU(NTU25, hidden=hidden, layers=layers).to(DEVICE)
    clips = CLIPS[0]
    single, triple = (torch.randn(n, FRAMES, encoder.input_dim, device=DEVICE) for n in (clips, 3 * clips))
    wanted: dict[str, Recurrence] = {"cudnn": "torch"}
    if KERNELS:
        wanted = {"ours": "fused", **wanted, **({"resident": "resident"} if CUDA else {})}

    def run(form: Recurrence) -> None:
        encoder.recurrence = form
        with weights_held(encoder):
            step_passes(config, encoder, single, triple, form)()

    forms: dict[str, Form] = {name: lambda form=form: run(form) for name, form in wanted.items()}  # type: ignore[misc]
    for way in forms.values():
        way()
    compiled_all()
    sizes = {"N": clips, "T": FRAMES, "H": hidden, "layers": layers}
    record(*compare("recurrent layers of a step", sizes, forms, case=f"H {hidden}"))
