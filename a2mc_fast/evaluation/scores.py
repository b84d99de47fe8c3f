"""What a protocol leaves behind: accuracies, the confusion matrix, and the test clips' scores in a file.

Scores are logits [n, classes] float32 of the test clips. Their safetensors file also holds the clips' labels
and numbers, so that streams trained apart can be added up later (`weighted_sum`). Accuracies are in percent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from a2mc_fast.errors import InputError, require
from a2mc_fast.files import atomic_path

FORMAT = "a2mc-scores/1"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a classifier did on the test clips; accuracies in percent."""

    best: float
    """Highest over the tests during training, as CMD and ISC report it."""
    last: float
    """After the last epoch."""
    scores: Tensor
    """Logits of the test clips after the last epoch, [n, classes] float32."""
    weight: Tensor
    """Of the classifier after the last epoch, [classes, F]."""
    bias: Tensor
    """[classes]"""

    @property
    def predicted(self) -> Tensor:
        """Labels after the last epoch, [n]."""
        return self.scores.argmax(1)


class Validation:
    """Gathers the tests of one training into an `Outcome`; only they wait for the device."""

    def __init__(self, labels: Tensor, progress: Callable[[int, float], None]) -> None:
        self.labels, self.progress = labels, progress
        self.best = self.last = 0.0
        self.scores = labels.new_zeros(0)

    def add(self, epoch: int, scores: Tensor) -> None:
        """A test after `epoch` epochs. scores [n, classes]"""
        require(
            bool(torch.isfinite(scores).all()),
            f"the classifier's scores are not finite after epoch {epoch}: lower --lr",
        )
        self.scores = scores
        self.last = accuracy(scores.argmax(1), self.labels)
        self.best = max(self.best, self.last)
        self.progress(epoch, self.last)

    def outcome(self, weight: Tensor, bias: Tensor) -> Outcome:
        return Outcome(best=self.best, last=self.last, scores=self.scores, weight=weight, bias=bias)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of correct labels, in percent."""
    return 100 * (predicted == labels).double().mean().item()


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts, row = true class, column = predicted class. [n], [n] -> int64 [classes, classes]"""
    counts = torch.bincount(labels * classes + predicted, minlength=classes * classes)
    return counts.view(classes, classes)


def per_class(confusion: Tensor) -> list[float | None]:
    """Accuracy of each class in percent; None for a class without test clips."""
    total = confusion.sum(1)
    share = 100 * confusion.diagonal().double() / total.clamp_min(1)
    return [value if count else None for value, count in zip(share.tolist(), total.tolist())]


def details(confusion: Tensor) -> dict[str, Any]:
    """What a result's JSON says beside its accuracy: the mean over classes, each class, and the matrix."""
    classes = per_class(confusion)
    known = [value for value in classes if value is not None]
    return {
        "top1_macro": sum(known) / len(known),
        "per_class": classes,
        "confusion": confusion.tolist(),
    }


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Saved scores of one run and protocol."""

    scores: Tensor
    """[n, classes] float32."""
    labels: Tensor
    """[n] int64."""
    clips: Tensor
    """Numbers of the clips in their data file, [n] int64."""
    about: dict[str, Any]
    """JSON: protocol, run, data, split, stream, encoder, class_names."""

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        tensors = {"scores": self.scores.float(), "labels": self.labels, "clips": self.clips}
        header = {"format": FORMAT, "about": json.dumps(self.about)}
        with atomic_path(path) as temporary:
            save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, temporary, metadata=header)

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read a file that `save` wrote; `InputError` says what is wrong with it."""
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                header = file.metadata() or {}
                require(header.get("format") == FORMAT, f"{path} is not a file of scores ({FORMAT})")
                scores, labels, clips = (file.get_tensor(name) for name in ("scores", "labels", "clips"))
            about = json.loads(header["about"])
        except SafetensorError as error:
            raise InputError(f"{path} is damaged or not a safetensors file ({error})") from None
        except (KeyError, json.JSONDecodeError) as error:
            raise InputError(f"{path} is not a complete file of scores ({error!r})") from None
        require(
            scores.ndim == 2 and labels.shape == clips.shape == scores.shape[:1],
            f"{path}: {list(scores.shape)} scores, {list(labels.shape)} labels, {list(clips.shape)} clips",
        )
        return cls(scores=scores, labels=labels, clips=clips, about=about)


def weighted_sum(
    streams: Sequence[Scores], weights: Sequence[float], of: Literal["logits", "softmax"] = "logits"
) -> Tensor:
    """Weighted sum of the streams' scores, or of their class probabilities. -> [n, classes]

    `InputError` if the streams were not tested on the same clips. (AimCLR, HiCLR: raw logits, 0.6 joint + 0.4
    motion + 0.6 bone)
    """
    require(len(streams) == len(weights), f"{len(weights)} weights for {len(streams)} runs")
    first = streams[0]
    for other in streams[1:]:
        same = (
            other.scores.shape == first.scores.shape
            and torch.equal(other.clips, first.clips)
            and torch.equal(other.labels, first.labels)
        )
        require(
            same,
            f"{first.about['run']} and {other.about['run']} were not tested on the same clips "
            f"({_tested(first)}; {_tested(other)}): evaluate both on one --data and --split",
        )
    parts = [s.scores.softmax(1) if of == "softmax" else s.scores for s in streams]
    return torch.stack([weight * part for weight, part in zip(weights, parts)]).sum(0)


def _tested(s: Scores) -> str:
    return f"{len(s.scores)} clips of {s.scores.shape[1]} classes, {s.about['data']} {s.about['split']}"
