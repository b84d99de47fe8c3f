"""Encoders by name."""

from __future__ import annotations

import inspect
from typing import Any

from a2mc_fast.encoders.bigru import BiGRU
from a2mc_fast.encoders.common import Encoder
from a2mc_fast.encoders.dsta import DSTANet
from a2mc_fast.encoders.scd import SCDNet
from a2mc_fast.encoders.stgcn import STGCN
from a2mc_fast.errors import InputError
from a2mc_fast.skeleton import Skeleton

_ENCODERS: dict[str, type[Encoder]] = {"bigru": BiGRU, "stgcn": STGCN, "dsta": DSTANet, "scd": SCDNet}


def build_encoder(name: str, skeleton: Skeleton, **options: Any) -> Encoder:
    """An encoder with `.feature_dim`; forward(x [N, T, C, V, M], views=1) -> [N, feature_dim].

    Options are those of the encoder's class. `InputError` for an unknown name or option.
    """
    if name not in _ENCODERS:
        raise InputError(f"unknown encoder {name!r}; choose one of {', '.join(_ENCODERS)}")
    known = [option for option in inspect.signature(_ENCODERS[name]).parameters if option != "skeleton"]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise InputError(f"encoder {name} has no option {', '.join(unknown)}; it takes {', '.join(known)}")
    return _ENCODERS[name](skeleton, **options)
