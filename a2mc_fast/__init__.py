"""A²MC skeleton pretraining on one GPU: recordings in, a pretrained encoder out.

Nothing is imported here, so that ``python -m a2mc_fast.train --help`` is instant; import from the modules.
`pretrain`, `load_encoder` and `embed_recording` are at hand as ``a2mc_fast.pretrain``, imported when first
used.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from a2mc_fast.evaluation.inference import embed_recording, load_encoder
    from a2mc_fast.run.start import pretrain

if not os.path.isdir(os.path.join(__path__[0], "kernels")):
    __path__.append(os.path.dirname(__path__[0]))  # in a clone the kernels lie beside this folder

__version__ = "0.1.0"
__all__ = ["embed_recording", "load_encoder", "pretrain"]
_HOMES = {
    "embed_recording": "evaluation.inference",
    "load_encoder": "evaluation.inference",
    "pretrain": "run.start",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
