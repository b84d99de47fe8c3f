"""What evaluation asks: settings of the protocols, with the values of the papers they come from, and of which
run. Nothing imports torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from a2mc_fast.config.settings import Device
from a2mc_fast.errors import Count, CountOrNone, Momentum, Range, Rate, Seed, Share, check_ranges, require

_LINEAR_LR = {"stgcn": 3.0, "dsta": 3.0}  # AimCLR, HiCLR; 0.1 by CMD, and by SCD-Net with its head

Classifying = Literal["linear", "finetune", "transfer"]
"""Protocols that leave a classifier."""


@dataclass(frozen=True, kw_only=True)
class OfRun:
    """What every command asks for that opens a run."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Folder of the run, or a checkpoint."""
    data: str = ""
    """Packed clips; empty = the data of the run."""
    split: str = ""
    """Protocol; empty = that of the run."""
    device: Device = "auto"
    """auto = the GPU if there is one."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class Evaluation(OfRun):
    """What every protocol asks for."""

    untrained: bool = False
    """Also evaluate the encoder as it was before training."""
    out: str = ""
    """JSON file to write; empty = RUN/PROTOCOL.json, or beside an older one CHECKPOINT.PROTOCOL.json."""

    @property
    def protocol(self) -> str:
        """Its name on the command line."""
        return type(self).__name__.lower()

    def resolved(self, encoder: str) -> dict[str, Any]:
        """The protocol's own options, as they are used with this encoder."""
        shared = Evaluation.__dataclass_fields__
        return {name: value for name, value in asdict(self).items() if name not in shared}


@dataclass(frozen=True, kw_only=True)
class Knn(Evaluation):
    """k nearest neighbours by cosine similarity, which is retrieval (the paper's Table III)."""

    k: Count = 1
    """Neighbours that vote."""
    neighbours: str = ""
    """List the nearest training clips of every test clip, labelled or not, in this .json or .csv file."""
    top: Count = 5
    """How many to list."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.neighbours or Path(self.neighbours).suffix in (".json", ".csv"),
            f"neighbours must be a .json or .csv file, got {self.neighbours}",
        )


@dataclass(frozen=True, kw_only=True)
class Training:
    """What every protocol that trains a classifier asks for."""

    epochs: Count = 80
    """Passes over the training clips."""
    milestones: tuple[CountOrNone, ...] = (50, 70)
    """Epochs after which the learning rate drops tenfold."""
    batch_size: Count = 64
    """Clips per step; the last batch of an epoch may be smaller."""
    momentum: Momentum = 0.9
    """Momentum of SGD."""
    validate_every: Count = 5
    """Epochs between tests; the last epoch always tests."""
    seed: Seed = 0
    """Seed of the classifier, its batch order and crops."""
    allow_missing: bool = False
    """Accept test classes without a training clip; they cannot be recognised."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def drops(self, epoch: int) -> int:
        """Milestones passed before this epoch, counted from 0."""
        return sum(epoch >= milestone for milestone in self.milestones)

    def tests_after(self, epoch: int) -> bool:
        """Whether this epoch, counted from 0, ends with a test."""
        return (epoch + 1) % self.validate_every == 0 or epoch + 1 == self.epochs


@dataclass(frozen=True, kw_only=True)
class LinearConfig(Training):
    """Linear evaluation (the paper's sec. IV-B; CMD, ISC): SGD without weight decay."""

    lr: Annotated[float, Range("[0, 1000]")] = 0.0
    """Learning rate; 0 = the encoder's: 3 for stgcn and dsta, 0.1 for all others."""
    crop: Literal["random", "center"] = "random"
    """Training clips: `random` crops of 50 to 100 %, encoded anew every epoch, or the `center` crop, once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.crop in ("random", "center"), f"crop must be random or center, got {self.crop!r}")

    def learning_rate(self, encoder: str) -> float:
        """The rate of the first epochs for an encoder of this name."""
        return self.lr or _LINEAR_LR.get(encoder, 0.1)


@dataclass(frozen=True, kw_only=True)
class Linear(LinearConfig, Evaluation):
    """A linear classifier on the frozen encoder (the paper's Table I)."""

    def resolved(self, encoder: str) -> dict[str, Any]:
        return {**super().resolved(encoder), "lr": self.learning_rate(encoder)}


@dataclass(frozen=True, kw_only=True)
class Finetune(Training, Evaluation):
    """Encoder and a new classifier trained on all labels (the paper's Table VII; CMD)."""

    lr: Rate = 0.01
    """Learning rate of encoder and classifier."""
    weight_decay: Share = 0.0
    """Weight decay."""
    nesterov: bool = False
    """Nesterov's momentum."""
    warmup_epochs: CountOrNone = 0
    """Epochs over which the learning rate rises linearly from 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not (self.nesterov and self.momentum == 0), "nesterov needs momentum > 0")


@dataclass(frozen=True, kw_only=True)
class Transfer(Finetune):
    """Fine-tuning on another data set, given by --data (the paper's Table IV)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.data), "transfer needs --data: the packed clips to tune and test on")


@dataclass(frozen=True, kw_only=True)
class Semi(Finetune):
    """Fine-tuning on a share of the labels, mean of several subsets (the paper's Tables VIII and IX; CMD)."""

    fractions: tuple[Annotated[float, Range("(0, 1]")], ...] = (0.01, 0.05, 0.1, 0.2)
    """Shares of the training clips."""
    seeds: Count = 5
    """Subsets per share, from `seed` on; each trains once."""
    unstratified: bool = False
    """Take the first int(N share) clips of a shuffle, as CMD does, instead of a share of every class."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.fractions) > 0, "fractions must name at least one share")


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Weighted sum of saved scores: joint, motion and bone streams (the paper's Tables II and X)."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN")]
    """Folders of the runs, or files of scores."""
    protocol: Classifying = "linear"
    """Whose scores to read from the folders."""
    weights: tuple[Annotated[float, Range("[-1e6, 1e6]")], ...] = ()
    """One weight per run, as 1 1 1 (CMD); by default that of its stream: joint 0.6, motion 0.4, bone 0.6
    (AimCLR)."""
    of: Literal["logits", "softmax"] = "logits"
    """What is summed: raw scores, or class probabilities."""
    out: str = ""
    """JSON file to write; empty = ensemble.json in the first run's folder."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class Compare:
    """One table of many results."""

    results: Annotated[Positional[tuple[Path, ...]], arg(metavar="RESULT")]
    """JSON files that a protocol wrote, or folders of runs: all results in them, or what the run itself says
    if it was never evaluated."""
    out: str = ""
    """Also write the table to this .csv file."""

    def __post_init__(self) -> None:
        require(not self.out or self.out.endswith(".csv"), f"out must be a .csv file, got {self.out}")
