"""Commands by their names: those that are installed, and those that the package lists."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

from a2mc_fast.__main__ import COMMANDS

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]


def test_every_listed_command_is_installed_and_starts_a_main() -> None:
    assert set(PROJECT["scripts"]) == {f"a2mc-{name}" for name in COMMANDS}
    for target in PROJECT["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(import_module(module), function))


def test_the_package_lists_its_commands_without_torch() -> None:
    code = (
        "import runpy, sys; runpy.run_module('a2mc_fast', run_name='__main__');"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[2] for line in done.stdout.splitlines()[:-1]] == [f"a2mc_fast.{n}" for n in COMMANDS]
