"""Protocols on a frozen encoder: kNN, which is retrieval, and linear evaluation, all on the device.

Downstream tasks use the query encoder's feature before the head. `finetune` trains the encoder too.
Legend: n clips · F feature width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from a2mc_fast import rng
from a2mc_fast.augment import Draws, Views
from a2mc_fast.config import ViewConfig
from a2mc_fast.data import Clips
from a2mc_fast.encoders.branch import Branch
from a2mc_fast.errors import require
from a2mc_fast.evaluation.crops import center_crop, random_crop
from a2mc_fast.evaluation.scores import Outcome, Progress, accuracy
from a2mc_fast.evaluation.settings import LinearConfig

_CHUNK = 256  # clips encoded at a time
_KNN_BUDGET = 2**24  # similarities held at a time


@torch.no_grad()
def encode(branch: Branch, views: Views, index: Tensor, draws: Draws | None = None) -> Tensor:
    """Features in inference mode, of the centre crop or of random crops. index [n] -> [n, F] float32

    Every rank encodes some of the clips, and gets the features of all.
    """

    def crop(place: Tensor) -> Tensor:
        if draws is None:
            return center_crop(views, index[place])
        return random_crop(views, index[place], Draws(draws.values[place]))

    def features(places: Tensor) -> Tensor:
        return torch.cat([branch.feature(crop(place)).float() for place in places.split(_CHUNK)])

    training = branch.training
    branch.eval()
    result = views.world.spread(features, torch.arange(len(index), device=index.device))
    branch.train(training)
    return result


def training_crops(views: Views, seed: int) -> Views:
    """The views that classifiers train on: crops of 50 to 100 % and nothing else. (CMD, ISC)"""
    config = ViewConfig(frames=views.config.frames, min_ratio=0.5)
    return Views(views.clips, config, seed, views.world)


def labelled_split(views: Views, split: str) -> tuple[Tensor, Tensor]:
    """(train, test) clip numbers of a protocol, labelled clips only. `InputError` if a side is empty."""
    return views.clips.labelled(split, "training"), views.clips.labelled(split, "test")


def check_classes(views: Views, train: Tensor, test: Tensor, where: str, allow_missing: bool = False) -> None:
    """`InputError` if a class that is tested has no training clip. train [n], test [m] clip numbers."""
    labels = views.clips.labels
    missing = sorted(set(labels[test].tolist()) - set(labels[train].tolist()))
    shown = ", ".join(class_names(views.clips)[c] for c in missing[:3]) + ", ..." * (len(missing) > 3)
    require(
        allow_missing or not missing,
        f"{where}: {len(missing)} of the tested classes have no training clip ({shown}); "
        "--allow-missing goes on without them",
    )


def class_names(clips: Clips) -> list[str]:
    """A name for every class, the data's own or "class 7"."""
    return list(clips.class_names) or [f"class {number}" for number in range(clips.num_classes)]


def classes_of(clips: Clips) -> list[str]:
    """The class of every clip by its name, "" where it is unknown."""
    names = [*class_names(clips), ""]  # of label -1
    return [names[label] for label in clips.labels.tolist()]


# kNN


def nearest(gallery: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most similar gallery rows of each query, nearest first: cosine similarity and row number, [Q, k].

    gallery [G, F], queries [Q, F]
    """
    require(1 <= k <= len(gallery), f"k must be in 1 .. {len(gallery)} (the gallery's size), got {k}")
    gallery, queries = F.normalize(gallery, dim=1), F.normalize(queries, dim=1)
    parts = [(part @ gallery.T).topk(k, 1) for part in queries.split(max(1, _KNN_BUDGET // len(gallery)))]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def knn(gallery: Tensor, gallery_labels: Tensor, queries: Tensor, k: int = 1) -> Tensor:
    """Labels by cosine similarity: the nearest gallery feature, or the majority of the k nearest.

    gallery [G, F], labels [G], queries [Q, F] -> [Q]. A tie goes to the label of the nearest of the tied.
    """
    labels = gallery_labels[nearest(gallery, queries, k)[1]]
    votes = (labels.unsqueeze(2) == labels.unsqueeze(1)).sum(2)
    return labels.gather(1, votes.argmax(1, keepdim=True)).squeeze(1)


def knn_accuracy(branch: Branch, views: Views, split: str) -> float:
    """kNN accuracy of a protocol in percent: training clips are the gallery, test clips the queries."""
    train, test = labelled_split(views, split)
    labels = views.clips.labels
    predicted = knn(encode(branch, views, train), labels[train], encode(branch, views, test))
    return accuracy(predicted, labels[test])


# linear evaluation


class LinearClassifier:
    """Softmax regression on features, trained by SGD with momentum and no weight decay.

    The gradient is written out, so a step is five small operations: with features encoded once, their launch
    is what training costs. Features [n, F + 1] end in a one, and the weight's last column is the bias.
    """

    def __init__(self, width: int, classes: int, *, momentum: float, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.normal(0.0, 0.01, (classes, width), generator=generator)
        self.weight = F.pad(weight, (0, 1)).to(device)  # [classes, F + 1], the bias starts at 0
        self.velocity = torch.zeros_like(self.weight)
        self.momentum = momentum

    @staticmethod
    def extend(features: Tensor) -> Tensor:
        """[n, F] -> [n, F + 1] with a last column of ones."""
        return F.pad(features, (0, 1), value=1.0)

    def train_epoch(self, features: Tensor, labels: Tensor, *, batch_size: int, lr: float) -> None:
        """One pass over features [n, F + 1] and labels [n] in their order."""
        for x, label in zip(features.split(batch_size), labels.split(batch_size)):
            target = F.one_hot(label, len(self.weight))
            error = self.scores(x).softmax(1).sub_(target)  # the gradient of cross-entropy by the logits
            torch.addmm(self.velocity, error.T, x, beta=self.momentum, alpha=1 / len(x), out=self.velocity)
            self.weight.sub_(self.velocity, alpha=lr)

    def scores(self, features: Tensor) -> Tensor:
        """Logits. [n, F + 1] -> [n, classes]"""
        return features @ self.weight.T


@torch.no_grad()
def linear_evaluation(
    branch: Branch,
    views: Views,
    split: str,
    config: LinearConfig,
    *,
    progress: Progress = lambda epoch, accuracy: None,
) -> Outcome:
    """Train a linear classifier on the frozen encoder."""
    train, test = labelled_split(views, split)
    check_classes(views, train, test, f"protocol {split!r}", config.allow_missing)
    labels, device = views.clips.labels, views.clips.device
    crops = training_crops(views, config.seed)

    def features(index: Tensor, draws: Draws | None = None) -> Tensor:
        return LinearClassifier.extend(encode(branch, crops, index, draws))

    test_features = features(test)
    centered = features(train) if config.crop == "center" else None
    classifier = LinearClassifier(
        test_features.shape[1] - 1,
        views.clips.num_classes,
        momentum=config.momentum,
        seed=config.seed,
        device=device,
    )
    lr = config.learning_rate(branch.config.encoder.name)
    outcome = Outcome(labels[test], progress)
    for epoch in range(config.epochs):
        order = rng.permutation(config.seed, epoch, rng.STREAM_EVALUATE, len(train), device)
        if centered is None:
            batches = features(train[order], crops.draw(epoch, len(train), views=1)[0])
        else:
            batches = centered[order]
        classifier.train_epoch(
            batches, labels[train[order]], batch_size=config.batch_size, lr=lr * 0.1 ** config.drops(epoch)
        )
        if config.tests_after(epoch):
            outcome.test(epoch + 1, classifier.scores(test_features))
    outcome.weight, outcome.bias = classifier.weight[:, :-1], classifier.weight[:, -1]
    return outcome
