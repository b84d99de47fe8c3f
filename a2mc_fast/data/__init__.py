"""Data sets: packed clips on the device, the readers that make them, and the built-in synthetic set."""

from a2mc_fast.data.clips import Clips

__all__ = ["Clips"]
