"""Sets as large as a memory: frames pass by blocks, [F, M, V, C] in files and [F, C, V, M] on the device."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from a2mc_fast.errors import InputError

_BLOCK = 1 << 14  # frames, 10 MB of NTU
_NAMES = {"int64": "I64", "float32": "F32", "bool": "BOOL"}


def placed(joints: Tensor, device: torch.device, where: str) -> Tensor:
    """Joints as contiguous frames on `device`. `InputError`, beginning with `where`, if it has no room."""
    count, *axes = joints.shape
    size, room = joints.numel() * joints.element_size(), free(device)
    try:
        if size > room:
            raise MemoryError
        frames = torch.empty((count, *reversed(axes)), dtype=joints.dtype, device=device)
    except (MemoryError, RuntimeError):
        raise InputError(
            f"{where}: the frames take {size / 1e9:,.1f} GB and lie in the memory of {device} as a whole, of "
            f"which {room / 1e9:,.1f} GB are free; prepare fewer clips, --persons 1 or a lower --max-frames"
        ) from None
    for first in range(0, count, _BLOCK):
        block = joints[first : first + _BLOCK].to(device)
        frames[first : first + _BLOCK] = block.permute(0, 3, 2, 1)
    return frames


def free(device: torch.device) -> float:
    """Bytes that may be asked for on a device; infinite where the system does not say."""
    if device.type == "cuda":
        # what torch holds and does not use is free as well
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    try:
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else math.inf


def write(path: Path, joints: Tensor, others: Mapping[str, np.ndarray], header: Mapping[str, str]) -> None:
    """A safetensors file of joints [F, M, V, C], in any order and on any device, and of other arrays."""
    arrays: dict[str, np.ndarray | Tensor] = {"joints": joints, **others}
    order = sorted(arrays, key=lambda name: -arrays[name].itemsize)  # so each lies at a multiple of its width
    content: dict[str, object] = {"__metadata__": dict(header)}
    end = 0
    for name in order:
        kind, shape = str(arrays[name].dtype).removeprefix("torch."), list(arrays[name].shape)
        start, end = end, end + arrays[name].nbytes
        content[name] = {"dtype": _NAMES[kind], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            if name in others:
                file.write(others[name].tobytes())
                continue
            for first in range(0, len(joints), _BLOCK):
                file.write(joints[first : first + _BLOCK].cpu().contiguous().numpy().data)
