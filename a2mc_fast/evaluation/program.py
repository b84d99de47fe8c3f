"""An encoder as a program that runs without this package: a recording in, its feature out.

`data.normalize.normalized` and the centre crop are written once more, in operations of which none depends on
a value, so that a program for any number of frames can hold them. Matrices over pairs of frames stand for
searches. Legend: T frames · M persons · V joints.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from a2mc_fast.data.normalize import MARGIN, PARALLEL
from a2mc_fast.errors import InputError
from a2mc_fast.evaluation.crops import center_positions
from a2mc_fast.evaluation.inference import ClipEncoder
from a2mc_fast.files import atomic_path

_EXAMPLE_FRAMES = 48


class Program(nn.Module):
    """A recording as the sensor gives it, of the encoder's persons: joints [T, M, V, 3] metres, float32 ->
    [feature_dim]. It checks nothing: the feature of a recording without centre or axes says nothing."""

    named: Tensor  # [K, V]
    targets: Tensor  # [2, 3]

    def __init__(self, encoder: ClipEncoder) -> None:
        super().__init__()
        self.encoder, self.skeleton = encoder, encoder.skeleton
        s = encoder.skeleton
        # the joints that a body may be counted from, in the order of choice
        order = list(dict.fromkeys((s.root, s.center, *s.axis_z, *s.axis_x)))
        self.register_buffer("named", torch.eye(s.num_joints)[order], persistent=False)
        targets = torch.tensor([[0, 0, 1], [1, 0, 0]], dtype=torch.float64)
        self.register_buffer("targets", targets, persistent=False)

    def forward(self, joints: Tensor) -> Tensor:
        steps = torch.arange(joints.shape[0], device=joints.device)
        count = (steps[-1:] + 1).clamp_max(self.skeleton.max_frames)  # [1] frames that are looked at
        joints = self._normalized(joints, steps, steps < count)
        position = center_positions(count, self.encoder.frames)[0]
        before = position.floor()
        row, weight = before.long(), (position - before).view(-1, 1, 1, 1)
        x = joints[row] * (1 - weight) + joints[(row + 1).minimum(count - 1)] * weight
        return self.encoder.branch.feature(x.permute(0, 3, 2, 1).unsqueeze(0))[0].float()

    def _normalized(self, joints: Tensor, steps: Tensor, kept: Tensor) -> Tensor:
        """`normalized` of the frames that are kept [T]; what is in the others does not matter."""
        there = (joints != 0).any(3) & kept.view(-1, 1, 1)  # [T, M, V]
        cycle = _filling(there.any(2), steps).unsqueeze(2).expand_as(there)
        there = there.gather(0, cycle)
        joints = joints.gather(0, cycle.unsqueeze(3).expand_as(joints))
        there = there | self._counted_from(joints, there, kept)
        # the centre, or the joint on the other side where it is never there
        center = self.skeleton.center
        sides = torch.tensor((center, self.skeleton.mirror[center]), device=joints.device)
        found = (there[:, 0, sides] & kept.unsqueeze(1)).any(0)
        center_joint = torch.where(~found[:1] & found[1:], sides[1:], sides[:1])
        has = there[:, 0].index_select(1, center_joint)[:, 0] & kept
        distance = (steps.unsqueeze(1) - steps).abs().float() + 1e9 * (~has).float()
        origin = joints[:, 0].index_select(1, center_joint)[:, 0][distance.argmin(1)]
        joints = (joints - origin.view(-1, 1, 1, 3)) * there.unsqueeze(3)
        if self.skeleton.rotation == "none":
            return joints
        turn = torch.eye(3, dtype=torch.float64, device=joints.device)
        for (start, end), target in zip((self.skeleton.axis_z, self.skeleton.axis_x), self.targets):
            vectors = joints[:, 0, end].double() - joints[:, 0, start]
            usable = there[:, 0, start] & there[:, 0, end] & (vectors.norm(dim=1) > PARALLEL)
            # one element, since torch 2.11 takes an index without dimensions for a number to be known
            first = usable.float().argmax(0, keepdim=True)
            vector = torch.where(usable.any(), vectors[first][0], 0.0)
            turn = _rotation_onto(turn @ vector, target) @ turn
        flat = ~(joints[..., 2] != 0).any()
        return torch.where(flat, joints, joints @ turn.T.float())

    def _counted_from(self, joints: Tensor, there: Tensor, kept: Tensor) -> Tensor:
        """The joints that are at zero because the body is counted from them. -> bool [T, M, V]"""
        seen = there.any(2) & kept.unsqueeze(1)  # [T, M]
        never = ~there.any(0)  # [M, V]
        candidates = never.float() @ self.named.T  # [M, K]
        first = candidates * (candidates.cumsum(1) == 1)
        alone = never & (never.sum(1, keepdim=True) == 1) & ~(candidates > 0).any(1, keepdim=True)
        chosen = (first @ self.named > 0) | alone
        low = torch.where(there.unsqueeze(3), joints, torch.inf).amin(2)  # [T, M, 3]
        high = torch.where(there.unsqueeze(3), joints, -torch.inf).amax(2)
        margin = MARGIN * (high - low).norm(dim=2, keepdim=True)
        inside = ((low <= margin) & (high >= -margin)).all(2) & seen
        return (chosen & (2 * inside.sum(0) > seen.sum(0)).unsqueeze(1)).unsqueeze(0) & seen.unsqueeze(2)


def _filling(seen: Tensor, steps: Tensor) -> Tensor:
    """The frame that is read in place of each: a person's own, repeated in a cycle. seen [T, M] -> [T, M]"""
    ranks = seen.long().cumsum(0)  # [T, M]
    last = (steps.unsqueeze(1) * seen).amax(0)
    late = steps.unsqueeze(1) % ranks[-1].clamp_min(1)
    # the frame of that rank is as many as have a lower one or the same
    place = (ranks.unsqueeze(0) <= late.unsqueeze(1)).sum(1).minimum(steps[-1])
    return torch.where(seen[0], steps.unsqueeze(1) % (last + 1), place)


def _rotation_onto(vector: Tensor, target: Tensor) -> Tensor:
    """`normalize._rotation_onto`: the smallest rotation of `vector` to a unit vector, float64 [3, 3]."""
    axis = torch.linalg.cross(vector, target)
    length, along = axis.norm(), vector @ target
    turned = (axis.abs().sum() >= PARALLEL) & ((length >= PARALLEL * along) | (along <= 0))
    p, q, r = (axis / torch.where(turned, length, 1.0)).unbind()
    zero, identity = torch.zeros_like(p), torch.eye(3, dtype=vector.dtype, device=vector.device)
    cross = torch.stack((zero, -r, q, r, zero, -p, -q, p, zero)).view(3, 3)
    size = torch.where(turned, vector.norm(), 1.0)
    rotation = identity + length / size * cross + (1 - along / size) * (cross @ cross)
    return torch.where(turned, rotation, identity)


def export(encoder: ClipEncoder, path: Path) -> None:
    """Write the encoder as a `Program`, by `torch.export` (.pt2) or as ONNX (.onnx), whole or not at all.

    `torch.export.load(path).module()(joints)` gives the feature; what it expects is told by the archive's
    extra file a2mc.json, in ONNX by the model's metadata "a2mc". `InputError` where a package is missing.
    """
    if path.suffix == ".onnx":
        try:
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise InputError(f"--export {path} needs more: pip install 'a2mc_fast[onnx]' ({error})") from None
    shape = (_EXAMPLE_FRAMES, encoder.persons, encoder.skeleton.num_joints, 3)
    about = {
        "joints": "[T, M, V, 3] float32, metres, as recorded",
        "shape": ["T", *shape[1:]],
        "feature_dim": encoder.feature_dim,
        "stream": encoder.config.stream,
        "encoder": encoder.config.encoder.name,
    }
    with warnings.catch_warnings():
        # a recurrent layer keeps a list of its weights beside them, which is of no concern here
        warnings.filterwarnings("ignore", message="The tensor attributes? .*_flat_weights")
        exported = torch.export.export(
            Program(encoder).eval(),
            (torch.zeros(shape, device=next(encoder.parameters()).device),),
            dynamic_shapes=({0: torch.export.Dim("frames")},),
            strict=False,
        )
    if path.suffix == ".pt2":
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            torch.export.save(exported, file, extra_files={"a2mc.json": json.dumps(about)})
        return
    made = torch.onnx.export(exported, input_names=["joints"], output_names=["feature"], verbose=False)
    assert made is not None
    made.model.metadata_props["a2mc"] = json.dumps(about)
    with atomic_path(path) as temporary:
        made.save(temporary, external_data=False)
