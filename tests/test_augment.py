"""Views against a slow restatement per clip, published numbers, and purity in (seed, step)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch

from a2mc_fast import augment, rng
from a2mc_fast.augment import (
    Draws,
    Views,
    crop_positions,
    resize_positions,
    spatial,
)
from a2mc_fast.config import ViewConfig
from a2mc_fast.data import Clips
from a2mc_fast.evaluation.crops import center_positions, random_crop
from a2mc_fast.skeleton import NTU25

MIRROR = torch.tensor(NTU25.mirror)


def draws_of(values: np.ndarray) -> Draws:
    return Draws(torch.from_numpy(values.astype(np.float32)))


def slow_crop(clip: np.ndarray, u: np.ndarray, config: ViewConfig, rho: np.ndarray | None) -> np.ndarray:
    """Crop-resize of one clip [T, C, V, M] by scalar loops; rho [T', C, V, M] is added before the crop."""
    n, frames = len(clip), config.frames
    ratio = config.min_ratio + (1 - config.min_ratio) * float(u[0])
    span = min(max(int(n * ratio), frames), n)
    start = int(float(u[1]) * (n - span + 1))
    out = np.zeros((frames, *clip.shape[1:]))
    for t in range(frames):
        p = min(max((t + 0.5) * span / frames - 0.5, 0), span - 1) + start
        i = math.floor(p)
        j = min(i + 1, n - 1)
        out[t] = (1 - (p - i)) * clip[i] + (p - i) * clip[j]
        if rho is not None:
            q = min(max((p + 0.5) * len(rho) / n - 0.5, 0), len(rho) - 1)
            i = math.floor(q)
            j = min(i + 1, len(rho) - 1)
            out[t] += (1 - (q - i)) * rho[i] + (q - i) * rho[j]
    return out


def slow_spatial(
    x: np.ndarray, u: np.ndarray, noise: np.ndarray, strong: bool, config: ViewConfig
) -> np.ndarray:
    """The spatial operations of one clip [T, C, V, M], one after another, as the paper lists them."""
    x = x.copy()
    frames, _, joints, persons = x.shape
    matrix = 2 * u[4:13].reshape(3, 3) - 1
    if u[2] < 0.5:
        for v in np.argsort(-u[24:])[: round(config.jitter * joints)]:
            for t in range(frames):
                for m in range(persons):
                    x[t, :, v, m] = 0 if u[3] < 0.5 else matrix @ x[t, :, v, m]
    else:
        shear = matrix * config.shear
        np.fill_diagonal(shear, 1)
        x = np.einsum("cd,tdvm->tcvm", shear, x)
    if not strong:
        return x
    if u[13] < config.strong_p:
        x = x[:, :, list(NTU25.mirror)]
    main = int(3 * u[15])
    angles = [math.radians(30 if axis == main else 1) * u[16 + axis] for axis in range(3)]
    (a, b, c) = angles
    rx = np.array([[1, 0, 0], [0, math.cos(a), math.sin(a)], [0, -math.sin(a), math.cos(a)]])
    ry = np.array([[math.cos(b), 0, -math.sin(b)], [0, 1, 0], [math.sin(b), 0, math.cos(b)]])
    rz = np.array([[math.cos(c), math.sin(c), 0], [-math.sin(c), math.cos(c), 0], [0, 0, 1]])
    rows = x.transpose(0, 2, 3, 1)  # row vectors: x' = x R^T, about x, then y, then z
    x = (rows @ rx.T @ ry.T @ rz.T).transpose(0, 3, 1, 2)
    if u[19] < config.strong_p:
        x = x + config.noise_std * noise
    if u[20] < config.strong_p:
        sigma = 0.1 + 1.9 * u[21]
        taps = np.array([math.exp(-(k**2) / (2 * sigma**2)) for k in range(-7, 8)])
        padded = np.pad(x, ((7, 7), (0, 0), (0, 0), (0, 0)))
        x = sum(tap * padded[k : k + frames] for k, tap in enumerate(taps))
    if u[22] < config.strong_p:
        x[:, int(3 * u[23])] = 0
    return x


@pytest.mark.parametrize("attacked", [False, True])
@pytest.mark.parametrize("config", [ViewConfig(), ViewConfig(frames=10, jitter=0.3)])
def test_views_equal_the_slow_restatement(
    make_clips: Callable[..., Clips], config: ViewConfig, attacked: bool
) -> None:
    """Many draws, so that every branch of every operation is taken."""
    lengths = [5, 64, 100, 299, 71, 130, 3, 90] * 4
    clips = make_clips(lengths)
    views = Views(clips, config, seed=1)
    index = torch.arange(len(lengths))
    rho = 0.1 * torch.randn(len(lengths), config.frames, 3, 25, 2) if attacked else None
    choices = views.draw(7, len(lengths), views=1)[0]
    x = clips.read(index, crop_positions(choices, clips.lengths, config))
    position = crop_positions(choices, clips.lengths, config)
    if rho is not None:
        from a2mc_fast.augment import _resample

        x = x + _resample(rho, position, clips.lengths)
    noise = torch.randn(x.shape)
    weak = spatial(x, "weak", choices, None, config, MIRROR)
    strong = spatial(x, "strong", choices, noise, config, MIRROR)
    first = 0
    taken = set()
    for n, length in enumerate(lengths):
        clip = clips.frames[first : first + length].double().numpy()
        first += length
        u = choices.values[n].double().numpy()
        perturbation = None if rho is None else rho[n].numpy()
        cropped = slow_crop(clip, u, config, perturbation)
        np.testing.assert_allclose(x[n].numpy(), cropped, atol=2e-4)
        for got, is_strong in ((weak, False), (strong, True)):
            expected = slow_spatial(cropped, u, noise[n].numpy(), is_strong, config)
            np.testing.assert_allclose(got[n].numpy(), expected, atol=2e-3, rtol=1e-4)
        taken.add((u[2] < 0.5, u[3] < 0.5, u[13] < 0.5, u[20] < 0.5, u[22] < 0.5))
    assert len(taken) > 10


def test_make_is_crop_then_spatial(make_clips: Callable[..., Clips]) -> None:
    clips = make_clips([80, 120, 200])
    views = Views(clips, ViewConfig(), 3)
    index = torch.tensor([2, 0])
    choices = views.draw(5, 2, views=1)[0]
    x = random_crop(views, index, choices)
    expected = spatial(x, "weak", choices, None, views.config, MIRROR)
    torch.testing.assert_close(views.make(index, "weak", choices, 5), expected)
    rho = torch.ones(2, 64, 3, 25, 2)
    shifted = spatial(x + 1, "weak", choices, None, views.config, MIRROR)  # a constant stays one, resampled
    torch.testing.assert_close(views.make(index, "weak", choices, 5, rho), shifted, rtol=1e-4, atol=1e-4)


def test_view_without_augmentation_is_the_whole_clip(make_clips: Callable[..., Clips]) -> None:
    clips = make_clips([64, 200])
    views = Views(clips, ViewConfig(), 0)
    choices = views.draw(0, 1, views=1)[0]
    rho = torch.randn(1, 64, 3, 25, 2)
    whole = views.make(torch.tensor([0]), "none", choices, 0)
    torch.testing.assert_close(whole[0], clips.frames[:64])
    torch.testing.assert_close(views.make(torch.tensor([0]), "none", choices, 0, rho), whole + rho)


def test_views_are_a_function_of_seed_and_step(make_clips: Callable[..., Clips]) -> None:
    clips = make_clips([80, 120, 200])
    index = torch.tensor([0, 1, 2])

    def view(seed: int, step: int | torch.Tensor) -> torch.Tensor:
        views = Views(clips, ViewConfig(), seed)
        return views.make(index, "strong", views.draw(step, 3, views=1)[0], step)

    base = view(1, 5)
    assert torch.equal(base, view(1, 5)) and torch.equal(base, view(1, torch.tensor(5)))
    assert not torch.equal(base, view(1, 6)) and not torch.equal(base, view(2, 5))
    a, b = Views(clips, ViewConfig(), 1).draw(5, 3, views=2)
    assert not torch.equal(a.values, b.values)


@pytest.mark.parametrize(
    "count, frames, expected",
    [(10, 4, [0.75, 3.25, 5.75, 8.25]), (3, 8, [0, 0.0625, 0.4375, 0.8125, 1.1875, 1.5625, 1.9375, 2])],
)
def test_interpolation_golden(count: int, frames: int, expected: list[float]) -> None:
    got = resize_positions(torch.tensor([0]), torch.tensor([count]), frames)  # of the numbers 0, 1, 2, ...
    torch.testing.assert_close(got, torch.tensor([expected]))


@pytest.mark.parametrize("length, start, end", [(30, 0, 30), (64, 1, 63), (100, 2, 98), (300, 7, 293)])
def test_centre_crop_golden(length: int, start: int, end: int) -> None:
    got = center_positions(torch.tensor([length]), 64)
    torch.testing.assert_close(got, resize_positions(torch.tensor([start]), torch.tensor([end - start]), 64))


@pytest.mark.parametrize(
    "length, full, mean",
    [
        (60, 1.0, 60.0),
        (72, 0.892, 64.4),
        (85, 0.737, 66.7),
        (100, 0.614, 70.9),
        (150, 0.371, 91.0),
        (300, 0.128, 166.9),
    ],
)
def test_crop_length_statistics(length: int, full: float, mean: float) -> None:
    """Chance of a crop of min(64, n) frames, and the mean length; 20,000 draws err by less than these
    margins."""
    config = ViewConfig()
    choices = Draws(rng.uniform(0, 0, rng.STREAM_VIEWS, (20_000, 24 + 25), "cpu"))
    position = crop_positions(choices, torch.full((20_000,), length), config)
    span = (position[:, 32] - position[:, 31]) * 64  # far from the edges, which clamp
    assert abs((span <= min(64, length) + 0.01).float().mean().item() - full) < 0.015
    assert abs(span.mean().item() - mean) < 1.5
    assert position.min() >= 0 and position.max() <= length - 1


@pytest.mark.parametrize("sigma, total", [(0.1, 1.000), (0.5, 1.271), (1.0, 2.507), (2.0, 5.013)])
def test_filter_is_not_normalised(sigma: float, total: float) -> None:
    u = np.full((1, 49), 0.99)
    u[0, [16, 17, 18]] = 0.0
    u[0, [20, 21]] = 0.0, (sigma - 0.1) / 1.9  # the filter alone
    config = ViewConfig(shear=0.0)
    x = torch.ones(1, 64, 3, 25, 2)
    middle = spatial(x, "strong", draws_of(u), torch.zeros_like(x), config, MIRROR)[0, 32, 0, 0, 0]
    assert abs(middle.item() - total) < 2e-3


def test_an_absent_person_gets_noise() -> None:
    u = np.full((1, 49), 0.99)
    u[0, [13, 16, 17, 18, 19]] = 0.0  # flip and noise
    x = torch.randn(1, 8, 3, 25, 2)
    x[..., 1] = 0
    noise = torch.randn_like(x)
    config = ViewConfig(frames=8, shear=0.0)
    got = spatial(x, "strong", draws_of(u), noise, config, MIRROR)
    torch.testing.assert_close(got, x[:, :, :, MIRROR] + 0.01 * noise)


def test_mirroring_twice_changes_nothing() -> None:
    assert torch.equal(MIRROR[MIRROR], torch.arange(25))
    swapped = {(5, 9), (6, 10), (7, 11), (8, 12), (13, 17), (14, 18), (15, 19), (16, 20), (22, 24), (23, 25)}
    assert {(i + 1, m + 1) for i, m in enumerate(NTU25.mirror) if i < m} == swapped


@pytest.mark.parametrize("kind", ["none", "weak", "strong"])
def test_views_of_flat_clips_stay_in_their_plane(
    make_clips: Callable[..., Clips], kind: Literal["none", "weak", "strong"]
) -> None:
    clips = make_clips([20, 30])
    index, rho = torch.tensor([0, 1]), torch.randn(2, 8, 3, 25, 2)
    config = ViewConfig(frames=8)

    def made(clips: Clips) -> torch.Tensor:
        views = Views(clips, config, 0)
        return views.make(index, kind, views.draw(3, 2)[0], 3, rho)

    assert made(clips)[:, :, 2].any()
    plane = torch.tensor([1.0, 1.0, 0.0]).view(3, 1, 1)
    flat = made(replace(clips, frames=clips.frames * plane))
    assert not flat[:, :, 2].any() and flat[:, :, 0].any()


def test_equal_numbers_have_places_of_their_own() -> None:
    """So that a share of the joints is that share, whatever was drawn."""
    values = torch.tensor([[0.5, 0.2, 0.5, 0.9, 0.5], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert augment._places(values).tolist() == [[1, 4, 2, 0, 3], [0, 1, 2, 3, 4]]
