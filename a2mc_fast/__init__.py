"""A²MC skeleton pretraining on one GPU: recordings in, a pretrained encoder out.

Nothing is imported here, so that ``python -m a2mc_fast.train --help`` is instant; import from the modules.
`load_encoder` and `embed_recording` are at hand as ``a2mc_fast.load_encoder``, imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from a2mc_fast.evaluation.inference import embed_recording, load_encoder

__version__ = "0.1.0"
__all__ = ["embed_recording", "load_encoder"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from a2mc_fast.evaluation import inference

    return getattr(inference, name)
