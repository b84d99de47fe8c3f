"""Encoders by name."""

from __future__ import annotations

from typing import Any

from a2mc_fast.encoders.bigru import BiGRU
from a2mc_fast.encoders.common import Encoder
from a2mc_fast.encoders.scd import SCDNet
from a2mc_fast.errors import InputError
from a2mc_fast.skeleton import Skeleton

_ENCODERS = {"bigru": BiGRU, "scd": SCDNet}


def build_encoder(name: str, skeleton: Skeleton, **options: Any) -> Encoder:
    """An encoder with `.feature_dim`; forward(x [N, C, T, V, M], views=1) -> [N, feature_dim].

    Options are those of the encoder's class. `InputError` for an unknown name.
    """
    if name not in _ENCODERS:
        raise InputError(f"unknown encoder {name!r}; choose one of {', '.join(_ENCODERS)}")
    return _ENCODERS[name](skeleton, **options)
