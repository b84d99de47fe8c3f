"""Encoders by name, and the branch of a run."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from a2mc_fast.config import Config
from a2mc_fast.encoders.bigru import BiGRU
from a2mc_fast.encoders.branch import Branch, Encoder
from a2mc_fast.encoders.dsta import DSTANet
from a2mc_fast.encoders.scd import SCDNet
from a2mc_fast.encoders.stgcn import STGCN
from a2mc_fast.errors import InputError, require
from a2mc_fast.skeleton import Skeleton

_ENCODERS: dict[str, type[Encoder]] = {"bigru": BiGRU, "stgcn": STGCN, "dsta": DSTANet, "scd": SCDNet}


def build_branch(config: Config, skeleton: Skeleton, persons: int) -> Branch:
    """The encoder that a run asks for, with its stream and heads."""
    e = config.encoder
    encoder = build_encoder(e.name, skeleton, persons=persons, frames=config.views.frames, **e.options)
    return Branch(config, skeleton, encoder)


def build_encoder(name: str, skeleton: Skeleton, **options: Any) -> Encoder:
    """An encoder with `.feature_dim`; forward(x [N, T, C, V, M], views=1) -> [N, feature_dim].

    Options are those of the encoder's class. "MODULE:CLASS" is an own one, which `own_encoder` describes.
    `InputError` for an unknown name or option.
    """
    if ":" in name:
        return own_encoder(name, skeleton, **options)
    if name not in _ENCODERS:
        raise InputError(f"unknown encoder {name!r}; choose one of {', '.join(_ENCODERS)}")
    known = [option for option in inspect.signature(_ENCODERS[name]).parameters if option != "skeleton"]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise InputError(f"encoder {name} has no option {', '.join(unknown)}; it takes {', '.join(known)}")
    return _ENCODERS[name](skeleton, **options)


class _Own(Encoder):
    """Any module as an encoder. Its width is that of what it makes of two empty clips."""

    def __init__(self, name: str, net: nn.Module, skeleton: Skeleton, persons: int, frames: int) -> None:
        super().__init__()
        self.net = net
        with torch.no_grad():
            feature = net.eval()(torch.zeros(2, 3, frames, skeleton.num_joints, persons))
        net.train()
        require(
            isinstance(feature, Tensor) and feature.ndim == 2 and len(feature) == 2,
            f"--encoder.name {name}: it must make features [N, F] of clips [N, C, T, V, M]",
        )
        self.feature_dim = feature.shape[1]

    def encode(self, x: Tensor) -> Tensor:
        return self.net(x.transpose(1, 2))


def own_class(name: str) -> type[nn.Module]:
    """CLASS of "MODULE:CLASS", which is imported: an `Encoder`, or any `nn.Module` whose forward takes clips
    [N, C, T, V, M] to features [N, F]. `InputError` if there is none."""
    module, _, attribute = name.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"--encoder.name {name} cannot be imported: {error}") from None
    require(
        isinstance(kind, type) and issubclass(kind, nn.Module),
        f"--encoder.name {name} is no class of nn.Module",
    )
    return kind


def own_encoder(name: str, skeleton: Skeleton, *, persons: int, frames: int) -> Encoder:
    """CLASS(skeleton, persons=..., frames=...) of "MODULE:CLASS"."""
    net = own_class(name)(skeleton, persons=persons, frames=frames)
    return net if isinstance(net, Encoder) else _Own(name, net, skeleton, persons, frames)
