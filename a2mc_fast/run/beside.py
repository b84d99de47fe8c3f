"""The key encoder's pass beside the attack's, in the same launches of the fused kernels.

The recurrent layers of one encoder at a time leave half of a GPU idle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from a2mc_fast.encoders.bigru import BiGRU
from a2mc_fast.encoders.branch import autocast
from a2mc_fast.encoders.fused import fused
from a2mc_fast.model import A2MC


def key_rides(model: A2MC) -> bool:
    """Whether the launches can be shared: by fused kernels, in one type for both."""
    forms = {model.query.encoder.recurrence, model.key.encoder.recurrence}
    return not forms & {"torch", None} and model.config.precision != "fp16"


def attack_with_key(model: A2MC, x: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    """`model.attack` of whole clips x, and the key encoder's feature of their view x0, without a gradient."""
    query, key = model.query.encoder, model.key.encoder
    assert isinstance(query, BiGRU) and isinstance(key, BiGRU)
    found = []

    def classify(x: Tensor) -> Tensor:
        with autocast(model.config, x.device, wide=True):
            with torch.no_grad():
                constant = key.normed(model.key.stream(x0))
            sequence = query.normed(model.query.stream(x))
            with query.arithmetic(sequence) as dtype:
                feature, beside = fused((query, key), (sequence, constant), dtype)
            with torch.no_grad():
                found.append(model.key.normed(beside))
            feature = model.query.normed(feature)
        return model.classifier(feature.float())

    return model.attack(x, classify), found[0]
