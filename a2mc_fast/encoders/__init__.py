"""Skeleton encoders: clips [N, T, C, V, M] in, one feature per clip out."""

from a2mc_fast.encoders.build import build_encoder

__all__ = ["build_encoder"]
