"""How a picture becomes a file. matplotlib is imported by what draws, not here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a2mc_fast.errors import InputError, require, tell
from a2mc_fast.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")
_LIBRARIES = ("matplotlib", "sklearn")


def write_picture(out: Path, draw: Callable[[], Figure]) -> None:
    """Draw a picture and write it as the suffix says, whole or not at all; equal pictures give equal files.

    `InputError` for another suffix, before anything is drawn, and where the extra `plots` is not installed.
    """
    suffix = out.suffix.lower()
    require(suffix in SUFFIXES, f"--out {out}: the suffix must be {', '.join(SUFFIXES)}")
    require(not out.is_dir(), f"--out {out} is a folder: name a file in it")
    try:
        picture = draw()
    except ModuleNotFoundError as error:
        library = (error.name or "").split(".")[0]
        if library not in _LIBRARIES:
            raise
        raise InputError(
            f"pictures need {library}, which is not installed: pip install 'a2mc_fast[plots]'"
        ) from None
    undated: dict[str, Any] = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    with atomic_path(out) as temporary:
        picture.savefig(
            temporary, format=suffix[1:], metadata=undated.get(suffix), bbox_inches="tight", pad_inches=0.05
        )
    tell(f"wrote {out}")
