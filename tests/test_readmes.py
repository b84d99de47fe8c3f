"""The READMEs' Python, run as it stands."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from a2mc_fast.run.log import RunLog

PACKAGE = Path(__file__).parent.parent / "a2mc_fast"


def blocks(readme: Path) -> list[str]:
    """Its fenced blocks of Python."""
    return re.findall(r"^```python\n(.*?)^```$", readme.read_text(), re.MULTILINE | re.DOTALL)


def test_the_library_works_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (net,) = blocks(PACKAGE / "encoders" / "README.md")
    (tmp_path / "nets.py").write_text(net)
    heard: list[tuple[dict[str, Any], int]] = []
    board = types.SimpleNamespace(log=lambda line, step: heard.append((line, step)))
    wandb = types.SimpleNamespace(init=lambda project: board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]  # which wants an account
    written: list[dict[str, Any]] = []
    write = RunLog._write

    def noted(log: RunLog, record: dict[str, Any]) -> None:
        written.append(record)
        write(log, record)

    monkeypatch.setattr(RunLog, "_write", noted)
    space: dict[str, Any] = {}
    for number, block in enumerate(blocks(PACKAGE / "README.md")):
        exec(compile(block, f"block {number}", "exec"), space)
    assert heard and [line for line, _ in heard] == written[len(heard) : 2 * len(heard)]
    assert all(step == line["step"] for line, step in heard)
    assert space["features"].shape[0] == 120 and space["result"]["split"] == "half"
    assert {
        name for name, _ in space["a2mc_fast"].classify_recording(space["classifier"], space["recordings"][0])
    } == {"sit", "stand", "wave"}
    assert space["encoder"].feature_dim == 64 and space["run"].name == "own-3"
