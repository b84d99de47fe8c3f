"""What a run needs before it begins."""

from __future__ import annotations

import torch

from a2mc_fast.config import Config
from a2mc_fast.data import Clips
from a2mc_fast.data.synthetic import synthetic_clips


def load_clips(config: Config, device: torch.device) -> Clips:
    """The packed data file, or the built-in set."""
    if config.data:
        return Clips.load(config.data, device)
    s = config.synthetic
    return synthetic_clips(clips=s.clips, classes=s.classes, seed=s.seed, device=device)
