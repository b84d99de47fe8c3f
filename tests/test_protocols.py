"""Protocols as functions: kNN, linear evaluation, fine-tuning, subsets of labels, scores and their sums."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from a2mc_fast import rng
from a2mc_fast.augment import Draws, Views
from a2mc_fast.config import EncoderConfig, ViewConfig, demo
from a2mc_fast.data import Clips
from a2mc_fast.encoders.branch import Branch
from a2mc_fast.encoders.build import build_branch
from a2mc_fast.evaluation.crops import center_crop, random_crop
from a2mc_fast.evaluation.finetune import finetune, learning_rate, semi_supervised, subset
from a2mc_fast.evaluation.protocols import (
    LinearClassifier,
    encode,
    knn,
    labelled_split,
    linear_evaluation,
    nearest,
    training_crops,
)
from a2mc_fast.evaluation.scores import (
    About,
    Outcome,
    Scores,
    accuracy,
    details,
    weighted_sum,
)
from a2mc_fast.evaluation.settings import Finetune, LinearConfig, Semi
from tests.conftest import SMALL

CLASSES = 4


def class_clips(count: int = 48, classes: int = CLASSES) -> Clips:
    """Clips whose class is a constant offset of all joints, so that it can be learned; every fourth is a test
    clip."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.arange(count) % 7 + 10
    labels = torch.arange(count) % classes
    joints = torch.randn(int(lengths.sum()), 1, SMALL.num_joints, 3, generator=generator) * 0.1
    first = 0
    for length, label in zip(lengths.tolist(), labels.tolist()):
        joints[first : first + length, :, :, label % 3] += 2.0 * (label // 3 + 1)
        first += length
    split = torch.arange(count) // classes % 4 != 3
    return Clips.pack(joints, lengths.numpy(), labels.numpy(), SMALL, splits={"xsub": split.numpy()})


def small_branch(seed: int = 0, **encoder: Any) -> Branch:
    encoder = {"layers": 1, "hidden": 8, "projection": 16, **encoder}
    config = replace(demo(), encoder=EncoderConfig(**encoder), views=ViewConfig(frames=8))
    torch.manual_seed(seed)
    return build_branch(config, SMALL, 1)


@pytest.fixture
def views() -> Views:
    return Views(class_clips(), ViewConfig(frames=8), 0)


def state(branch: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in branch.state_dict().items()}


def same(before: dict[str, Tensor], branch: nn.Module) -> bool:
    return all(torch.equal(before[name], value) for name, value in branch.state_dict().items())


# kNN


def test_knn_by_hand() -> None:
    gallery = torch.tensor([[1.0, 0], [0, 2], [3, 0.1], [-1, 0]])
    labels = torch.tensor([0, 1, 2, 1])
    queries = torch.tensor([[5.0, 0], [0.1, 9], [1, 1]])
    assert knn(gallery, labels, queries).tolist() == [0, 1, 2]
    assert knn(gallery, labels, queries, k=4).tolist() == [1, 1, 1]  # the majority of all
    with pytest.raises(ValueError, match=r"k must be in 1 \.\. 4"):
        knn(gallery, labels, queries, k=5)


def test_knn_equals_scikit_learn() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    gallery, queries, labels = torch.randn(200, 16), torch.randn(150, 16), torch.randint(0, 7, (200,))
    expected = KNeighborsClassifier(1, metric="cosine").fit(gallery, labels).predict(queries)
    assert knn(gallery, labels, queries).tolist() == expected.tolist()


def test_nearest_are_the_most_similar_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("a2mc_fast.evaluation.protocols._KNN_BUDGET", 60)  # several parts
    gallery, queries = torch.randn(20, 6), torch.randn(11, 6)
    similarity, rows = nearest(gallery, queries, 3)
    expected = F.cosine_similarity(queries.unsqueeze(1), gallery.unsqueeze(0), dim=2)
    torch.testing.assert_close(similarity, expected.sort(1, descending=True).values[:, :3])
    torch.testing.assert_close(expected.gather(1, rows), similarity)


# features


def test_encoding_does_not_depend_on_the_batch(views: Views) -> None:
    branch = small_branch()
    together = encode(branch, views, torch.arange(40))
    torch.testing.assert_close(encode(branch, views, torch.tensor([7])), together[7:8])
    assert branch.training and together.grad_fn is None


def test_random_crops_are_those_of_the_draws(views: Views, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("a2mc_fast.evaluation.protocols._CHUNK", 5)
    branch, crops, index = small_branch(), training_crops(views, 3), torch.arange(12)
    draws = crops.draw(2, 12, views=1)[0]
    got = encode(branch, crops, index, draws)
    branch.eval()
    for clip in range(12):
        one = branch.feature(random_crop(crops, index[clip : clip + 1], Draws(draws.values[clip : clip + 1])))
        torch.testing.assert_close(got[clip : clip + 1], one)
    assert not torch.allclose(got, encode(branch, crops, index))
    assert (crops.config.min_ratio, crops.config.frames) == (0.5, 8)


# linear evaluation


def test_classifier_takes_the_steps_of_sgd_on_cross_entropy() -> None:
    """Written-out gradients against autograd and torch's optimizer, with a drop and a smaller last batch."""
    x, y = torch.randn(23, 6), torch.randint(0, 5, (23,))
    ours = LinearClassifier(6, 5, momentum=0.9, seed=1, device=torch.device("cpu"))
    plain = nn.Linear(6, 5)
    with torch.no_grad():
        plain.weight.copy_(ours.weight[:, :-1])
        plain.bias.zero_()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5, momentum=0.9)
    assert 0.003 < ours.weight[:, :-1].std() < 0.03 and not ours.weight[:, -1].any()
    for lr in (0.5, 0.5, 0.05):
        ours.train_epoch(LinearClassifier.extend(x), y, batch_size=8, lr=lr)
        optimizer.param_groups[0]["lr"] = lr
        for features, labels in zip(x.split(8), y.split(8)):
            optimizer.zero_grad()
            F.cross_entropy(plain(features), labels).backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, torch.cat((plain.weight, plain.bias.unsqueeze(1)), 1))
    torch.testing.assert_close(ours.scores(LinearClassifier.extend(x)), plain(x))


@pytest.mark.parametrize("crop", ["random", "center"])
def test_linear_evaluation_learns_and_leaves_the_encoder_alone(views: Views, crop: str) -> None:
    branch = small_branch()
    before, tested = state(branch), []
    config = LinearConfig(epochs=60, milestones=(50,), batch_size=8, crop=crop, validate_every=25)  # type: ignore[arg-type]
    result = linear_evaluation(branch, views, "xsub", config, progress=lambda e, a: tested.append((e, a)))
    assert result.last >= 90 and result.best == max(a for _, a in tested) and result.last == tested[-1][1]
    assert [epoch for epoch, _ in tested] == [25, 50, 60]
    assert same(before, branch)
    _, test = labelled_split(views, "xsub")
    assert accuracy(result.predicted, views.clips.labels[test]) == result.last


def test_the_centre_crop_is_encoded_once(views: Views, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass over the training clips instead of one per epoch, and others than the random crops."""
    branch, encoded = small_branch(), []

    def counted(branch: Branch, views: Views, index: Tensor, draws: Draws | None = None) -> Tensor:
        encoded.append(len(index))
        return encode(branch, views, index, draws)

    monkeypatch.setattr("a2mc_fast.evaluation.protocols.encode", counted)
    config = LinearConfig(epochs=6, batch_size=8, crop="center", validate_every=2)
    once = linear_evaluation(branch, views, "xsub", config)
    assert sorted(encoded) == [12, 36]
    random = linear_evaluation(branch, views, "xsub", replace(config, crop="random"))
    assert len(encoded) == 2 + 1 + 6 and not torch.equal(once.scores, random.scores)


def test_learning_rate_is_the_encoders_unless_given() -> None:
    rates = {name: LinearConfig().learning_rate(name) for name in ("bigru", "scd", "stgcn", "dsta")}
    assert rates == {"bigru": 0.1, "scd": 0.1, "stgcn": 3.0, "dsta": 3.0}
    assert LinearConfig(lr=0.7).learning_rate("stgcn") == 0.7


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"epochs": 0}, r"epochs must be in \[1, 1e6\]"),
        ({"lr": -1.0}, r"lr must be in \[0, 1000\]"),
        ({"crop": "middle"}, "crop must be random or center"),
        ({"momentum": 1.0}, "momentum must be in"),
        ({"validate_every": 0}, "validate_every must be in"),
    ],
)
def test_settings_are_checked(setting: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LinearConfig(**setting)  # type: ignore[arg-type]


# fine-tuning


def test_finetuning_learns_changes_the_encoder_and_repeats(views: Views) -> None:
    train, test = labelled_split(views, "xsub")
    config = Finetune(run=Path(), epochs=15, milestones=(12,), batch_size=8, lr=0.1)

    def run(**settings: int) -> tuple[Branch, Outcome]:
        branch = small_branch()
        return branch, finetune(branch, views, train, test, replace(config, **settings))

    assert run()[1].last >= 90
    (branch, first), (again, second), (_, other) = run(epochs=1), run(epochs=1), run(epochs=1, seed=1)
    assert torch.equal(first.scores, second.scores) and same(state(branch), again)
    assert not torch.equal(first.scores, other.scores)
    before = dict(small_branch().named_parameters())
    changed = {name: not torch.equal(p, before[name]) for name, p in branch.named_parameters()}
    assert all(changed[name] == name.startswith("encoder.") for name in changed)  # the head stays


def test_finetuning_takes_a_clip_alone(views: Views) -> None:
    """As the last batch of an epoch may be, which has no batch statistics to normalise a feature by."""
    train, test = labelled_split(views, "xsub")
    config = Finetune(run=Path(), epochs=2, batch_size=len(train) - 1)
    branch = small_branch(pool="mean+last+std", feature_norm=True)
    assert finetune(branch, views, train, test, config).scores.isfinite().all()


def test_finetuning_repeats_with_dropout(views: Views) -> None:
    train, test = labelled_split(views, "xsub")

    def run(generator: int) -> Tensor:
        branch = small_branch()

        class Dropped(nn.Module):
            feature_dim, feature_norm = branch.encoder.feature_dim, None

            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Tensor, views: int = 1) -> Tensor:
                return F.dropout(self.inner(x, views), 0.5, self.training)

        branch.encoder = Dropped(branch.encoder)  # type: ignore[assignment]
        torch.manual_seed(generator)  # wherever torch's own generator stands
        return finetune(branch, views, train, test, Finetune(run=Path(), epochs=2, batch_size=8)).scores

    assert torch.equal(run(1), run(2))


def test_finetuning_takes_plain_steps(views: Views) -> None:
    """One epoch against a loop written with autograd and single clips' views."""
    train, test = labelled_split(views, "xsub")
    config = Finetune(run=Path(), epochs=1, batch_size=10, lr=0.05, weight_decay=0.01, nesterov=True, seed=4)
    branch, plain = small_branch(), small_branch()
    scores = finetune(branch, views, train, test, config).scores

    crops, count = training_crops(views, 4), len(train)
    order = rng.permutation(4, 0, rng.STREAM_EVALUATE, count, torch.device("cpu"))
    draws = crops.draw(0, count, views=1)[0].values
    clips = torch.cat(
        [random_crop(crops, train[o].view(1), Draws(draws[i : i + 1])) for i, o in enumerate(order)]
    )
    head = nn.Linear(plain.encoder.feature_dim, CLASSES)
    nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(4))
    nn.init.zeros_(head.bias)
    weights = [*plain.encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(weights, 0.05, 0.9, weight_decay=0.01, nesterov=True)
    for x, y in zip(clips.split(10), views.clips.labels[train[order]].split(10)):
        optimizer.zero_grad()
        F.cross_entropy(head(plain.feature(x)), y).backward()
        optimizer.step()
    plain.eval()
    torch.testing.assert_close(scores, head(plain.feature(center_crop(views, test))).detach())


def test_learning_rate_rises_and_drops() -> None:
    config = Finetune(run=Path(), lr=0.1, warmup_epochs=4, milestones=(6, 8))
    rates = [learning_rate(config, epoch) for epoch in (0, 1, 3, 5, 6, 7, 8, 79)]
    assert rates == pytest.approx([0.025, 0.05, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_a_loss_that_is_not_finite_stops_the_training(views: Views) -> None:
    train, test = labelled_split(views, "xsub")
    config = Finetune(run=Path(), epochs=1, batch_size=2, lr=1000, weight_decay=1)
    with pytest.raises(ValueError, match="scores are not finite after epoch 1: lower --lr"):
        finetune(small_branch(), views, train, test, config)


# shares of labels


def test_stratified_subsets() -> None:
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate((100, 37, 250, 14))])
    labels = labels[torch.randperm(len(labels))]
    chosen = [subset(labels, share, seed=3) for share in (0.05, 0.1, 0.2, 1.0)]
    assert torch.bincount(labels[chosen[1]]).tolist() == [10, 4, 25, 1]
    assert torch.bincount(labels[chosen[0]]).tolist() == [5, 2, 12, 1]
    assert chosen[3].tolist() == list(range(len(labels)))
    for small, large in itertools.pairwise(chosen):
        assert set(small.tolist()) <= set(large.tolist())
    assert torch.equal(chosen[1], subset(labels, 0.1, seed=3))
    assert not torch.equal(chosen[1], subset(labels, 0.1, seed=4))


def test_unstratified_subsets_are_the_first_of_a_shuffle() -> None:
    labels = torch.arange(1000) % 7
    small, large = (subset(labels, share, seed=0, stratified=False) for share in (0.05, 0.2))
    assert (len(small), len(large)) == (50, 200) and set(small.tolist()) <= set(large.tolist())
    order = rng.permutation(0, 0, rng.STREAM_SUBSET, 1000, "cpu")
    assert set(small.tolist()) == set(order[:50].tolist())


def test_every_clip_is_equally_likely_to_be_chosen() -> None:
    labels = torch.tensor([0] * 20 + [1] * 10)
    times = torch.zeros(30)
    for seed in range(600):
        times[subset(labels, 0.3, seed)] += 1
    assert ((times - 180).abs() < 5 * (600 * 0.3 * 0.7) ** 0.5).all()  # five standard deviations


def test_semi_supervised_trains_copies_and_checks_first(views: Views) -> None:
    branch = small_branch()
    before = state(branch)
    config = Semi(run=Path(), fractions=(0.25, 0.5), seeds=2, epochs=2, batch_size=8)
    results = list(semi_supervised(branch, views, "xsub", config))
    # of nine clips per class: round(2.25) and round(4.5), to even as Python and numpy do
    assert [(share, clips, len(outcomes)) for share, clips, outcomes in results] == [
        (0.25, 8, 2),
        (0.5, 16, 2),
    ]
    assert same(before, branch)
    again = list(semi_supervised(branch, views, "xsub", config))
    for (_, _, a), (_, _, b) in zip(results, again):
        assert all(torch.equal(x.scores, y.scores) for x, y in zip(a, b))
        assert not torch.equal(a[0].scores, a[1].scores)
    train, test = labelled_split(views, "xsub")
    chosen = train[subset(views.clips.labels[train], 0.5, seed=1)]
    alone = finetune(small_branch(), views, chosen, test, replace(config, seed=1))
    assert torch.equal(alone.scores, results[1][2][1].scores)

    def untouched(*args: object) -> None:
        raise AssertionError("trained before all subsets were checked")

    for settings, words in (
        ({"fractions": (0.5, 0.01)}, "1 % of the 36 training clips .* is no clip at all: raise --fractions"),
        (
            {"fractions": (0.5, 0.06), "unstratified": True},
            "of the tested classes have no training clip .*--allow-missing",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            for _ in semi_supervised(branch, views, "xsub", replace(config, **settings), begins=untouched):
                pass
    lenient = replace(config, fractions=(0.06,), unstratified=True, allow_missing=True)
    assert next(semi_supervised(branch, views, "xsub", lenient))[1] == 2


def test_classes_without_training_clips_are_named(views: Views) -> None:
    views.clips.splits = {"xsub": views.clips.splits["xsub"] & (views.clips.labels != 2)}
    with pytest.raises(ValueError, match=r"1 of the tested classes have no training clip \(class 2\)"):
        linear_evaluation(small_branch(), views, "xsub", LinearConfig(epochs=1))
    config = LinearConfig(epochs=1, allow_missing=True)
    assert linear_evaluation(small_branch(), views, "xsub", config).scores.shape == (21, CLASSES)


# scores


def test_confusion_by_hand_and_by_scikit_learn() -> None:
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.metrics import confusion_matrix as expected

    truth, predicted = torch.tensor([0, 0, 1, 3]), torch.tensor([0, 1, 1, 0])
    found = details(predicted, truth, 4)
    assert found["confusion"] == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert found["per_class"] == [50.0, 100.0, None, 0.0] and found["top1_macro"] == 50.0
    many = details(predicted, truth, 60_000)  # whose matrix would take 29 GB
    assert "confusion" not in many and many["top1_macro"] == 50.0
    truth, predicted = torch.randint(0, 5, (200,)), torch.randint(0, 5, (200,))
    found = details(predicted, truth, 5)
    assert found["confusion"] == expected(truth, predicted).tolist()
    assert found["top1_macro"] == pytest.approx(100 * balanced_accuracy_score(truth, predicted))
    assert accuracy(predicted, truth) == pytest.approx(np.trace(found["confusion"]) / 2)


def test_scores_survive_the_file_and_add_up(tmp_path: Path) -> None:
    about = About(
        protocol="linear", run="r", data="d", split="s", stream="joint", encoder="e", class_names=["x"] * 3,
        identity="i",
    )  # fmt: skip
    labels, clips, names = torch.randint(0, 3, (9,)), torch.arange(9) * 2, tuple("abcdefghi")
    streams = []
    for name in "jmb":
        here = About(**{**about, "run": name})  # type: ignore[typeddict-item]
        made = Scores(scores=torch.randn(9, 3), labels=labels, clips=clips, names=names, about=here)
        made.save(tmp_path / f"{name}.safetensors")
        streams.append(Scores.load(tmp_path / f"{name}.safetensors"))
        assert torch.equal(streams[-1].scores, made.scores) and streams[-1].about["run"] == name
    j, m, b = (s.scores for s in streams)
    torch.testing.assert_close(weighted_sum(streams, (0.6, 0.4, 0.6)), 0.6 * j + 0.4 * m + 0.6 * b)
    torch.testing.assert_close(
        weighted_sum(streams, (1, 2, 3), "softmax"), j.softmax(1) + 2 * m.softmax(1) + 3 * b.softmax(1)
    )
    with pytest.raises(ValueError, match="2 weights for 3 runs"):
        weighted_sum(streams, (1, 2))
    for other in (
        replace(streams[1], clips=clips + 1),
        replace(streams[1], labels=(labels + 1) % 3),
        replace(streams[1], scores=torch.randn(9, 4)),
        replace(streams[1], names=names[::-1]),
        replace(streams[1], about={**streams[1].about, "identity": "j"}),
    ):
        with pytest.raises(ValueError, match="j and m were not tested on the same clips"):
            weighted_sum([streams[0], other], (1, 1))
    with pytest.raises(ValueError, match="not finite: lower --weights"):
        weighted_sum([replace(streams[0], scores=torch.full((9, 3), 3e38))] * 2, (1, 1))
    (tmp_path / "j.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"j\.safetensors is damaged"):
        Scores.load(tmp_path / "j.safetensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scores": torch.tensor([[0.0, torch.nan]])}, "a score is not finite"),
        ({"scores": torch.tensor([[0.0, torch.inf]])}, "a score is not finite"),
        ({"scores": torch.zeros(1, 2, dtype=torch.float64)}, "must be float32"),
        ({"scores": torch.zeros(0, 2)}, r"\[0, 2\] scores"),
        ({"scores": torch.zeros(1, 60_000)}, r"\[1, 60000\] scores, .* 2 classes"),
        ({"labels": torch.tensor([60_000_000])}, "a label is not of its 2 classes"),
        ({"labels": torch.tensor([-1])}, "a label is not of its 2 classes"),
        ({"labels": torch.tensor([0, 1])}, r"\[2\] labels"),
        ({"clips": torch.tensor([1.0])}, "must be float32"),
        ({"names": '["a", "b"]'}, "2 names"),
        ({"names": "[[]]"}, r"names\[0\] must be str"),
        ({"names": "NaN"}, "names is not JSON"),
        ({"stream": "sum"}, "stream must be one of joint, motion, bone, got 'sum'"),
        ({"class_names": 2}, "class_names must be a list"),
        ({"run": None}, "about.run must be str, got None"),
    ],
    ids=str,
)
def test_scores_that_lie_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    about = dict.fromkeys(("protocol", "run", "data", "split", "encoder", "identity"), "x")
    tensors = {"scores": torch.zeros(1, 2), "labels": torch.tensor([1]), "clips": torch.tensor([7])}
    whole = {"names": '["a"]', **about, "stream": "bone", "class_names": ["a", "b"], **tensors}
    for changed in ({}, changes):
        content = {**whole, **changed}
        header = {"format": "a2mc-scores/2", "names": content.pop("names")}
        tensors = {name: content.pop(name) for name in tensors}
        save_file(tensors, tmp_path / "s", {**header, "about": json.dumps(content)})
        if not changed:
            assert len(Scores.load(tmp_path / "s").scores) == 1
    with pytest.raises(ValueError, match=words):
        Scores.load(tmp_path / "s")
