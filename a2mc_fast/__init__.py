"""A²MC skeleton pretraining on one GPU: recordings in, a pretrained encoder out.

Nothing is imported here, so that ``python -m a2mc_fast.train --help`` is instant; import from the modules.
What `__all__` names is at hand as ``a2mc_fast.pretrain``, imported when first used.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from a2mc_fast.evaluation.inference import (
        classify_recording,
        embed_recording,
        load_classifier,
        load_encoder,
    )
    from a2mc_fast.run.start import pretrain

if os.name == "nt":
    raise SystemExit("error: a2mc_fast needs Linux or macOS (it locks files): on Windows, run it in WSL")
if not os.path.isdir(os.path.join(__path__[0], "kernels")):
    __path__.append(os.path.dirname(__path__[0]))  # in a clone the kernels lie beside this folder

__version__ = "0.1.0"
__all__ = ["classify_recording", "embed_recording", "load_classifier", "load_encoder", "pretrain"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "run.start" if name == "pretrain" else "evaluation.inference"
    return getattr(import_module(f"{__name__}.{home}"), name)
