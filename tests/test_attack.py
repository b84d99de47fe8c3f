"""The attack: bounds, masks, invariance, and that it does flatten the class distribution."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from a2mc_fast.attack import _SPANS, attack_loss, semantic_attack
from a2mc_fast.config import AttackConfig, Config, EncoderConfig
from a2mc_fast.encoders.common import frozen
from a2mc_fast.model import A2MC
from a2mc_fast.skeleton import NTU25

SHAPE = (6, 3, 16, 25, 2)


@pytest.fixture
def model() -> A2MC:
    config = Config(encoder=EncoderConfig(hidden=16, layers=2), precision="fp32")
    model = A2MC(config, NTU25, 2, 10)
    with torch.no_grad():
        model.classifier.weight.mul_(10)  # a confident class layer, as after training
    return model


def clips() -> Tensor:
    x = torch.randn(SHAPE)
    x[1::2, :, :, :, 1] = 0  # one person only
    x[0, :, 5, :, 0] = 0  # absent in one frame
    return x


@pytest.mark.parametrize("scope", list(_SPANS))
@pytest.mark.parametrize("steps", [1, 3])
def test_norm_is_bounded_in_every_scope(model: A2MC, scope: str, steps: int) -> None:
    rho = semantic_attack(model.classify, clips(), scope=scope, steps=steps)  # type: ignore[arg-type]
    norms = torch.linalg.vector_norm(rho, dim=_SPANS[scope])
    limit = min(0.5, 0.1 * 3**0.5) if scope == "joint" and steps == 1 else 0.5
    assert norms.max() <= limit + 1e-6
    assert norms.max() > 0.9 * limit  # and the bound is reached


def test_absent_persons_stay_untouched(model: A2MC) -> None:
    x = clips()
    rho = semantic_attack(model.classify, x)
    assert (rho[1::2, :, :, :, 1] == 0).all() and (rho[0, :, 5, :, 0] == 0).all()
    assert (rho[0, :, 6, :, 0] != 0).any()
    assert (semantic_attack(model.classify, x, mask_absent=False)[1, :, :, :, 1] != 0).any()


def test_early_frames_are_attacked() -> None:
    """A gradient that fades towards the start, as a last-step BiGRU's does, still moves the first frame
    fully."""
    fade = (10.0 ** torch.linspace(-18, -9, 64)).view(64, 1, 1)

    def classify(x: Tensor) -> Tensor:
        return (x * fade).flatten(1)

    x = torch.randn(4, 3, 64, 25, 2)
    rho = semantic_attack(classify, x, objective="logits")
    plain = semantic_attack(classify, x, objective="logits", grad_norm="none")
    norms = torch.linalg.vector_norm(rho, dim=(1, 3))
    torch.testing.assert_close(norms, torch.full_like(norms, 0.5), rtol=1e-3, atol=1e-3)
    assert torch.linalg.vector_norm(plain, dim=(1, 3))[:, 0].max() < 1e-6  # what the normalisation is for


def test_tiny_gradients_survive() -> None:
    """A gradient of 1e-18 still gives a full step; exactly zero gives none."""
    scale = torch.zeros(SHAPE)
    scale[:3] = 1e-18

    def classify(x: Tensor) -> Tensor:
        return (x * scale).flatten(1)

    rho = semantic_attack(classify, torch.randn(SHAPE), objective="logits")
    assert rho[:3].abs().max() > 0.05 and (rho[3:] == 0).all()


def test_it_flattens_the_class_distribution(model: A2MC) -> None:
    """With a small step the distance to uniform falls for at least 95 % of clips; ascending raises it."""
    x = torch.randn(128, 3, 16, 25, 2)
    before = attack_loss(model.classify(x))
    small = {"lr": 0.001, "radius": 0.05}
    after = attack_loss(model.classify(x + semantic_attack(model.classify, x, **small)))
    worse = attack_loss(model.classify(x + semantic_attack(model.classify, x, direction="ascend", **small)))
    assert (after < before).float().mean() >= 0.95
    assert (worse > before).float().mean() >= 0.95


@pytest.mark.parametrize("objective", ["softmax", "logits", "entropy", "cross_entropy"])
def test_objectives_descend(model: A2MC, objective: str) -> None:
    x = torch.randn(64, 3, 16, 25, 2)
    rho = semantic_attack(model.classify, x, objective=objective, lr=0.005, radius=0.05)  # type: ignore[arg-type]
    before, after = (attack_loss(model.classify(c), objective) for c in (x, x + rho))  # type: ignore[arg-type]
    assert after.mean() < before.mean()


def test_clips_do_not_influence_each_other(model: A2MC) -> None:
    x = clips()
    model.train()
    together = model.attack(x)
    alone = torch.cat([model.attack(x[i : i + 1]) for i in range(len(x))])
    # a sign step turns rounding into a full step where a gradient is almost zero
    assert ((together - alone).abs() < 1e-3).float().mean() > 0.999


def test_the_model_is_left_as_it_was(model: A2MC) -> None:
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    model.attack(clips())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())


def test_recurrent_layers_stay_in_training_mode(model: A2MC) -> None:
    """cuDNN has no backward pass for them in inference mode."""
    seen = []
    model.train()
    hooks = [
        m.register_forward_hook(lambda m, *_: seen.append((type(m), m.training)))
        for m in model.query.modules()
        if isinstance(m, nn.GRU | nn.BatchNorm1d)
    ]
    model.attack(clips())
    for hook in hooks:
        hook.remove()
    assert dict(seen) == {nn.GRU: True, nn.BatchNorm1d: False}


def test_prototypes_are_centres_of_the_bank() -> None:
    attack = AttackConfig(classifier="prototypes", feature="head")
    config = Config(encoder=EncoderConfig(hidden=8, layers=1, projection=4), attack=attack)
    model = A2MC(replace(config, precision="fp32"), NTU25, 2, 3)
    corners = torch.eye(3, 4).repeat_interleave(2000, 0)
    model.bank().rows[:6000] = corners + 0.01 * torch.randn(6000, 4)
    model.bank().rows[6000:] = model.bank().rows[torch.randint(0, 6000, (len(model.bank().rows) - 6000,))]
    model.refresh_classifier(0)
    found = {tuple(row.abs().topk(1).indices.tolist()) for row in model.centers}
    torch.testing.assert_close(model.classifier.weight, model.centers / 0.07)
    assert (model.centers @ model.bank().unit().T).amax(0).mean() > 0.65 and len(found) >= 2


def test_pseudo_labels_are_learned(model: A2MC) -> None:
    attack = AttackConfig(classifier="pseudo_labels")
    config = Config(encoder=EncoderConfig(hidden=16, layers=1), attack=attack, precision="fp32")
    model = A2MC(config, NTU25, 2, 4)
    model.refresh_classifier(0)
    x = torch.randn(32, 3, 16, 25, 2)
    with torch.no_grad(), frozen(model.query):
        label = (model.query(x)["feature"] @ model.centers.T).argmax(1)
    before = nn.functional.cross_entropy(model.classify(x), label)
    for _ in range(20):
        model.fit_classifier(x)
    assert nn.functional.cross_entropy(model.classify(x), label) < before
