"""Loss with gradients: the single pass against whole logits and against the literal mixed banks.

`pytest bench/bench_losses.py` measures all three in one run at the paper's size (N 64, K 16,384, D 128, four
mixing shares) and holds the promises: a hundred times faster than the literal form, and less than 150 MB of
memory beyond the inputs.
"""

from __future__ import annotations

import functools
import multiprocessing
import statistics
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from a2mc_fast.kernels import reference
from a2mc_fast.kernels.problem import Contrast, Features
from torch import Tensor

from bench.baselines import literal_mixing_contrast, whole_logits_mixing_contrast
from bench.harness import compare, seconds
from bench.records import Record, Recorder

N, K, D = 64, 16384, 128
MIX, TEMPERATURE = (0.4, 0.3, 0.2, 0.1), 0.07
SIZES = {"N": N, "K": K, "mix": len(MIX)}

Loss = Callable[..., tuple[Tensor, Tensor, Tensor]]


def ours(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """L3, L1, L2 in one pass over the bank, batch means."""
    *features, bank, mix, temperature = args
    found = reference.mixing_contrast(Features(*features), bank, Contrast(mix, temperature))
    basic, weak, strong = found.losses.unbind()
    return basic, weak, strong


FORMS: dict[str, Loss] = {
    "ours": ours,
    "whole logits": whole_logits_mixing_contrast,
    "literal": literal_mixing_contrast,
}


def inputs() -> tuple[list[Tensor], Tensor]:
    """Key, basic, weak, strong [N, D] and bank [K, D]: unit rows; the anchors need gradients."""
    generator = torch.Generator().manual_seed(0)
    key, *anchors = (F.normalize(torch.randn(N, D, generator=generator), dim=1) for _ in range(4))
    return [key, *(a.requires_grad_() for a in anchors)], F.normalize(
        torch.randn(K, D, generator=generator), dim=1
    )


def gradients(loss: Loss) -> list[Tensor]:
    """Gradients of L with respect to the three anchors."""
    features, bank = inputs()
    total = sum(loss(*features, bank, MIX, TEMPERATURE), start=torch.zeros(()))
    return list(torch.autograd.grad(total, features[1:]))


def test_the_forms_agree() -> None:
    """The gate: no speed is worth reporting if the results differ."""
    expected = gradients(whole_logits_mixing_contrast)
    for got, want in zip(gradients(ours), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


def test_loss_and_gradients(record: Recorder) -> None:
    forms = {form: functools.partial(gradients, FORMS[form]) for form in ("ours", "whole logits")}
    record(*compare("loss with gradients on all cores", SIZES, forms))


def test_a_hundred_times_faster_than_literal(record: Recorder) -> None:
    """The literal form takes half a minute and 11 GB, so it runs once."""
    literal = seconds(gradients, FORMS["literal"])
    once = statistics.median(seconds(gradients, ours) for _ in range(5))
    for form, time in (("ours", once), ("literal", literal)):
        record(Record(what="loss with gradients and literal banks", form=form, sizes=SIZES, ms=1e3 * time))
    print(f"\nours {1e3 * once:.1f} ms, literal {literal:.1f} s: {literal / once:.0f} times faster")
    assert literal / once >= 100


def _status(field: str) -> int:
    """A field of this process's memory status, in bytes (Linux)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def _peak(connection: Connection, form: str) -> None:
    """In a fresh process: how far its memory rises above inputs and libraries, in bytes."""
    small = [F.normalize(torch.randn(4, D), dim=1).requires_grad_() for _ in range(4)]
    loss = FORMS[form]
    sum(loss(*small, torch.randn(64, D), MIX, TEMPERATURE), start=torch.zeros(())).backward()
    features, bank = inputs()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    total = sum(loss(*features, bank, MIX, TEMPERATURE), start=torch.zeros(()))
    torch.autograd.grad(total, features[1:])
    connection.send(_status("VmHWM") - before)


def test_peak_memory(record: Recorder) -> None:
    for form in ("ours", "whole logits"):
        receive, send = multiprocessing.get_context("spawn").Pipe(False)
        process = multiprocessing.get_context("spawn").Process(target=_peak, args=(send, form))
        process.start()
        extra = receive.recv()
        process.join()
        record(Record(what="memory of the loss and its gradients", form=form, sizes=SIZES, MiB=extra / 2**20))
        print(f"\n{form}: {extra / 1e6:.0f} MB beyond the inputs")
        assert form != "ours" or extra < 150e6
