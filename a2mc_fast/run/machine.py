"""The machine a run is on: where to train, what the numbers were measured on, memory."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from a2mc_fast import __version__
from a2mc_fast.config import Config
from a2mc_fast.errors import InputError, require


def pick_device(config: Config) -> torch.device:
    """The GPU if there is one and the run allows it. Sets threads and torch's arithmetic."""
    # cuBLAS reads it when it starts, and repeats its results to the bit only with workspaces of its own
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if config.run.threads:
        require(
            config.run.threads <= most_threads(),
            f"--run.threads {config.run.threads} is more than this machine can use: at most {most_threads()}",
        )
        torch.set_num_threads(config.run.threads)
    available = torch.cuda.is_available()
    if config.run.device == "cuda" and not available:
        raise InputError(
            "--run.device cuda: torch sees no GPU; use --run.device cpu, or install a CUDA build"
        )
    set_arithmetic(config)
    return torch.device("cuda" if available and config.run.device != "cpu" else "cpu")


def set_arithmetic(config: Config) -> None:
    """Have torch multiply float32 on a GPU as the run asks, and repeat its results to the bit."""
    torch.backends.cuda.matmul.allow_tf32 = config.precision == "tf32"
    # what lower precisions leave in float32 of convolutions and recurrent layers may be rounded, too
    torch.backends.cudnn.allow_tf32 = config.precision != "fp32"
    torch.backends.cudnn.deterministic = True


def most_threads() -> int:
    """How many may be asked for here."""
    return 4 * (os.cpu_count() or 1)


def keep_threads(config: Config, progress: Mapping[str, float]) -> str:
    """Go on with as many CPU threads as a run had so far, unless others are asked for.

    Returns what must be said where that is not so, since sums in another order have other last bits.
    """
    had = int(progress.get("threads", 0))
    if not config.run.threads and 0 < had <= most_threads():
        torch.set_num_threads(had)
    now = torch.get_num_threads()
    if had in (0, now) or (config.run.device != "cpu" and torch.cuda.is_available()):
        return ""
    return f", with {now} CPU threads instead of {had}: its last bits will differ from an uninterrupted run's"


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "device": gpu or f"{_processor()} ({torch.get_num_threads()} threads)",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "a2mc_fast": __version__,
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    """The source's git commit, with + where files differ from it; empty outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's resident peak on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
