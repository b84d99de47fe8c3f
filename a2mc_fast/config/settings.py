"""The groups of settings, as frozen dataclasses with the paper's values; `config.Config` holds one of each.

The docstring under a field is its help on the command line. Nothing here imports torch: `--help` is instant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from a2mc_fast.errors import require


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewConfig:
    """How a clip becomes a view: temporal crop-resize, then spatial operations."""

    frames: int = 64
    """Frames T that every view is resized to."""
    min_ratio: float = 0.1
    """Shortest temporal crop, as a share of the clip, in (0, 1]."""
    min_frames: int = 64
    """No crop is shorter than this many frames (or than the clip)."""
    shear: float = 1.0
    """Off-diagonal entries of the pose (shear) matrix are uniform in ±this."""
    jitter_share: float = 0.6
    """Share of joints that joint jittering corrupts: 15 of 25."""
    weak: Literal["weak", "none"] = "weak"
    """View of the attacked clip that gives f1; none = the whole clip, only resized."""
    strong: Literal["strong", "weak", "none"] = "strong"
    """View of the attacked clip that gives f2."""
    flip_p: float = 0.5
    """Strong view: chance of swapping left and right joints."""
    flip_mirror_x: bool = False
    """Also negate x when flipping; public code does not."""
    rotate_p: float = 1.0
    """Strong view: chance of a rotation (main axis up to 30 degrees, the others up to 1)."""
    noise_p: float = 0.5
    """Strong view: chance of additive Gaussian noise."""
    noise_std: float = 0.01
    """Standard deviation of the noise, metres."""
    noise_absent: bool = True
    """Add the noise to an absent (all-zero) person too, as public code does."""
    filter_p: float = 0.5
    """Strong view: chance of a Gaussian filter over time, length 15, sigma uniform in (0.1, 2)."""
    filter_normalize: bool = False
    """Let the filter's weights sum to one; public code does not, so it amplifies up to five times."""
    mask_p: float = 0.5
    """Strong view: chance of setting one axis to zero."""

    def __post_init__(self) -> None:
        require(self.frames >= 2, f"views.frames must be >= 2, got {self.frames}")
        require(self.min_frames >= 1, f"views.min_frames must be >= 1, got {self.min_frames}")
        require(0 < self.min_ratio <= 1, f"views.min_ratio must be in (0, 1], got {self.min_ratio}")
        require(0 <= self.jitter_share <= 1, f"views.jitter_share must be in [0, 1], got {self.jitter_share}")
        for name in ("flip_p", "rotate_p", "noise_p", "filter_p", "mask_p"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"views.{name} is a probability, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """The backbone and its projection head."""

    name: Literal["bigru", "stgcn", "dsta", "scd"] = "bigru"
    """Backbone: BiGRU, ST-GCN, DSTA-Net (Transformer), or SCD-Net's GCN & Transformer."""
    projection: int = 128
    """Width D of the contrasted features."""
    batch_norm: Literal["joint", "local"] = "joint"
    """Several ranks: BatchNorm over the joint batch, which equals one process, or over each rank's own clips,
    which saves messages; running statistics are averaged then."""
    hidden: int = 1024
    """BiGRU: hidden units per direction."""
    layers: int = 3
    """BiGRU: layers."""
    time_mode: Literal["forward_pair", "bidirectional"] = "forward_pair"
    """BiGRU: two passes forward in time, as in the reference code, or true time reversal."""
    pool: Literal["last", "mean"] = "last"
    """BiGRU: what of its outputs is the feature, that of the last time step or their mean over time."""
    input_norm: bool = True
    """BiGRU: BatchNorm over the input coordinates (CMD, PCM3 yes; ISC no)."""
    recurrence: Literal["auto", "cudnn", "fused", "resident"] = "auto"
    """BiGRU: recurrent layers by cuDNN or by fused Triton kernels; auto = on a GPU whichever is faster there,
    once the kernels have agreed with float64. On a CPU, torch's own. resident = fused, with each forward pass
    in one launch where the GPU can hold the weights; no GPU has run it yet, so auto leaves it out."""
    channels: int = 16
    """ST-GCN: channels of its first blocks."""
    partition: Literal["hop_clipped", "tree"] = "hop_clipped"
    """ST-GCN: neighbours by distance to the centre as public code clips it, or by true tree distance."""
    size: Literal["full", "small"] = "full"
    """DSTA-Net: the public NTU configuration, or HiCLR's small one."""
    temporal_attention: bool = False
    """DSTA-Net: attention over time instead of the temporal convolution."""
    width: int = 2048
    """SCD-Net: token width of its transformers."""
    heads: int = 8
    """SCD-Net: attention heads."""

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "projection", "channels", "width", "heads"):
            require(getattr(self, name) >= 1, f"encoder.{name} must be >= 1, got {getattr(self, name)}")
        require(
            self.width % self.heads == 0,
            f"encoder.width {self.width} must be a multiple of encoder.heads {self.heads}",
        )
        require(
            self.recurrence == "auto" or self.name == "bigru",
            f"encoder.recurrence {self.recurrence} is for the BiGRU: leave it at auto for {self.name}",
        )

    @property
    def options(self) -> dict[str, Any]:
        """What the chosen backbone reads of these fields, as its class takes it."""
        return {name: getattr(self, name) for name in _ENCODER_OPTIONS[self.name]}


_ENCODER_OPTIONS = {
    "bigru": ("hidden", "layers", "time_mode", "pool", "input_norm"),
    "stgcn": ("channels", "partition"),
    "dsta": ("size", "temporal_attention"),
    "scd": ("width", "heads"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackConfig:
    """The targeted semantic attack (Eq. 5-6)."""

    enabled: bool = True
    """Attack the clip before the weak and strong views."""
    lr: float = 0.1
    """Step size epsilon of Adam, metres."""
    radius: float = 0.5
    """Largest norm eta of the perturbation of one person in one frame, metres."""
    classes: int = 0
    """Outputs C of the frozen class layer; 0 = the number of classes of the data."""

    def __post_init__(self) -> None:
        require(self.lr > 0, f"attack.lr must be > 0, got {self.lr}")
        require(self.radius > 0, f"attack.radius must be > 0, got {self.radius}")
        require(
            self.classes == 0 or self.classes >= 2, f"attack.classes must be 0 or >= 2, got {self.classes}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """Mixing contrast (Eq. 8-11)."""

    temperature: float = 0.07
    """Softmax temperature tau of the loss."""
    mix: tuple[float, ...] = (0.4, 0.3, 0.2, 0.1)
    """Shares lambda of the positive feature in the mixed banks; none = the plain bank alone."""
    weak: Literal["contrast", "off"] = "contrast"
    """L1: InfoNCE of f1, or nothing."""
    strong: Literal["distill", "contrast", "off"] = "distill"
    """L2: f2's distribution pulled to f3's, or InfoNCE of f2, or nothing."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, f"loss.temperature must be > 0, got {self.temperature}")
        require(all(0 < share < 1 for share in self.mix), f"loss.mix must lie in (0, 1), got {self.mix}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BankConfig:
    """The memory bank of negatives (Eq. 7)."""

    kind: Literal["gradient", "fifo"] = "gradient"
    """Rows that ascend the loss, or a first-in-first-out queue of keys."""
    size: int = 16384
    """Rows K."""
    lr: float = 3.0
    """Step size beta of the ascent at K = 16,384."""
    lr_scaling: bool = True
    """Multiply `lr` by K / 16,384, because a row's share of the softmax, hence its gradient, goes as 1/K."""
    temperature: float = 0.03
    """Softmax temperature tau_m of the ascent."""
    momentum: float = 0.9
    """Momentum of the ascent."""
    weight_decay: float = 1e-4
    """Weight decay of the ascent."""
    refresh: int = 0
    """Keys of each batch, at most all, that replace the oldest rows after the ascent, so that no row outlives
    K / refresh steps; 0 = none, as in the paper. In short runs the encoder outruns the rows."""
    warmup_steps: int = -1
    """MoCo steps before mixing, attack and ascent begin; -1 = just enough to fill the rows, ceil(K / N)."""

    def __post_init__(self) -> None:
        require(self.size >= 1, f"bank.size must be >= 1, got {self.size}")
        require(self.lr > 0, f"bank.lr must be > 0, got {self.lr}")
        require(self.temperature > 0, f"bank.temperature must be > 0, got {self.temperature}")
        require(0 <= self.momentum < 1, f"bank.momentum must be in [0, 1), got {self.momentum}")
        require(self.weight_decay >= 0, f"bank.weight_decay must be >= 0, got {self.weight_decay}")
        require(self.refresh >= 0, f"bank.refresh must be >= 0, got {self.refresh}")
        require(self.warmup_steps >= -1, f"bank.warmup_steps must be >= 0, or -1, got {self.warmup_steps}")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """SGD, its schedule, and the key encoder's moving average."""

    batch_size: int = 64
    """Clips N per step; the last partial batch of an epoch is dropped."""
    epochs: int = 450
    """Passes over the training clips after the warm-up."""
    lr: float = 0.01
    """Learning rate."""
    schedule: Literal["milestones", "cosine"] = "milestones"
    """How the learning rate falls: at the milestones, or as half a cosine from the first step to the last."""
    ramp_steps: int = 0
    """Steps over which the learning rate rises linearly to `lr` first."""
    milestones: tuple[int, ...] = (350,)
    """Epochs after which the learning rate drops; those beyond `epochs` are never reached."""
    gamma: float = 0.1
    """Factor of each drop."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 1e-4
    """Weight decay of SGD."""
    ema: float = 0.999
    """Share of the key encoder kept at each step (Eq. 4)."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 2, f"optim.batch_size must be >= 2, got {self.batch_size}")
        require(self.epochs >= 1, f"optim.epochs must be >= 1, got {self.epochs}")
        require(self.lr > 0, f"optim.lr must be > 0, got {self.lr}")
        require(self.ramp_steps >= 0, f"optim.ramp_steps must be >= 0, got {self.ramp_steps}")
        require(0 <= self.ema <= 1, f"optim.ema must be in [0, 1], got {self.ema}")
        require(
            list(self.milestones) == sorted(set(self.milestones)) and all(m >= 0 for m in self.milestones),
            f"optim.milestones must ascend, got {self.milestones}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """How and where the run is made. These fields may change when a run is resumed."""

    out: str = ""
    """Run folder; empty = runs/PRESET."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = the GPU if there is one."""
    threads: int = 0
    """CPU threads; 0 = torch's choice. One is as fast for a narrow encoder."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of views, loss and encoder (not of recurrent layers); auto = on a GPU, where what the
    compiler refuses runs as it is written; on = a refusal ends the run."""
    graph: Literal["auto", "on", "off"] = "auto"
    """auto = on a GPU the whole step is captured as a CUDA graph and replayed, or launched if the capture is
    refused; on = a refusal ends the run; off = each operation is launched by the host, for debugging."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """Loss and banks by the fused Triton kernels or in plain torch; auto = Triton on a GPU, once it has
    agreed with float64 there."""
    timeout: float = 60.0
    """Seconds after which a rank that does not answer ends the run on all ranks."""
    log_every: int = 10
    """Steps between log lines."""
    eval_every: int = 10
    """Epochs between kNN evaluations; 0 = only before and after training."""
    checkpoint_every: int = 1
    """Epochs between checkpoints; the last step always saves."""
    keep_last: int = 2
    """Newest checkpoints to keep; the one before the newest is what a damaged newest falls back to."""
    keep_every: int = 0
    """Also keep, and make, a checkpoint every so many epochs; 0 = none."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra `tensorboard`)."""
    progress: bool = True
    """Show the progress bar."""

    def __post_init__(self) -> None:
        require(self.threads >= 0, f"run.threads must be >= 0, got {self.threads}")
        require(self.timeout > 0, f"run.timeout must be > 0, got {self.timeout}")
        require(self.log_every >= 1, f"run.log_every must be >= 1, got {self.log_every}")
        require(self.eval_every >= 0, f"run.eval_every must be >= 0, got {self.eval_every}")
        require(self.checkpoint_every >= 1, f"run.checkpoint_every must be >= 1, got {self.checkpoint_every}")
        require(self.keep_last >= 1, f"run.keep_last must be >= 1, got {self.keep_last}")
        require(self.keep_every >= 0, f"run.keep_every must be >= 0, got {self.keep_every}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticConfig:
    """The built-in set, used when no data file is given."""

    clips: int = 2000
    """Clips generated, training and test together."""
    classes: int = 20
    """Actions."""
    seed: int = 0
    """Seed of the generator."""
