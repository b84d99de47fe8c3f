"""What the fast forms are compared with: the method written literally, as public skeleton code writes it.

Used twice: as the slow side of the benchmarks, and as the tests' oracle (in float64). Nothing here is fast or
meant to be.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def literal_mixed_bank(feature: Tensor, bank: Tensor, mix: Sequence[float]) -> Tensor:
    """The plain bank and its mixed copies for each query, all stored (Eq. 8). -> [N, (1 + len(mix)) K, D]"""
    banks = [bank.expand(len(feature), -1, -1)]
    banks += [share * feature.unsqueeze(1) + (1 - share) * bank for share in mix]
    return torch.cat(banks, 1)


def literal_mixing_contrast(
    key: Tensor,
    basic: Tensor,
    weak: Tensor,
    strong: Tensor,
    bank: Tensor,
    mix: Sequence[float],
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """L3, L1 and L2 (Eq. 9-11), batch means, with every mixed bank and every logit stored: (basic, weak,
    strong)."""

    def logits(query: Tensor, columns: Tensor) -> Tensor:
        negatives = torch.einsum("nd,nkd->nk", query, columns)
        return torch.cat(((query * key).sum(1, keepdim=True), negatives), 1) / temperature

    def contrast(anchor: Tensor) -> Tensor:
        return F.cross_entropy(
            logits(anchor, literal_mixed_bank(anchor, bank, mix)),
            torch.zeros(len(anchor), dtype=torch.int64, device=anchor.device),
        )

    columns = literal_mixed_bank(strong, bank, mix)
    target = logits(basic, columns).softmax(1).detach()
    distill = -(target * logits(strong, columns).log_softmax(1)).sum(1).mean()
    return contrast(basic), contrast(weak), distill


def whole_logits_mixing_contrast(
    key: Tensor,
    basic: Tensor,
    weak: Tensor,
    strong: Tensor,
    bank: Tensor,
    mix: Sequence[float],
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for unit rows with one matrix product per anchor, but all [N, (1 + len(mix)) K] logits
    stored."""

    def logits(query: Tensor, feature: Tensor) -> Tensor:
        similarity = query @ bank.T
        cross = (query * feature).sum(1, keepdim=True)
        banks = [similarity, *(share * cross + (1 - share) * similarity for share in mix)]
        return torch.cat(((query * key).sum(1, keepdim=True), *banks), 1) / temperature

    def contrast(anchor: Tensor) -> Tensor:
        return F.cross_entropy(
            logits(anchor, anchor), torch.zeros(len(anchor), dtype=torch.int64, device=anchor.device)
        )

    target = logits(basic, strong).softmax(1).detach()
    distill = -(target * logits(strong, strong).log_softmax(1)).sum(1).mean()
    return contrast(basic), contrast(weak), distill


def feeder_pair(
    padded: np.ndarray, length: int, frames: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Two basic views of one clip, as the data-set class of a loader worker makes them.

    `padded` [C, 300, V, M] is the clip as such code stores it, zeros or repeats beyond `length`; the item is
    copied, then each view is cropped, resized, sheared or jittered, and laid out as the recurrent encoder's
    input. -> two of [T, V*C*M] float32
    """
    clip = np.array(padded)
    views = (feeder_spatial(feeder_crop_resize(clip, length, frames, random), random) for _ in range(2))
    first, second = (view.transpose(1, 2, 0, 3).reshape(frames, -1).astype(np.float32) for view in views)
    return first, second


def feeder_crop_resize(clip: np.ndarray, length: int, frames: int, random: np.random.Generator) -> np.ndarray:
    """Temporal crop-resize of one clip: coordinates as channels of an image of height T and width 1."""
    channels, _, joints, persons = clip.shape
    span = min(max(int(length * random.uniform(0.1, 1.0)), 64), length)
    start = random.integers(0, length - span + 1)
    crop = torch.tensor(clip[:, start : start + span])
    image = crop.permute(0, 2, 3, 1).reshape(1, channels * joints * persons, span, 1)
    resized = F.interpolate(image, (frames, 1), mode="bilinear", align_corners=False)
    return resized.view(channels, joints, persons, frames).permute(0, 3, 1, 2).contiguous().numpy()


def feeder_spatial(x: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Pose augmentation or joint jittering of one view [C, T, V, M], in numpy's double precision."""
    if random.random() < 0.5:
        joints = random.choice(x.shape[2], round(0.6 * x.shape[2]), replace=False)
        x = x.copy()
        if random.random() < 0.5:
            x[:, :, joints] = 0
        else:
            matrix = random.uniform(-1, 1, (3, 3))
            x[:, :, joints] = np.dot(x[:, :, joints].transpose(1, 2, 3, 0), matrix.T).transpose(3, 0, 1, 2)
        return x
    shear = random.uniform(-1, 1, (3, 3))
    np.fill_diagonal(shear, 1)
    return np.dot(x.transpose(1, 2, 3, 0), shear.T).transpose(3, 0, 1, 2)
