"""A trained encoder, and a classifier behind it: loaded, and used on a recording. README.md has the lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from a2mc_fast.augment import Views
from a2mc_fast.data import Clips
from a2mc_fast.data.keypoints import as_joints
from a2mc_fast.data.normalize import usable
from a2mc_fast.encoders.branch import Branch
from a2mc_fast.errors import InputError, require
from a2mc_fast.evaluation.protocols import encode
from a2mc_fast.evaluation.scores import beside
from a2mc_fast.evaluation.settings import Classifying
from a2mc_fast.run import checkpoint, weights
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
        self.source_path, self.config = source.path, source.config
        self.skeleton, self.persons = source.skeleton, source.persons
        self.frames = source.config.views.frames
        self.feature_dim = branch.encoder.feature_dim

    def forward(self, x: Tensor) -> Tensor:
        # the one place where the field's order of dimensions becomes ours
        return self.branch.feature(x.transpose(1, 2)).float()


def load_encoder(
    run: str | Path, *, untrained: bool = False, device: torch.device | str = "cpu"
) -> ClipEncoder:
    """The query encoder of a run, a checkpoint or a released file in eval mode, or as before training."""
    loaded = weights.load(Path(run))
    branch = weights.untrained(loaded, device) if untrained else loaded.branch(device)
    return ClipEncoder(branch, loaded).requires_grad_(False).eval()


class ClipClassifier(nn.Module):
    """An encoder and a classifier behind it: clips [N, C, T, V, M] -> logits [N, classes]."""

    def __init__(
        self, encoder: ClipEncoder, class_names: Sequence[str], weight: Tensor, bias: Tensor
    ) -> None:
        super().__init__()
        self.encoder, self.class_names = encoder, tuple(class_names)
        self.linear = nn.Linear(encoder.feature_dim, len(self.class_names), device=weight.device)
        self.linear.load_state_dict({"weight": weight, "bias": bias})

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.encoder(x))


def load_classifier(
    run: str | Path, protocol: Classifying = "linear", *, device: torch.device | str = "cpu"
) -> ClipClassifier:
    """The classifier that a protocol trained on a run, or that of a file, and its encoder, in eval mode."""
    path = beside(Path(run), protocol, "classifier")
    loaded = checkpoint.load(path)
    weight, bias = (loaded.tensors.get(f"downstream.{name}") for name in ("weight", "bias"))
    encoder = ClipEncoder(loaded.branch(device), loaded)
    shape = [len(loaded.class_names), encoder.feature_dim]
    if weight is None or bias is None or list(weight.shape) != shape or list(bias.shape) != shape[:1]:
        raise InputError(f"{path} holds no classifier of {shape[0]} classes on {shape[1]} features")
    classifier = ClipClassifier(encoder, loaded.class_names, weight.to(device), bias.to(device))
    return classifier.requires_grad_(False).eval()


def embed_clips(encoder: ClipEncoder, clips: Clips) -> Tensor:
    """Features of every clip, of its centre crop. -> [n, feature_dim] float32, on the clips' device"""
    index = torch.arange(len(clips), device=clips.device)
    return encode(encoder.branch, Views(clips, encoder.config.views, 0), index)


def embed_recording(encoder: ClipEncoder, joints: np.ndarray | Tensor, *, normalize: bool = True) -> Tensor:
    """Feature of one recording as it comes from the sensor. joints [T, M, V, 3] metres -> [feature_dim]

    2-D keypoints [T, M, V, 2], for an encoder of such, are scaled as `prepare` does. Of more persons than the
    encoder knows the ones that spread most are kept, missing ones count as absent. The recording is
    pre-normalised, unless `normalize` is off, cropped and resized like a clip of the packed file.
    `InputError` for another shape, for coordinates that are not finite, and for a recording without anybody.
    """
    return embed_clips(encoder, packed(encoder, [prepared(encoder, joints, normalize=normalize)]))[0]


def classify_recording(
    classifier: ClipClassifier, joints: np.ndarray | Tensor, *, top: int = 5, normalize: bool = True
) -> list[tuple[str, float]]:
    """The most probable classes of one recording with their probabilities; joints as in `embed_recording`."""
    clips = packed(classifier.encoder, [prepared(classifier.encoder, joints, normalize=normalize)])
    return most_probable(classifier, clips, top)[0]


def most_probable(classifier: ClipClassifier, clips: Clips, top: int) -> list[list[tuple[str, float]]]:
    """The most probable classes of each clip, at most `top`, with their probabilities."""
    probability = classifier.linear(embed_clips(classifier.encoder, clips)).softmax(1)
    values, classes = probability.topk(min(top, probability.shape[1]), 1)
    names = classifier.class_names
    return [[(names[c], p) for c, p in zip(*row)] for row in zip(classes.tolist(), values.tolist())]


def prepared(encoder: ClipEncoder, recording: np.ndarray | Tensor, *, normalize: bool = True) -> np.ndarray:
    """A recording [T, M, V, 3], as `embed_recording` takes it, cut, normalised, of the encoder's persons."""
    joints = np.asarray(recording, np.float32)
    if joints.ndim == 4 and joints.shape[3] == 2:
        joints = as_joints(joints)
    require(
        joints.ndim == 4 and joints.shape[2:] == (encoder.skeleton.num_joints, 3),
        f"a recording is joints [T, M, {encoder.skeleton.num_joints}, 3], got {list(joints.shape)}",
    )
    require(joints.shape[0] > 0 and joints.shape[1] > 0, f"the recording is empty: {list(joints.shape)}")
    # packed keypoints are never turned
    known = encoder.skeleton.rotation == "none" or joints[..., 2].any() or not joints.any()
    require(bool(known), "the recording lies in a plane, and the encoder knows joints in space")
    return usable(joints, encoder.skeleton, encoder.persons, normalize=normalize).joints


def packed(encoder: ClipEncoder, recordings: Sequence[np.ndarray]) -> Clips:
    """Recordings that are `prepared`, as clips without labels on the encoder's device."""
    return Clips.pack(
        np.concatenate(recordings),
        [len(joints) for joints in recordings],
        [-1] * len(recordings),
        encoder.skeleton,
        where="recording",
        device=next(encoder.parameters()).device,
    )
