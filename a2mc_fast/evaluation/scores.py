"""What a protocol leaves behind: accuracies, the confusion matrix, and the test clips' scores in a file.

Streams that were trained apart can be added up later (`weighted_sum`). Accuracies are in percent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from safetensors.torch import save_file
from torch import Tensor

from a2mc_fast.errors import require
from a2mc_fast.evaluation.settings import Classifying
from a2mc_fast.files import atomic_path, parse_json, read_tensors, typed

FORMAT = "a2mc-scores/2"
_MATRIX = 1000  # classes up to which a result holds the counts of every pair


Progress = Callable[[int, float], None]
"""What hears of each test in a training: (epoch, accuracy)."""


class Outcome:
    """How a classifier did on the test clips [n], of these labels; only a test waits for the device."""

    best: float = 0.0
    """Highest accuracy over the tests during training, as CMD and ISC report it."""
    last: float = 0.0
    """After the last epoch."""
    scores: Tensor
    """Logits of the test clips after the last epoch, [n, classes] float32."""
    weight: Tensor
    """Of the classifier after the last epoch, [classes, F]."""
    bias: Tensor
    """[classes]"""

    def __init__(self, labels: Tensor, progress: Progress) -> None:
        self.labels, self.progress = labels, progress

    def test(self, epoch: int, scores: Tensor) -> None:
        """A test after `epoch` epochs. scores [n, classes]; `InputError` if they are not finite."""
        finite = bool(torch.isfinite(scores).all())
        require(finite, f"the classifier's scores are not finite after epoch {epoch}: lower --lr")
        self.scores = scores
        self.last = accuracy(self.predicted, self.labels)
        self.best = max(self.best, self.last)
        self.progress(epoch, self.last)

    @property
    def predicted(self) -> Tensor:
        """Labels after the last epoch, [n]."""
        return self.scores.argmax(1)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of correct labels, in percent."""
    return 100 * (predicted == labels).double().mean().item()


def details(predicted: Tensor, labels: Tensor, classes: int) -> dict[str, Any]:
    """What a result's JSON says beside its accuracy, of predicted [n] and labels [n].

    Each class's accuracy in percent (None without test clips), their mean, and, up to a thousand classes, the
    counts: row = true class, column = predicted class.
    """
    total = torch.bincount(labels, minlength=classes)
    right = torch.bincount(labels[predicted == labels], minlength=classes)
    share = 100 * right.double() / total.clamp_min(1)
    per_class = [value if count else None for value, count in zip(share.tolist(), total.tolist())]
    known = [value for value in per_class if value is not None]
    found: dict[str, Any] = {"top1_macro": sum(known) / len(known), "per_class": per_class}
    if classes <= _MATRIX:
        counts = torch.bincount(labels * classes + predicted, minlength=classes * classes)
        found["confusion"] = counts.view(classes, classes).tolist()
    return found


def write_tensors(path: Path, form: str, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """A safetensors file of the format `form`, its header as JSON, whole or not at all."""
    text = {"format": form, **{name: json.dumps(value) for name, value in header.items()}}
    with atomic_path(path) as temporary:
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, temporary, metadata=text)


class About(TypedDict):
    """Where scores come from."""

    protocol: str
    run: str
    data: str
    split: str
    stream: Literal["joint", "motion", "bone"]
    encoder: str
    class_names: list[str]
    identity: str
    """Of the data, as `Clips.identity` tells it."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Saved scores of one run and protocol."""

    scores: Tensor
    """[n, classes] float32."""
    labels: Tensor
    """[n] int64."""
    clips: Tensor
    """Numbers of the clips in their data file, [n] int64."""
    names: tuple[str, ...]
    """Their names, [n]."""
    about: About

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        tensors = {"scores": self.scores.float(), "labels": self.labels, "clips": self.clips}
        write_tensors(path, FORMAT, {"names": self.names, "about": self.about}, tensors)

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read the file. `InputError` says what is wrong with it."""
        header, tensors = read_tensors(path, FORMAT, "a file of scores")
        missing = {"scores", "labels", "clips", "names", "about"} - {*header, *tensors}
        require(not missing, f"{path} has no {', '.join(sorted(missing))}")
        about: About = typed(parse_json(header["about"], f"{path}: about"), About, f"{path}: about")
        names = typed(parse_json(header["names"], f"{path}: names"), tuple[str, ...], f"{path}: names")
        scores, labels, clips = (tensors[name] for name in ("scores", "labels", "clips"))
        require(
            scores.ndim == 2
            and labels.shape == clips.shape == scores.shape[:1] == (len(names),)
            and scores.shape[1] == len(about["class_names"])
            and scores.numel() > 0,
            f"{path}: {list(scores.shape)} scores, {list(labels.shape)} labels, {list(clips.shape)} clips, "
            f"{len(names)} names, {len(about['class_names'])} classes",
        )
        kinds = (scores.dtype, labels.dtype, clips.dtype)
        require(
            kinds == (torch.float32, torch.int64, torch.int64),
            f"{path}: scores, labels and clips must be float32, int64 and int64, got {kinds}",
        )
        require(bool(scores.isfinite().all()), f"{path}: a score is not finite")
        require(
            int(labels.min()) >= 0 and int(labels.max()) < scores.shape[1],
            f"{path}: a label is not of its {scores.shape[1]} classes",
        )
        return cls(scores=scores, labels=labels, clips=clips, names=names, about=about)


def beside(run: Path, protocol: Classifying, what: Literal["scores", "classifier"]) -> Path:
    """The file that a protocol left in a run's folder, or the one that is named itself.

    `FileNotFoundError`, with what makes it, where it is missing.
    """
    path = run / f"{protocol}.{what}.safetensors" if run.is_dir() else run
    if not path.is_file():
        made = f"python -m a2mc_fast.evaluate {protocol} {run if run.is_dir() else run.parent}"
        raise FileNotFoundError(f"{path} not found; make it with: {made}")
    return path


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
            and other.about["identity"] == first.about["identity"]
            and other.names == first.names
            and torch.equal(other.clips, first.clips)
            and torch.equal(other.labels, first.labels)
        )
        require(
            same,
            f"{first.about['run']} and {other.about['run']} were not tested on the same clips "
            f"({_tested(first)}; {_tested(other)}): evaluate both on one --data and --split",
        )
    parts = [s.scores.softmax(1) if of == "softmax" else s.scores for s in streams]
    total = torch.stack([weight * part for weight, part in zip(weights, parts)]).sum(0)
    require(bool(total.isfinite().all()), "the sum of these scores is not finite: lower --weights")
    return total


def _tested(s: Scores) -> str:
    return f"{len(s.scores)} clips of {s.scores.shape[1]} classes, {s.about['data']} {s.about['split']}"
