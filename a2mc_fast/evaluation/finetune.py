"""Protocols that train the encoder: fine-tuning, on all labels, on a share of them, or on another data set.

Encoder and a new linear classifier are trained together in training mode; views are random crops of 50 to
100 %, tests read the centre crop. Everything is a function of the seed. (CMD; the paper's sec. IV-B)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from a2mc_fast import rng
from a2mc_fast.augment import Draws, Views
from a2mc_fast.encoders.branch import Branch
from a2mc_fast.errors import require
from a2mc_fast.evaluation.crops import random_crop
from a2mc_fast.evaluation.protocols import check_classes, encode, labelled_split, training_crops
from a2mc_fast.evaluation.scores import Outcome, Progress
from a2mc_fast.evaluation.settings import Finetune, Semi


def finetune(
    branch: Branch,
    views: Views,
    train: Tensor,
    test: Tensor,
    config: Finetune,
    *,
    progress: Progress = lambda epoch, accuracy: None,
) -> Outcome:
    """Train `branch`, in place, and a new classifier on clips train [n]; test them on clips test [m]."""
    torch.manual_seed(config.seed)  # of dropout; batch order and crops draw from `rng`
    labels, device = views.clips.labels, views.clips.device
    crops = training_crops(views, config.seed)
    classifier = nn.Linear(branch.encoder.feature_dim, views.clips.num_classes)
    generator = torch.Generator().manual_seed(config.seed)
    nn.init.normal_(classifier.weight, std=0.01, generator=generator)
    nn.init.zeros_(classifier.bias)
    classifier.to(device)
    cuda = device.type == "cuda"
    optimizer = torch.optim.SGD(
        [*branch.encoder.parameters(), *classifier.parameters()],
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        fused=cuda,
    )
    for group in optimizer.param_groups if config.momentum else ():
        for parameter in group["params"]:
            # torch would leave it unwritten if fp16 skips the first step
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    scaler = torch.amp.GradScaler("cuda", enabled=cuda and branch.config.precision == "fp16")
    outcome = Outcome(labels[test], progress)
    branch.train()
    for epoch in range(config.epochs):
        optimizer.param_groups[0]["lr"] = learning_rate(config, epoch)
        order = train[rng.permutation(config.seed, epoch, rng.STREAM_EVALUATE, len(train), device)]
        draws = crops.draw(epoch, len(train), views=1)[0]
        for batch, values in zip(order.split(config.batch_size), draws.values.split(config.batch_size)):
            feature = branch.feature(random_crop(crops, batch, Draws(values)))
            loss = F.cross_entropy(classifier(feature.float()), labels[batch])
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if config.tests_after(epoch):
            with torch.no_grad():
                outcome.test(epoch + 1, classifier(encode(branch, crops, test)))
    outcome.weight, outcome.bias = classifier.weight.detach(), classifier.bias.detach()
    return outcome


def semi_supervised(
    branch: Branch,
    views: Views,
    split: str,
    config: Semi,
    *,
    begins: Callable[[str, int], Progress] = lambda what, seed: lambda epoch, accuracy: None,
) -> Iterator[tuple[float, int, list[Outcome]]]:
    """Fine-tune copies of `branch` on shares of the training clips. `begins` hears of each training, and with
    which seed, and gives what hears of its tests.

    Yields (share, training clips, one outcome per seed). All subsets are drawn and checked before the first
    training.
    """
    train, test = labelled_split(views, split)
    labels, seeds = views.clips.labels, range(config.seed, config.seed + config.seeds)
    subsets = {}
    for share in config.fractions:
        for seed in seeds:
            chosen = train[subset(labels[train], share, seed, stratified=not config.unstratified)]
            where = (
                f"{100 * share:g} % of the {len(train)} training clips of protocol {split!r} (seed {seed})"
            )
            require(len(chosen) > 0, f"{where} is no clip at all: raise --fractions")
            check_classes(views, chosen, test, where, config.allow_missing)
            subsets[share, seed] = chosen
    for share in config.fractions:
        outcomes = []
        for seed in seeds:
            chosen = subsets[share, seed]
            progress = begins(f"{100 * share:g} % of the labels, {len(chosen)} training clips", seed)
            seeded = replace(config, seed=seed)
            outcomes.append(finetune(_copied(branch), views, chosen, test, seeded, progress=progress))
        yield share, len(chosen), outcomes


def learning_rate(config: Finetune, epoch: int) -> float:
    """Of one epoch, counted from 0: a linear rise over the warm-up epochs, a tenth after each milestone."""
    rise = min(1.0, (epoch + 1) / config.warmup_epochs) if config.warmup_epochs else 1.0
    return config.lr * rise * 0.1 ** config.drops(epoch)


def subset(labels: Tensor, share: float, seed: int, *, stratified: bool = True) -> Tensor:
    """Places of a share of the clips, ascending, as a function of the seed. labels [n] from 0 -> [k]

    Stratified: round(share n_c) clips of each class c (AimCLR); otherwise the first int(share n) of a shuffle
    (CMD). Larger shares of one seed contain the smaller ones.
    """
    order = rng.permutation(seed, 0, rng.STREAM_SUBSET, len(labels), labels.device)
    if not stratified:
        return order[: int(len(labels) * share)].sort().values
    classes = [order[labels[order] == label] for label in labels.unique()]
    return torch.cat([clips[: round(share * len(clips))] for clips in classes]).sort().values


def _copied(branch: Branch) -> Branch:
    """A copy with weights of its own."""
    copied = copy.deepcopy(branch)
    for module in copied.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # copied one by one, they would be joined again in every pass
    return copied
