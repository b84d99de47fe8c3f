"""What a recorded benchmark says of its machine: processor, versions and commit, and no more.

Record a run with `pytest bench -s --benchmark-json bench/results/NAME.json`.
"""

from __future__ import annotations

from typing import Any

import torch

from a2mc_fast.run.machine import machine


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """The run log's description instead of the host's name and details."""
    machine_info.clear()
    machine_info.update(machine(), threads=torch.get_num_threads())


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Medians and extremes are enough: drop the single timings."""
    output_json["commit_info"] = {"id": output_json["machine_info"]["commit"]}
    for benchmark in output_json["benchmarks"]:
        stats = benchmark["stats"]
        kept = ("min", "q1", "median", "q3", "max", "rounds")
        benchmark["stats"] = {name: value for name, value in stats.items() if name in kept}
