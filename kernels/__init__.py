"""The fused operations of A²MC, installed as `a2mc_fast.kernels`; `reference` holds the plain-torch forms.

`problem` and `reference` need torch alone. The others need Triton, which is only there where there is a GPU,
and are imported when first used: `kernels.gru`.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import bank_ascent, common, gru, gru_resident, mixing_contrast, philox, verify

__all__ = ["bank_ascent", "common", "gru", "gru_resident", "mixing_contrast", "philox", "verify"]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")
