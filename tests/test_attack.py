"""The attack: bounds, masks, invariance, and that it does flatten the class distribution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from a2mc_fast.attack import attack_loss, semantic_attack
from a2mc_fast.config import Config, EncoderConfig
from a2mc_fast.model import A2MC
from a2mc_fast.skeleton import NTU25

SHAPE = (6, 16, 3, 25, 2)


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
    x[0, 5, :, :, 0] = 0  # absent in one frame
    return x


def test_norm_is_bounded_per_person_and_frame(model: A2MC) -> None:
    rho = semantic_attack(model.classify, clips())
    norms = torch.linalg.vector_norm(rho, dim=(2, 3))
    assert norms.max() <= 0.5 + 1e-6
    assert norms.max() > 0.45  # and the bound is reached


def test_absent_persons_stay_untouched(model: A2MC) -> None:
    x = clips()
    rho = semantic_attack(model.classify, x)
    assert (rho[1::2, :, :, :, 1] == 0).all() and (rho[0, 5, :, :, 0] == 0).all()
    assert (rho[0, 6, :, :, 0] != 0).any()


def test_early_frames_are_attacked() -> None:
    """A gradient that fades towards the start, as a last-step BiGRU's does, still moves the first frame
    fully."""
    fade = (10.0 ** torch.linspace(-18, -9, 64)).view(64, 1, 1, 1)

    confident = torch.randn(64 * 3 * 25 * 2)

    def classify(x: Tensor) -> Tensor:
        return confident + (x * fade).flatten(1)

    rho = semantic_attack(classify, torch.randn(4, 64, 3, 25, 2))
    norms = torch.linalg.vector_norm(rho, dim=(2, 3))
    torch.testing.assert_close(norms, torch.full_like(norms, 0.5), rtol=1e-3, atol=1e-3)


def test_tiny_gradients_survive() -> None:
    """A gradient of 1e-18 still gives a full step; exactly zero gives none."""
    scale = torch.zeros(SHAPE)
    scale[:3] = 1e-18
    confident = torch.randn(scale[0].numel())

    def classify(x: Tensor) -> Tensor:
        return confident + (x * scale).flatten(1)

    rho = semantic_attack(classify, torch.randn(SHAPE))
    assert rho[:3].abs().max() > 0.05 and (rho[3:] == 0).all()


def test_it_flattens_the_class_distribution(model: A2MC) -> None:
    """With a small step the distance to uniform falls for at least 95 % of clips, and rises against it."""
    x = torch.randn(128, 16, 3, 25, 2)
    before = attack_loss(model.classify(x))
    rho = semantic_attack(model.classify, x, lr=0.001, radius=0.05)
    after, worse = (attack_loss(model.classify(x + sign * rho)) for sign in (1, -1))
    assert (after < before).float().mean() >= 0.95
    assert (worse > before).float().mean() >= 0.95


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
