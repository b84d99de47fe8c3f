"""Evaluation protocols as functions of a frozen encoder and clips, all on the device.

Downstream tasks use the query encoder's feature before the head. Legend: n clips · F feature width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from a2mc_fast import rng
from a2mc_fast.augment import Views
from a2mc_fast.config import ViewConfig
from a2mc_fast.distributed import ALONE, World
from a2mc_fast.errors import require
from a2mc_fast.model import Branch

_CHUNK = 256  # clips encoded at a time
_KNN_BUDGET = 2**24  # similarities held at a time


@torch.no_grad()
def encode(branch: Branch, views: Views, index: Tensor) -> Tensor:
    """Features of the centre crop, in inference mode. index [n] -> [n, F] float32"""
    training = branch.training
    branch.eval()
    features = [branch.feature(views.centered(part)).float() for part in index.split(_CHUNK)]
    branch.train(training)
    return torch.cat(features)


def knn(gallery: Tensor, gallery_labels: Tensor, queries: Tensor, k: int = 1) -> Tensor:
    """Labels by cosine similarity: the nearest gallery feature, or the majority of the k nearest.

    gallery [G, F], labels [G], queries [Q, F] -> [Q]. A tie goes to the label of the nearest of the tied.
    """
    require(1 <= k <= len(gallery), f"k must be in 1 .. {len(gallery)} (the gallery's size), got {k}")
    gallery, queries = F.normalize(gallery, dim=1), F.normalize(queries, dim=1)
    labels = []
    for part in queries.split(max(1, _KNN_BUDGET // len(gallery))):
        neighbours = gallery_labels[(part @ gallery.T).topk(k, 1).indices]  # [q, k], nearest first
        votes = (neighbours.unsqueeze(2) == neighbours.unsqueeze(1)).sum(2)
        labels.append(neighbours.gather(1, votes.argmax(1, keepdim=True)).squeeze(1))
    return torch.cat(labels)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of correct labels, in percent."""
    return 100 * (predicted == labels).float().mean().item()


def knn_accuracy(branch: Branch, views: Views, split: str, k: int = 1, world: World = ALONE) -> float:
    """kNN accuracy of a protocol in percent: training clips are the gallery, test clips the queries.

    Every rank encodes some of the clips.
    """
    train, test = labelled_split(views, split)
    labels = views.clips.labels
    gallery, queries = (
        world.spread(lambda part: encode(branch, views, part), index) for index in (train, test)
    )
    predicted = knn(gallery, labels[train], queries, k)
    return accuracy(predicted, labels[test])


def labelled_split(views: Views, split: str) -> tuple[Tensor, Tensor]:
    """(train, test) clip numbers of a protocol, labelled clips only. `InputError` if a side is empty."""
    labels = views.clips.labels
    train, test = (index[labels[index] >= 0] for index in views.clips.split(split))
    require(len(train) > 0, f"protocol {split!r} has no labelled training clips")
    require(len(test) > 0, f"protocol {split!r} has no labelled test clips")
    return train, test


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """Linear evaluation (the paper's sec. IV-B; CMD, ISC)."""

    epochs: int = 80
    """Passes over the training clips."""
    lr: float = 0.1
    """Learning rate of the classifier."""
    milestones: tuple[int, ...] = (50, 70)
    """Epochs after which it drops tenfold."""
    batch_size: int = 64
    """Clips per step."""
    crop: Literal["random", "center"] = "random"
    """Training clips: `random` crops of 50 to 100 %, encoded anew every epoch, or the `center` crop, once."""
    validate_every: int = 5
    """Epochs between tests; the last epoch always tests."""
    seed: int = 0
    """Seed of the classifier, its batch order and crops."""

    def __post_init__(self) -> None:
        require(self.epochs >= 1, f"epochs must be >= 1, got {self.epochs}")
        require(self.lr > 0, f"lr must be > 0, got {self.lr}")
        require(self.batch_size >= 1, f"batch-size must be >= 1, got {self.batch_size}")
        require(self.crop in ("random", "center"), f"crop must be random or center, got {self.crop!r}")
        require(self.validate_every >= 1, f"validate-every must be >= 1, got {self.validate_every}")


@dataclass(frozen=True, kw_only=True)
class LinearResult:
    """Accuracies in percent."""

    best: float
    """Highest over the tests during training, as CMD and ISC report it."""
    last: float
    """After the last epoch."""
    predicted: Tensor
    """Labels of the test clips after the last epoch, [n]."""


def linear_evaluation(
    branch: Branch,
    views: Views,
    split: str,
    config: LinearConfig,
    *,
    progress: Callable[[int, float], None] = lambda epoch, accuracy: None,
) -> LinearResult:
    """Train a linear classifier on the frozen encoder. `progress` hears of each test: (epoch, accuracy)."""
    branch.eval()
    train, test = labelled_split(views, split)
    labels = views.clips.labels
    device = views.clips.device
    test_features = encode(branch, views, test)
    cached = encode(branch, views, train) if config.crop == "center" else None
    crops = Views(views.clips, ViewConfig(frames=views.config.frames, min_ratio=0.5), config.seed)

    generator = torch.Generator().manual_seed(config.seed)
    classifier = nn.Linear(test_features.shape[1], views.clips.num_classes)
    nn.init.normal_(classifier.weight, std=0.01, generator=generator)
    nn.init.zeros_(classifier.bias)
    classifier.to(device)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=config.lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(config.milestones))

    best, last, predicted = 0.0, 0.0, test
    for epoch in range(config.epochs):
        order = rng.permutation(config.seed, epoch, rng.STREAM_EVALUATE, len(train), device)
        for number, batch in enumerate(order.split(config.batch_size)):
            if cached is not None:
                features = cached[batch]
            else:
                draws = crops.draw(epoch * len(train) + number, len(batch), views=1)[0]
                with torch.no_grad():
                    features = branch.feature(crops.cropped(train[batch], draws)).float()
            loss = F.cross_entropy(classifier(features), labels[train[batch]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        if (epoch + 1) % config.validate_every == 0 or epoch + 1 == config.epochs:
            with torch.no_grad():
                predicted = classifier(test_features).argmax(1)
            last = accuracy(predicted, labels[test])
            best = max(best, last)
            progress(epoch + 1, last)
    return LinearResult(best=best, last=last, predicted=predicted)
