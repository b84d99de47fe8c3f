"""What sets take in memory, and what is said where they do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from a2mc_fast.data import Clips, identity, memory
from a2mc_fast.errors import InputError
from a2mc_fast.prepare import main
from a2mc_fast.skeleton import NTU25
from tests.fuzz import _reset_peak, _resident
from tests.test_readers import own_archive

FRAMES = 60_000  # 36 MB of NTU


def test_packing_writing_and_loading_hold_little_beside_the_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_ROWS", 1 << 11)  # its threads' blocks are not in proportion to the set
    shape = (FRAMES, 2, 25, 3)
    joints = np.memmap(tmp_path / "joints", np.float32, "w+", shape=shape)
    joints[:] = np.random.default_rng(0).standard_normal((1000, 2, 25, 3), np.float32).repeat(60, 0)
    size = joints.nbytes

    def grown(step: Callable[[], Clips]) -> tuple[Clips, float]:
        before = _reset_peak()
        made = step()
        return made, (_resident(b"VmHWM:") - before) / size

    def pack_and_save() -> Clips:
        clips = Clips.pack(joints, [300] * (FRAMES // 300), [0] * (FRAMES // 300), NTU25)
        clips.save(tmp_path / "x.safetensors")
        return clips

    clips, packing = grown(pack_and_save)
    # the set once, and the mapped file, whose pages the system may take back
    assert packing < 2.4
    again, loading = grown(lambda: Clips.load(tmp_path / "x.safetensors"))
    assert loading < 2.4 and torch.equal(again.frames, clips.frames)
    assert len(load_file(tmp_path / "x.safetensors")["joints"]) == FRAMES


def test_a_set_without_room_is_told_before_it_is_placed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "in.npz", **own_archive())
    arguments = ["npz", str(tmp_path / "in.npz"), str(tmp_path / "out.safetensors")]
    main(arguments)
    monkeypatch.setattr(memory, "free", lambda device: 800.0)
    with pytest.raises(InputError, match=r"frames take 0\.0 GB .* of cpu .* 0\.0 GB are free; prepare"):
        Clips.load(tmp_path / "out.safetensors")
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--overwrite"])
    assert "npz: the frames take" in capsys.readouterr().err
    monkeypatch.setattr(memory, "free", lambda device: 900.0)  # 15 frames of 5 joints
    assert len(Clips.load(tmp_path / "out.safetensors")) == 3
