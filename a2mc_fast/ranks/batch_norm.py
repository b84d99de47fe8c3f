"""BatchNorm over the clips of all ranks, on CPUs and GPUs alike (torch's SyncBatchNorm knows GPUs only).

Every rank has as many values per channel. Means and variances are gathered and merged by the parallel
algorithm of Chan et al., which does not cancel as the mean of squares minus the squared mean would.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from a2mc_fast.ranks import World, stacked


class JointBatchNorm(_BatchNorm):
    """BatchNorm1d to 3d whose batch statistics are those of the joint batch. x [N, C, ...] -> like x"""

    def __init__(self, norm: _BatchNorm, ranks: int) -> None:
        """With the parameters and running statistics of `norm`."""
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.ranks = ranks
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.train(norm.training)

    def _check_input_dim(self, x: Tensor) -> None:
        """Whatever has channels in its second dimension."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        affine = (
            (self.weight, self.bias) if self.affine else (x.new_ones(x.shape[1]), x.new_zeros(x.shape[1]))
        )
        y, mean, variance = _Normalise.apply(x, *affine, self.eps, self.ranks)
        assert self.momentum is not None and self.running_mean is not None and self.running_var is not None
        with torch.no_grad():
            count = self.ranks * x.numel() // x.shape[1]
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
        return y


class _Normalise(torch.autograd.Function):
    """-> (normalised x, joint mean [C], joint biased variance [C]); no gradient passes the statistics."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, ranks: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        own_variance, own_mean = torch.var_mean(wide, _but_channels(x), correction=0)
        means, variances = stacked(torch.stack((own_mean, own_variance)), ranks).unbind(1)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.ranks = ranks
        ctx.mark_non_differentiable(mean, variance)
        centred = wide - _as_channels(mean, x)
        y = torch.addcmul(_as_channels(bias, x), centred, _as_channels(scale * weight, x))
        return y.to(x.dtype), mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        wide = grad.to(mean.dtype)
        centred = (x.to(mean.dtype) - _as_channels(mean, x)) * _as_channels(scale, x)
        over = _but_channels(x)
        own = torch.stack((wide.mean(over), (wide * centred).mean(over)))
        to_bias, to_weight = own * (x.numel() // x.shape[1])
        # what reaches the statistics comes from the clips of all ranks
        level, along = stacked(own, ctx.ranks).mean(0)
        to_x = wide - _as_channels(level, x) - centred * _as_channels(along, x)
        to_x = (to_x * _as_channels(scale * weight, x)).to(x.dtype)
        return to_x, to_weight.to(weight.dtype), to_bias.to(weight.dtype), None, None


def _but_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.ndim) if d != 1]


def _as_channels(values: Tensor, x: Tensor) -> Tensor:
    """[C] so that it meets the channels of x."""
    return values.view(-1, *[1] * (x.ndim - 2))


def join_batch_norms(module: nn.Module, world: World) -> None:
    """Replace every BatchNorm in `module` by one over all ranks; alone, nothing changes."""
    for parent in list(module.modules()) if not world.alone else ():
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                setattr(parent, name, JointBatchNorm(child, world.size))
