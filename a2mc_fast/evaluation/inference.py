"""A trained encoder in three lines: load it, embed one recording or a whole data set, export it.

import a2mc_fast
encoder = a2mc_fast.load_encoder("runs/demo")           # clips [N, C, T, V, M] -> features [N, F]
feature = a2mc_fast.embed_recording(encoder, joints)    # joints [T, M, V, 3] metres -> [F]
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from a2mc_fast.augment import Views
from a2mc_fast.data import Clips
from a2mc_fast.data.normalize import choose_bodies, usable
from a2mc_fast.encoders.branch import Branch
from a2mc_fast.errors import require
from a2mc_fast.evaluation.protocols import encode
from a2mc_fast.files import atomic_path
from a2mc_fast.run import checkpoint
from a2mc_fast.run.checkpoint import Checkpoint


class ClipEncoder(nn.Module):
    """A trained encoder: joints of clips [N, C, T, V, M] in metres -> features [N, feature_dim] float32.

    It computes its stream (motion, bone) itself and expects pre-normalised clips of `frames` frames, as
    `a2mc_fast.prepare` and `embed_recording` make them.
    """

    def __init__(self, branch: Branch, source: Checkpoint) -> None:
        super().__init__()
        for name in [name for name, _ in branch.named_children() if name != "encoder"]:
            delattr(branch, name)  # downstream tasks do not use the projection heads
        self.branch = branch
        self.source_path = source.path
        self.config = source.config
        self.skeleton, self.persons = source.skeleton, source.persons
        self.frames = source.config.views.frames
        self.feature_dim = branch.encoder.feature_dim

    def forward(self, x: Tensor) -> Tensor:
        # the one place where the field's order of dimensions becomes ours
        return self.branch.feature(x.transpose(1, 2)).float()


def load_encoder(
    run: str | Path, *, untrained: bool = False, device: torch.device | str = "cpu"
) -> ClipEncoder:
    """The query encoder of a run folder or checkpoint in eval mode, or as it was before training."""
    loaded = checkpoint.load(Path(run))
    model = loaded.build_untrained(device) if untrained else loaded.build(device)
    return ClipEncoder(model.query, loaded).requires_grad_(False).eval()


def embed_clips(encoder: ClipEncoder, clips: Clips) -> Tensor:
    """Features of every clip, of its centre crop. -> [n, feature_dim] float32, on the clips' device"""
    index = torch.arange(len(clips), device=clips.device)
    return encode(encoder.branch, Views(clips, encoder.config.views, 0), index)


def embed_recording(encoder: ClipEncoder, joints: np.ndarray | Tensor, *, normalize: bool = True) -> Tensor:
    """Feature of one recording as it comes from the sensor. joints [T, M, V, 3] metres -> [feature_dim]

    Of more persons than the encoder knows the ones that spread most are kept, missing ones count as absent.
    The recording is pre-normalised, unless `normalize` is off, cropped and resized like a clip of the packed
    file. `InputError` for another shape, for coordinates that are not finite, and for a recording without
    anybody.
    """
    joints = np.asarray(joints, np.float32)
    require(
        joints.ndim == 4 and joints.shape[2:] == (encoder.skeleton.num_joints, 3),
        f"a recording is joints [T, M, {encoder.skeleton.num_joints}, 3], got {list(joints.shape)}",
    )
    require(joints.shape[0] > 0 and joints.shape[1] > 0, f"the recording is empty: {list(joints.shape)}")
    if joints.shape[1] != encoder.persons:
        joints = choose_bodies(joints, encoder.persons)
    joints = usable(joints, encoder.skeleton, encoder.persons, normalize=normalize).joints
    device = next(encoder.parameters()).device
    clips = Clips.pack(
        joints,
        [len(joints)],
        [-1],
        encoder.skeleton,
        names=["the recording"],
        where="recording",
        device=device,
    )
    return embed_clips(encoder, clips)[0]


def export(encoder: ClipEncoder, path: Path) -> None:
    """Write the encoder as a `torch.export` program for any number of clips, whole or not at all.

    `torch.export.load(path).module()(clips)` gives features; the archive's extra file a2mc.json says which
    clips it expects.
    """
    shape = (2, 3, encoder.frames, encoder.skeleton.num_joints, encoder.persons)
    example = torch.zeros(shape, device=next(encoder.parameters()).device)
    with warnings.catch_warnings():
        # a recurrent layer keeps a list of its weights beside them, which is of no concern here
        warnings.filterwarnings("ignore", message="The tensor attributes? .*_flat_weights")
        program = torch.export.export(
            encoder, (example,), dynamic_shapes=({0: torch.export.Dim("clips")},), strict=False
        )
    about = {
        "clips": "[N, C, T, V, M], metres, pre-normalised",
        "shape": ["N", *shape[1:]],
        "feature_dim": encoder.feature_dim,
        "stream": encoder.config.stream,
        "encoder": encoder.config.encoder.name,
    }
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.export.save(program, file, extra_files={"a2mc.json": json.dumps(about)})
