"""Settings of the evaluation protocols, with the values of the papers they come from. Nothing imports torch.

`lr 0` stands for the learning rate that is customary for the encoder: its owners tuned it on their features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from a2mc_fast.errors import require

_LINEAR_LR = {
    "bigru": 0.1,
    "scd": 0.1,
    "stgcn": 3.0,
    "dsta": 3.0,
}  # CMD, SCD-Net with its head, AimCLR, HiCLR


@dataclass(frozen=True, kw_only=True)
class _Training:
    """What every protocol that trains a classifier asks for."""

    epochs: int = 80
    """Passes over the training clips."""
    milestones: tuple[int, ...] = (50, 70)
    """Epochs after which the learning rate drops tenfold."""
    batch_size: int = 64
    """Clips per step; the last batch of an epoch may be smaller."""
    momentum: float = 0.9
    """Momentum of SGD."""
    validate_every: int = 5
    """Epochs between tests; the last epoch always tests."""
    seed: int = 0
    """Seed of the classifier, its batch order and crops."""
    allow_missing: bool = False
    """Accept test classes without a training clip; they cannot be recognised."""

    def __post_init__(self) -> None:
        require(self.epochs >= 1, f"epochs must be >= 1, got {self.epochs}")
        require(self.batch_size >= 1, f"batch-size must be >= 1, got {self.batch_size}")
        require(0 <= self.momentum < 1, f"momentum must be in [0, 1), got {self.momentum}")
        require(self.validate_every >= 1, f"validate-every must be >= 1, got {self.validate_every}")
        require(0 <= self.seed < 2**63, f"seed must be in 0 .. 2^63 - 1, got {self.seed}")

    def drops(self, epoch: int) -> int:
        """Milestones passed before this epoch, counted from 0."""
        return sum(epoch >= milestone for milestone in self.milestones)


@dataclass(frozen=True, kw_only=True)
class LinearConfig(_Training):
    """Linear evaluation (the paper's sec. IV-B; CMD, ISC): SGD without weight decay."""

    lr: float = 0.0
    """Learning rate; 0 = the encoder's: 0.1 for bigru and scd, 3 for stgcn and dsta."""
    crop: Literal["random", "center"] = "random"
    """Training clips: `random` crops of 50 to 100 %, encoded anew every epoch, or the `center` crop, once."""
    cache: bool = True
    """Center crop: encode once. Without, every epoch encodes again, to the same bits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lr >= 0, f"lr must be > 0, or 0 for the encoder's, got {self.lr}")
        require(self.crop in ("random", "center"), f"crop must be random or center, got {self.crop!r}")

    def learning_rate(self, encoder: str) -> float:
        """The rate of the first epochs for an encoder of this name."""
        return self.lr or _LINEAR_LR[encoder]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(_Training):
    """Encoder and classifier trained together (the paper's sec. IV-B on transfer; CMD)."""

    lr: float = 0.01
    """Learning rate of encoder and classifier."""
    weight_decay: float = 0.0
    """Weight decay."""
    nesterov: bool = False
    """Nesterov's momentum."""
    warmup_epochs: int = 0
    """Epochs over which the learning rate rises linearly from 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lr > 0, f"lr must be > 0, got {self.lr}")
        require(self.weight_decay >= 0, f"weight-decay must be >= 0, got {self.weight_decay}")
        require(self.warmup_epochs >= 0, f"warmup-epochs must be >= 0, got {self.warmup_epochs}")
        require(not (self.nesterov and self.momentum == 0), "nesterov needs momentum > 0")


@dataclass(frozen=True, kw_only=True)
class SemiConfig(FinetuneConfig):
    """Fine-tuning on a share of the labels, several times (CMD; stratified as AimCLR)."""

    fractions: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2)
    """Shares of the training clips."""
    seeds: int = 5
    """Subsets per share, from `seed` on; each trains once."""
    unstratified: bool = False
    """Take the first int(N share) clips of a shuffle, as CMD does, instead of a share of every class."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.fractions) > 0, "fractions must name at least one share")
        require(
            all(0 < share <= 1 for share in self.fractions),
            f"fractions must be in (0, 1], got {self.fractions}",
        )
        require(self.seeds >= 1, f"seeds must be >= 1, got {self.seeds}")
