"""Views of clips: temporal crop-resize, then spatial operations, batched on the device.

A view is a pure function of (seed, step, view number, place in the batch): all its random choices come from
`rng` before any frame is read.

Legend: N clips · C coordinates (3) · T frames of a view · V joints · M persons. Views are [N, T, C, V, M]:
a frame is contiguous, as gathers give it and recurrent layers take it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from a2mc_fast import rng
from a2mc_fast.config import ViewConfig
from a2mc_fast.data.clips import Clips, interpolate
from a2mc_fast.ranks import ALONE, World

Kind = Literal["weak", "strong", "none"]
_FILTER_REACH = 7  # frames on either side: the Gaussian filter has 15 taps
_NUM_DRAWS = 24  # uniform numbers of a view besides one per joint; `_Draws` names them


@dataclass(frozen=True, slots=True)
class Draws:
    """The random choices of one view of N clips, all uniform in [0, 1)."""

    values: Tensor  # [N, _NUM_DRAWS + V]
    first: int = 0  # place of the first clip in the batch

    def __getitem__(self, which: int | slice) -> Tensor:
        return self.values[:, which]

    def __add__(self, other: Draws) -> Draws:
        """The choices of two views, one after the other."""
        return Draws(torch.cat((self.values, other.values)), self.first)

    def part(self, places: slice) -> Draws:
        """Those of some of the batch's clips."""
        return Draws(self.values[places], self.first + places.start)

    @property
    def joints(self) -> Tensor:
        """One number per joint, [N, V]."""
        return self.values[:, _NUM_DRAWS:]


# places in `Draws.values`
_RATIO, _START, _POSE_OR_JITTER, _JITTER_KIND = 0, 1, 2, 3
_MATRIX = slice(4, 13)
_FLIP, _AXIS, _NOISE, _FILTER, _SIGMA, _MASK, _MASK_AXIS = 13, 15, 19, 20, 21, 22, 23
_ANGLES = slice(16, 19)


def crop_positions(draws: Draws, lengths: Tensor, config: ViewConfig) -> Tensor:
    """Where a random temporal crop-resize reads: frames of the clip, fractional. lengths [N] -> [N, T].

    The crop spans max(floor(n s), T) frames, at most n, with s uniform in (min_ratio, 1). (ISC)
    """
    ratio = config.min_ratio + (1 - config.min_ratio) * draws[_RATIO]
    span = torch.floor(lengths * ratio).long().clamp_min(config.frames).minimum(lengths)
    start = torch.floor(draws[_START] * (lengths - span + 1)).long()
    return resize_positions(start, span, config.frames)


def resize_positions(start: Tensor, span: Tensor, frames: int) -> Tensor:
    """Half-pixel positions of `frames` samples over span frames from start, edges clamped. [N] -> [N, T]"""
    grid = torch.arange(frames, device=start.device, dtype=torch.float32) + 0.5
    offset = grid * (span.unsqueeze(1) / frames) - 0.5
    return start.unsqueeze(1) + offset.clamp_min(0).minimum((span - 1).unsqueeze(1))


def _resample(rho: Tensor, position: Tensor, lengths: Tensor) -> Tensor:
    """A perturbation of the resized whole clip, read at positions of the native clip.

    rho [N, T', C, V, M], position [N, T] in frames of a clip of n = lengths[N] frames -> [N, T, C, V, M].
    """
    count, frames = rho.shape[:2]
    rows = rho.reshape(count * frames, -1)
    first = torch.arange(0, count * frames, frames, device=rho.device)
    place = ((position + 0.5) * (frames / lengths).unsqueeze(1) - 0.5).clamp(0, frames - 1)
    values = interpolate(rows, first, first + frames - 1, place)
    return values.unflatten(2, rho.shape[2:])


def pose_or_jitter(x: Tensor, draws: Draws, config: ViewConfig) -> Tensor:
    """Pose augmentation or joint jittering, evenly. x [N, T, C, V, M] -> like x

    Pose: a shear with unit diagonal for all joints. Jitter: a share of the joints is set to zero, or
    multiplied by one random matrix. (ISC) Both are x + hit (A - 1) x with one matrix A per clip and the
    joints it hits.
    """
    random = 2 * draws[_MATRIX].unflatten(1, (3, 3)) - 1
    identity = torch.eye(3, device=random.device)
    shear = torch.where(identity.bool(), identity, random * config.shear)
    is_jitter, to_zero = draws[_POSE_OR_JITTER] < 0.5, draws[_JITTER_KIND] < 0.5
    jitter = random * (~to_zero).view(-1, 1, 1)
    matrix = torch.where(is_jitter.view(-1, 1, 1), jitter, shear)
    chosen = round(config.jitter * draws.joints.shape[1])
    hit = (_places(draws.joints) < chosen) | ~is_jitter.unsqueeze(1)
    # written out over persons, so that the innermost loop runs over V*M
    hit = hit.to(x.dtype).view(-1, 1, 1, hit.shape[1], 1).repeat(1, 1, 1, 1, x.shape[4])
    change = mix_axes(x, matrix - identity)
    return torch.addcmul(x, change, hit)


def _places(values: Tensor) -> Tensor:
    """Place of every value in its row, largest first; of equal ones the first comes first. [N, V] -> [N, V]

    By comparing all pairs, which a compiler fuses with what is around it: a GPU would take longer to sort.
    """
    one, other = values.unsqueeze(2), values.unsqueeze(1)
    number = torch.arange(values.shape[1], device=values.device)
    ahead = (other > one) | ((other == one) & (number < number.unsqueeze(1)))
    return ahead.sum(2)


def rotation_matrices(draws: Draws) -> Tensor:
    """Rotation about x, y, z in this order: one main axis up to 30 degrees, the others up to 1. -> [N, 3, 3]

    The angles are non-negative only. (AimCLR)
    """
    main = torch.floor(3 * draws[_AXIS]).long()
    limit = torch.full_like(draws[_ANGLES], math.radians(1)).scatter_(1, main.unsqueeze(1), math.radians(30))
    angle = draws[_ANGLES] * limit
    (cx, cy, cz), (sx, sy, sz) = angle.cos().unbind(1), angle.sin().unbind(1)
    # R_z R_y R_x of column vectors: R_x acts first
    first = cz * cy, cz * sy * sx + sz * cx, sz * sx - cz * sy * cx
    second = -sz * cy, cz * cx - sz * sy * sx, sz * sy * cx + cz * sx
    return torch.stack((*first, *second, sy, -cy * sx, cy * cx), 1).unflatten(1, (3, 3))


def mix_axes(x: Tensor, matrix: Tensor) -> Tensor:
    """Every point times its clip's matrix. x [N, T, C, V, M], matrix [N, 3, 3] -> like x."""
    return (matrix.unsqueeze(1) @ x.flatten(3)).view(x.shape)


def _filter_matrices(draws: Draws, frames: int, config: ViewConfig) -> Tensor:
    """The Gaussian filter over time, zero-padded, as a band matrix; identity where not drawn. -> [N, T, T]"""
    sigma = 0.1 + 1.9 * draws[_SIGMA]
    time = torch.arange(frames, device=sigma.device)
    distance = (time.unsqueeze(1) - time).abs()
    band = torch.exp(-(distance**2) / (2 * sigma**2).view(-1, 1, 1)) * (distance <= _FILTER_REACH)
    on = (draws[_FILTER] < config.strong_p).view(-1, 1, 1)
    return torch.where(on, band, torch.eye(frames, device=sigma.device))


def spatial(
    x: Tensor, kind: Kind, draws: Draws, noise: Tensor | None, config: ViewConfig, mirror: Tensor
) -> Tensor:
    """The spatial operations of a view. x [N, T, C, V, M] metres -> like x.

    weak: pose or jitter. strong: then flip, rotation, noise, filter over time and axis mask, in this order.
    `noise` [N, T, C, V, M] is standard normal, and read by the strong view only; `mirror` [V] swaps the
    sides.
    """
    if kind == "none":
        return x
    y = pose_or_jitter(x, draws, config)
    if kind == "weak":
        return y
    assert noise is not None
    flip = (draws[_FLIP] < config.strong_p).view(-1, 1, 1, 1, 1)
    y = torch.where(flip, y[:, :, :, mirror], y)
    y = mix_axes(y, rotation_matrices(draws))
    scale = config.noise_std * (draws[_NOISE] < config.strong_p).view(-1, 1, 1, 1, 1)
    y = y + scale * noise
    y = (_filter_matrices(draws, y.shape[1], config) @ y.flatten(2)).view(y.shape)
    masked = torch.floor(3 * draws[_MASK_AXIS]).long().unsqueeze(1) == torch.arange(3, device=x.device)
    masked = masked & (draws[_MASK] < config.strong_p).unsqueeze(1)
    return y * (~masked).view(-1, 1, 3, 1, 1)


class Views:
    """Makes views of a set of clips; holds what does not change from step to step."""

    def __init__(self, clips: Clips, config: ViewConfig, seed: int, world: World = ALONE) -> None:
        """The ranks of `world` have the same clips, and share the work of encoding them."""
        self.clips, self.config, self.seed, self.world = clips, config, seed, world
        self.mirror = torch.tensor(clips.skeleton.mirror, device=clips.device)
        # what a view moves out of the plane of flat clips would be read where their own have nothing
        one = torch.ones((), device=clips.device)
        self.axes = torch.stack((one, one, clips.has_depth.float())).view(3, 1, 1)

    def draw(self, step: Tensor | int, clips: int, views: int = 4) -> list[Draws]:
        """The random choices of all views of one step."""
        shape = (views, clips, _NUM_DRAWS + self.clips.skeleton.num_joints)
        return [Draws(v) for v in rng.uniform(self.seed, step, rng.STREAM_VIEWS, shape, self.clips.device)]

    def whole(self, index: Tensor) -> Tensor:
        """Whole clips resized to T frames, as the attack sees them. index [N] -> [N, T, C, V, M]"""
        lengths = self.clips.lengths[index]
        position = resize_positions(torch.zeros_like(lengths), lengths, self.config.frames)
        return self.clips.read(index, position)

    def make(
        self, index: Tensor, kind: Kind, draws: Draws, step: Tensor | int, rho: Tensor | None = None
    ) -> Tensor:
        """One view of clips index [N], of the clips themselves or as perturbed by rho. -> [N, T, C, V, M]

        rho [N, T, C, V, M] belongs to the resized whole clips; it is resampled to the times the crop reads.
        Views of flat clips are flat.
        """
        if kind == "none":
            x = self.whole(index)
            return (x if rho is None else x + rho) * self.axes
        lengths = self.clips.lengths[index]
        position = crop_positions(draws, lengths, self.config)
        x = self.clips.read(index, position)
        if rho is not None:
            x = x + _resample(rho, position, lengths)
        noise = None
        if kind == "strong":
            noise = rng.normal(self.seed, step, rng.STREAM_NOISE, x.shape, x.device, draws.first)
        return spatial(x, kind, draws, noise, self.config, self.mirror) * self.axes
