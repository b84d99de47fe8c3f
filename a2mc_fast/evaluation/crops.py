"""The crops that a frozen encoder is evaluated on: of clips as they are, without a spatial operation."""

from __future__ import annotations

import torch
from torch import Tensor

from a2mc_fast.augment import Draws, Views, crop_positions, resize_positions


def center_crop(views: Views, index: Tensor) -> Tensor:
    """The centre crop of clips. index [N] -> [N, T, C, V, M]"""
    return views.clips.read(index, center_positions(views.clips.lengths[index], views.config.frames))


def center_positions(lengths: Tensor, frames: int) -> Tensor:
    """Where the centre crop, 95 % of a clip, reads. lengths [N] -> [N, T]"""
    # the reference computes this in double precision, where (1 - 0.95) n / 2 falls just above the integer
    start = torch.floor((1 - 0.95) * lengths.double() / 2).long()
    return resize_positions(start, lengths - 2 * start, frames)


def random_crop(views: Views, index: Tensor, draws: Draws) -> Tensor:
    """A random temporal crop-resize of clips. index [N] -> [N, T, C, V, M]"""
    return views.clips.read(index, crop_positions(draws, views.clips.lengths[index], views.config))
