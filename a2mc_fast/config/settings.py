"""The groups of settings, as frozen dataclasses with the paper's values; `config.Config` holds one of each.

The docstring under a field is its help on the command line. Nothing here imports torch: `--help` is instant.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from a2mc_fast.errors import (
    Count,
    CountOrNone,
    Momentum,
    Range,
    Rate,
    Share,
    Temperature,
    check_ranges,
    require,
)

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewConfig:
    """How a clip becomes a view: temporal crop-resize, then spatial operations."""

    frames: Annotated[int, Range("[2, 10000]")] = 64
    """Frames T that every view is resized to."""
    min_ratio: Annotated[float, Range("(0, 1]")] = 0.1
    """Shortest temporal crop, as a share of the clip, in (0, 1]; never below `frames` frames."""
    shear: Annotated[float, Range("[0, 10]")] = 1.0
    """Off-diagonal entries of the pose (shear) matrix are uniform in ±this."""
    jitter: Share = 0.6
    """Share of the joints that jittering sets to zero or multiplies by a random matrix: 15 of 25."""
    augment: bool = True
    """Weak and strong views of the attacked clip give f1 and f2, or else the whole clip, only resized."""
    noise_std: Annotated[float, Range("[0, 10]")] = 0.01
    """Standard deviation of the noise, metres."""
    strong_p: Share = 0.5
    """Strong view: chance of each of swapping left and right joints, Gaussian noise, a Gaussian filter over
    time (length 15, sigma uniform in (0.1, 2)) and setting one axis to zero. It is always rotated."""

    def __post_init__(self) -> None:
        check_ranges(self, "views.")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """The backbone and its projection head."""

    name: str = "bigru"
    """Backbone: bigru, stgcn, dsta (DSTA-Net, a transformer), scd (SCD-Net's GCN & Transformer), or an own
    one as MODULE:CLASS (encoders/README.md)."""
    projection: Count = 128
    """Width D of the contrasted features."""
    feature_norm: bool = False
    """BatchNorm, without weights, over the feature that heads, protocols and `embed` see."""
    hidden: Count = 1024
    """BiGRU: hidden units per direction."""
    layers: Annotated[int, Range("[1, 100]")] = 3
    """BiGRU: layers."""
    time_mode: Literal["forward_pair", "bidirectional"] = "forward_pair"
    """BiGRU: two passes forward in time, as in the reference code, or true time reversal."""
    pool: Literal["last", "mean", "mean+last", "mean+last+std"] = "last"
    """BiGRU: what of its outputs is the feature: the last time step's, their mean over time, their standard
    deviation over time, or several of these, one beside the other."""
    input_norm: bool = True
    """BiGRU: BatchNorm over the input coordinates (CMD, PCM3 yes; ISC no)."""
    recurrence: Literal["auto", "cudnn", "fused", "resident"] = "auto"
    """BiGRU: recurrent layers by cuDNN or by fused Triton kernels; auto = on a GPU whichever is fastest,
    once the kernels have agreed with float64. On a CPU, torch's own. fused = a launch per time step,
    resident = one launch for each pass, where the GPU can hold the weights: forward, and of up to 128 hidden
    units backward, too."""
    channels: Count = 16
    """ST-GCN: channels of its first blocks."""
    size: Literal["full", "small"] = "full"
    """DSTA-Net: the public NTU configuration, or HiCLR's small one."""
    width: Count = 2048
    """SCD-Net: token width of its transformers."""

    def __post_init__(self) -> None:
        check_ranges(self, "encoder.")
        require(
            self.name in _ENCODER_OPTIONS or re.fullmatch(r"[\w.]+:\w+", self.name) is not None,
            f"encoder.name must be {', '.join(_ENCODER_OPTIONS)}, or MODULE:CLASS of an own one, "
            f"got {self.name!r:.80}",
        )
        require(
            self.recurrence == "auto" or self.name == "bigru",
            f"encoder.recurrence {self.recurrence} is for the BiGRU: leave it at auto for {self.name}",
        )

    @property
    def options(self) -> dict[str, Any]:
        """What the chosen backbone reads of these fields, as its class takes it."""
        return {name: getattr(self, name) for name in _ENCODER_OPTIONS.get(self.name, ())}


_ENCODER_OPTIONS = {
    "bigru": ("hidden", "layers", "time_mode", "pool", "input_norm"),
    "stgcn": ("channels",),
    "dsta": ("size",),
    "scd": ("width",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackConfig:
    """The targeted semantic attack (Eq. 5-6)."""

    lr: Rate = 0.1
    """Step size epsilon of Adam, metres."""
    radius: Annotated[float, Range("[0, 1000]")] = 0.5
    """Largest norm eta of the perturbation of one person in one frame, metres; 0 = no attack."""
    classes: CountOrNone = 0
    """Outputs C of the frozen class layer; 0 = the number of classes of the data."""

    def __post_init__(self) -> None:
        check_ranges(self, "attack.")
        require(self.classes != 1, "attack.classes must be 0 or >= 2, got 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """Mixing contrast (Eq. 8-11)."""

    temperature: Temperature = 0.07
    """Softmax temperature tau of the loss."""
    mix: tuple[Annotated[float, Range("(0, 1)")], ...] = (0.4, 0.3, 0.2, 0.1)
    """Shares lambda of the positive feature in the mixed banks; none = the plain bank alone."""
    weak: Literal["contrast", "off"] = "contrast"
    """L1: InfoNCE of f1, or nothing."""
    strong: Literal["distill", "contrast", "off"] = "distill"
    """L2: f2's distribution pulled to f3's, or InfoNCE of f2, or nothing."""

    def __post_init__(self) -> None:
        check_ranges(self, "loss.")


@dataclass(frozen=True, slots=True, kw_only=True)
class BankConfig:
    """The memory bank of negatives (Eq. 7)."""

    kind: Literal["gradient", "fifo"] = "gradient"
    """Rows that ascend the loss, or a first-in-first-out queue of keys."""
    size: Annotated[int, Range("[1, 1e8]")] = 16384
    """Rows K."""
    lr: Annotated[float, Range("[1e-9, 1e6]")] = 3.0
    """Step size beta of the ascent, times K / 16,384: a row's share of the softmax, hence its gradient, goes
    as 1/K."""
    temperature: Temperature = 0.03
    """Softmax temperature tau_m of the ascent."""
    momentum: Momentum = 0.9
    """Momentum of the ascent."""
    weight_decay: Share = 1e-4
    """Weight decay of the ascent."""
    refresh: CountOrNone = 0
    """Keys of each batch, at most all, that replace the oldest rows after the ascent, so that no row outlives
    K / refresh steps; 0 = none, as in the paper. In short runs the encoder outruns the rows."""
    warmup_steps: Annotated[int, Range("[-1, 1e9]")] = -1
    """MoCo steps before mixing, attack and ascent begin; -1 = just enough to fill the rows, ceil(K / N)."""

    def __post_init__(self) -> None:
        check_ranges(self, "bank.")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """SGD, its schedule, and the key encoder's moving average."""

    batch_size: Annotated[int, Range("[2, 1e6]")] = 64
    """Clips N per step; the last partial batch of an epoch is dropped."""
    epochs: Count = 450
    """Passes over the training clips after the warm-up."""
    lr: Rate = 0.01
    """Learning rate."""
    ramp_steps: Annotated[int, Range("[0, 1e9]")] = 0
    """Steps over which the learning rate rises linearly to `lr` first."""
    milestones: tuple[CountOrNone, ...] = (350,)
    """Epochs after which the learning rate drops; those beyond `epochs` are never reached. None = it falls as
    half a cosine from the first step to the last."""
    gamma: Share = 0.1
    """Factor of each drop."""
    momentum: Momentum = 0.9
    """Momentum of SGD."""
    weight_decay: Share = 1e-4
    """Weight decay of SGD."""
    ema: Share = 0.999
    """Share of the key encoder kept at each step (Eq. 4)."""

    def __post_init__(self) -> None:
        check_ranges(self, "optim.")
        require(
            list(self.milestones) == sorted(set(self.milestones)),
            f"optim.milestones must ascend, got {self.milestones}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """How and where the run is made. These fields may change when a run is resumed."""

    out: str = ""
    """Run folder; empty = runs/PRESET."""
    device: Device = "auto"
    """auto = the GPU if there is one."""
    threads: CountOrNone = 0
    """CPU threads; 0 = torch's choice. One is as fast for a narrow encoder."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of views, loss, encoder (not of recurrent layers) and small operations; auto = on a GPU,
    where what the compiler refuses runs as it is written; on = a refusal ends the run."""
    graph: Literal["auto", "on", "off"] = "auto"
    """auto = on a GPU the whole step is captured as a CUDA graph and replayed, or launched if the capture is
    refused; on = a refusal ends the run; off = each operation is launched by the host, for debugging."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """Loss and banks by the fused Triton kernels or in plain torch; auto = Triton on a GPU, once it has
    agreed with float64 there."""
    timeout: Annotated[float, Range("[1, 1e6]")] = 60.0
    """Seconds after which a rank that does not answer ends the run on all ranks."""
    log_every: Count = 10
    """Steps between log lines."""
    eval_every: CountOrNone = 10
    """Epochs between kNN evaluations; 0 = only before and after training."""
    checkpoint_every: Count = 1
    """Epochs between checkpoints; the last step always saves."""
    keep_last: Count = 2
    """Newest checkpoints to keep; the one before the newest is what a damaged newest falls back to."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra `tensorboard`)."""

    def __post_init__(self) -> None:
        check_ranges(self, "run.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticConfig:
    """The built-in set, used when no data file is given."""

    clips: Annotated[int, Range("[2, 1e6]")] = 2000
    """Clips generated, training and test together, of 20 actions."""

    def __post_init__(self) -> None:
        check_ranges(self, "synthetic.")
