"""What the operations are given, checked, and give back; `reference` needs no more than this and torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

Precision = Literal["tf32", "ieee"]
"""How float32 operands are multiplied: on tensor cores with 10-bit mantissas (as fp16 where unit rows are
weighted), or in full float32."""


class Features(NamedTuple):
    """Unit rows [N, D] of one batch that meet at one bank; weak and strong are absent where not used."""

    key: Tensor  # f0
    basic: Tensor  # f3
    weak: Tensor | None = None  # f1
    strong: Tensor | None = None  # f2

    def detach(self) -> Features:
        return Features(*(None if f is None else f.detach() for f in self))  # type: ignore[arg-type]


class Contrast(NamedTuple):
    """How features are contrasted with a bank (A²MC Eq. 8-11)."""

    mix: Sequence[float] = (0.4, 0.3, 0.2, 0.1)  # shares λ of the positive in the mixed banks
    temperature: float = 0.07  # τ
    distill: bool = True  # L2 pulls f2's distribution to f3's; else it is a contrast like L1
    normalize: bool = False  # the bank's rows are raw: it is their unit rows that count
    precision: Precision = "tf32"  # of the kernels alone
    climb: float = 0.0  # the ascent's τ, where its sums shall come of the same pass; 0 where they need not

    def numbers(self) -> list[float]:
        """The same as an operation of torch's can take it."""
        flags = (self.distill, self.normalize, self.precision == "ieee")
        return [self.temperature, self.climb, *map(float, flags), *self.mix]


def contrast_from(numbers: Sequence[float]) -> Contrast:
    """What `Contrast.numbers` has told."""
    temperature, climb, distill, normalize, exact, *mix = numbers
    precision: Precision = "ieee" if exact else "tf32"
    return Contrast(tuple(mix), temperature, bool(distill), bool(normalize), precision, climb)


class Contrasted(NamedTuple):
    """What features and bank say of each other."""

    losses: Tensor  # [3] batch means of L3, L1 and L2, of basic, weak and strong; zero where a term is off
    sums: Tensor | None = None  # what normalises the softmaxes of an ascent at the temperature `climb`


class Step(NamedTuple):
    """How a bank's rows climb (Eq. 7, with AdCo's momentum and weight decay)."""

    lr: float = 3.0  # β
    momentum: float = 0.9
    weight_decay: float = 1e-4
    weight: float = 1.0  # of the batch's mean loss in what they climb


class Ascent(NamedTuple):
    """What one ascent did, as scalars on the device."""

    row_norm: Tensor  # mean norm of the rows before the step
    movement: Tensor  # mean distance that a unit row moved
    negatives: Tensor  # softmax share of the negatives, mean over the clips of basic


def require(condition: bool, message: str, error: type[Exception] = ValueError) -> None:
    """Raise `error(message)` unless `condition` holds."""
    if not condition:
        raise error(message)


def check_arguments(name: str, features: Features, bank: Tensor, settings: Contrast) -> None:
    """Shapes and ranges of an operation on features [N, D] and bank rows [K, D]; no tensor value is read."""
    like = features.key.shape
    require(
        len(like) == bank.ndim == 2 and like[1] == bank.shape[1] and min(*like, len(bank)) > 0,
        f"{name}: expected key [N, D] and bank [K, D], got {list(like)} and {list(bank.shape)}",
    )
    for other, feature in features._asdict().items():
        if feature is not None:
            require(feature.shape == like, f"{name}: {other} is {list(feature.shape)}, key is {list(like)}")
    require(settings.temperature > 0, f"{name}: temperature must be > 0, got {settings.temperature}")
    in_range = all(0 < share < 1 for share in settings.mix)
    require(in_range, f"{name}: mix must lie in (0, 1), got {tuple(settings.mix)}")
