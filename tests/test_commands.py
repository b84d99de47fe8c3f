"""Commands by their names: those that are installed, and those that the package lists."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

from a2mc_fast.__main__ import COMMANDS
from a2mc_fast.data import Clips

PROJECT_FOLDER = Path(__file__).parent.parent
PROJECT = tomllib.loads((PROJECT_FOLDER / "pyproject.toml").read_text())["project"]


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


def test_windows_is_refused_in_one_line() -> None:
    code = "import os; os.name = 'nt'; import a2mc_fast"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "WSL" in done.stderr


RUN = """
import os, runpy, site, sys
site.addsitedir(sys.argv[1])
# behind it, and as -S leaves them out: what this environment installs is no part of it
sys.path += sys.argv[2:]
sys.path.insert(0, os.getcwd())  # as -m does
runpy.run_module("a2mc_fast.added", run_name="__main__")
"""


def test_an_editable_install_runs_where_the_clone_lies(tmp_path: Path) -> None:
    """There the clone's folder has the package's name. Files that are added later are found, too."""
    clone = tmp_path / "a2mc_fast"
    for part in ("a2mc_fast", "kernels", "pyproject.toml", "README.md", "LICENSE"):
        source = PROJECT_FOLDER / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, clone / part)  # type: ignore[operator]
    build = "from setuptools import build_meta; print(build_meta.build_editable('..'))"
    built = subprocess.run([sys.executable, "-c", build], cwd=clone, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    shutil.unpack_archive(tmp_path / built.stdout.split()[-1], tmp_path / "site", "zip")
    (clone / "a2mc_fast" / "added.py").write_text(
        "import a2mc_fast.kernels; print(a2mc_fast.kernels.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", RUN, str(tmp_path / "site"), *sys.path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(clone / "kernels" / "__init__.py"), done.stderr


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A line of bash in a folder, PYTHON standing for this interpreter."""
    line = command.replace("PYTHON", sys.executable)
    return subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True)


def test_closed_streams_reach_no_file(tmp_path: Path) -> None:
    """What is told goes nowhere, and not into a file that got the stream's number."""
    done = shell("PYTHON -m a2mc_fast.prepare synthetic clips.safetensors --clips 60 >&- 2>&-", tmp_path)
    assert done.returncode == 0
    assert len(Clips.load(tmp_path / "clips.safetensors")) == 60
    tiny = (
        "--bank.size 8 --bank.warmup-steps 1 --optim.batch-size 8 --optim.epochs 1 --optim.milestones 0 "
        "--encoder.hidden 2 --views.frames 4 --run.eval-every 0 --run.out run"
    )
    train = f"PYTHON -m a2mc_fast.train demo --data clips.safetensors {tiny} >&- 2>&-"
    assert shell(train, tmp_path).returncode == 0 and (tmp_path / "run/result.json").exists()


STOPPED = """
import os, signal
from a2mc_fast.run.signals import stop_on_signal

gone, end = os.pipe()
os.close(gone)
os.dup2(end, 2)
with stop_on_signal() as asked:
    os.kill(os.getpid(), signal.SIGTERM)
print(asked)
"""


def test_a_signal_is_heard_where_nobody_reads_what_it_says() -> None:
    done = subprocess.run([sys.executable, "-c", STOPPED], capture_output=True, text=True)
    assert done.stdout.split() == ["[15]"], done.stderr


def test_a_line_that_nobody_takes_is_lost_alone(tmp_path: Path) -> None:
    told = "from a2mc_fast.errors import tell; tell('a'); tell('b', error=True); open('end', 'w').write('x')"
    for stream in (">/dev/full", "2>/dev/full"):
        assert shell(f'PYTHON -c "{told}" {stream}', tmp_path).returncode == 0
        assert (tmp_path / "end").read_text() == "x"
        (tmp_path / "end").unlink()
