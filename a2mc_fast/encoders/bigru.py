"""BiGRU: the paper's main encoder (ISC, CMD, PCM3, CrosSCLR-B). Clips in, a feature of their time steps out.

The reference feeds its bidirectional GRU one frame at a time and carries the hidden state, so both direction
weights run *forward* in time. That equals, per layer, two independent GRUs over the whole sequence with their
outputs concatenated, which is how `time_mode="forward_pair"` computes it: six calls instead of T small ones.
`"bidirectional"` is the true time reversal, with the feature [last forward ; first backward].

With `pool="mean"` the feature is the mean output over time. The last output of a GRU that nothing has trained
tells clips hardly apart, so that short runs on small sets would spend their steps on leaving that start. The
mean in turn knows little of the order in time, and nothing of how much an output moves; "mean+last+std" has
all three, one beside the other. They differ in size, so that a normalised feature (`branch.FeatureNorm`) is
what lets the head and cosine similarities see each of them.

The layers are torch's, which are cuDNN's on a GPU, or fused kernels that run both directions at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from a2mc_fast.encoders.branch import Encoder, Recurrence, per_view
from a2mc_fast.encoders.fused import fused
from a2mc_fast.skeleton import Skeleton

Pool = Literal["last", "mean", "mean+last", "mean+last+std"]
_SMALLEST = 1e-4  # variance over time: below, its root would be too steep
_CUDNN_WITH_BF16 = 91300  # the version from which torch hands it bf16

# lower precisions copy the weights in any case
warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")


class BiGRU(Encoder):
    """x [N, T, C, V, M] -> [N, feature_dim], 2 hidden or twice that, for any number of frames."""

    recurrence: Recurrence = "torch"

    def __init__(
        self,
        skeleton: Skeleton,
        *,
        persons: int = 2,
        frames: int = 64,
        hidden: int = 1024,
        layers: int = 3,
        time_mode: Literal["forward_pair", "bidirectional"] = "forward_pair",
        pool: Pool = "last",
        input_norm: bool = True,
    ) -> None:
        super().__init__()
        self.persons = persons
        self.input_dim = 3 * skeleton.num_joints * persons
        self.hidden, self.time_mode, self.pool = hidden, time_mode, pool
        self.feature_dim = 2 * hidden * len(pool.split("+"))
        self.input_norm = nn.BatchNorm1d(self.input_dim) if input_norm else None
        # one module per layer and direction; "bidirectional" runs the second one over reversed time
        self.directions = nn.ModuleList(
            nn.ModuleList(nn.GRU(width, hidden, batch_first=True) for _ in range(2))
            for width in [self.input_dim, *[2 * hidden] * (layers - 1)]
        )
        for name, weight in self.named_parameters():
            if ".weight_" in name:
                nn.init.xavier_uniform_(weight)  # over the whole stacked matrix of three gates (ISC, CMD)

    def forward(self, x: Tensor, views: int = 1) -> Tensor:
        """x [N, T, C, V, M], or several views one after another, each normalised by its own statistics."""
        sequence = self.normed(x, views)
        with self.arithmetic(sequence) as dtype:
            return self.recur(sequence, dtype)

    def normed(self, x: Tensor, views: int = 1) -> Tensor:
        """The layers' input. -> [N, T, C*V*M]"""
        sequence = x.flatten(2)
        if self.input_norm is not None:
            sequence = per_view(self.input_norm, sequence.flatten(0, 1), views).view(sequence.shape)
        return sequence

    @contextmanager
    def arithmetic(self, sequence: Tensor) -> Iterator[torch.dtype]:
        """Inside, the layers run in this type.

        Autocast itself would run cuDNN's recurrent layers in float16, whatever it was asked for, where the
        attack's gradients of early frames are zero.
        """
        low, dtype = sequence.is_cuda and torch.is_autocast_enabled("cuda"), sequence.dtype
        if low:
            dtype = recurrent_dtype() if self.recurrence == "torch" else torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", enabled=False) if low else nullcontext():
            yield dtype

    def recur(self, sequence: Tensor, dtype: torch.dtype) -> Tensor:
        """The layers over a sequence [N, T, W], computed in `dtype` -> [N, feature_dim]"""
        if self.recurrence != "torch":
            return fused((self,), (sequence,), dtype).squeeze(0)
        if self.time_mode == "forward_pair":
            for ahead, also_ahead in self._pairs():
                sequence = torch.cat([outputs(gru, sequence, dtype) for gru in (ahead, also_ahead)], 2)
        else:
            for ahead, back in self._pairs():
                reverse = outputs(back, sequence.flip(1), dtype).flip(1)
                sequence = torch.cat((outputs(ahead, sequence, dtype), reverse), 2)
        return self.pooled(sequence)

    def pooled(self, states: Tensor) -> Tensor:
        """The feature. states [N, T, 2 hidden], or [G, T, N, 2 hidden] -> without T"""
        last = states[:, -1]
        if self.time_mode == "bidirectional":
            last = torch.cat((last[..., : self.hidden], states[:, 0, ..., self.hidden :]), -1)
        if self.pool == "last":
            return last
        mean = states.mean(1)
        if self.pool == "mean":
            return mean
        parts = [mean, last]
        if self.pool == "mean+last+std":
            # torch's own variance takes a CPU several times as long
            variance = (states - mean.unsqueeze(1)).square().mean(1)
            parts.append((variance + _SMALLEST).sqrt())
        return torch.cat(parts, -1)

    def _pairs(self) -> list[tuple[nn.GRU, nn.GRU]]:
        """The two directions of each layer."""
        return [(pair[0], pair[1]) for pair in self.directions]  # type: ignore[index]


def outputs(gru: nn.GRU, sequence: Tensor, dtype: torch.dtype) -> Tensor:
    """Every output of a one-layer GRU, computed in `dtype`. [N, T, W] -> [N, T, H] of that type"""
    weights: list[Tensor] = gru._flat_weights  # type: ignore[assignment]
    if dtype == weights[0].dtype:
        return gru(sequence.to(dtype))[0]
    start = sequence.new_zeros(1, len(sequence), gru.hidden_size, dtype=dtype)
    low = [weight.to(dtype) for weight in weights]
    return torch._VF.gru(sequence.to(dtype), start, low, True, 1, 0.0, gru.training, False, True)[0]


def recurrent_dtype() -> torch.dtype:
    """What autocast asks for on a GPU, or float32 where its cuDNN has no recurrent layers in bf16."""
    asked = torch.get_autocast_dtype("cuda")
    too_old = (torch.backends.cudnn.version() or 0) < _CUDNN_WITH_BF16
    return torch.float32 if asked == torch.bfloat16 and too_old else asked
