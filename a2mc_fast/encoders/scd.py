"""SCD-Net's encoder, "GCN & Transformer": tokens of frames and tokens of joints, each with a transformer.

    clip ─┬─► CTR-GCN stack ─► T tokens, one per frame   ─► MLP ─► transformer ─► maximum ─► v_t ┐
          └─► CTR-GCN stack ─► M V tokens, one per joint ─► MLP ─► transformer ─► maximum ─► v_s ┴─► v_i

v_i = [v_t ; v_s] is the feature; the three are contrasted across levels: v_t and v_s with v_i. Persons are
separate rows of the graph convolutions and meet in the tokens. (SCD-Net, AAAI 2024; CTR-GCN, ICCV 2021)
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from a2mc_fast.encoders.branch import Encoder
from a2mc_fast.encoders.graph import directed_partitions
from a2mc_fast.errors import require
from a2mc_fast.skeleton import Skeleton

_CHANNELS = (3, 64, 256, 64)
_HEADS = 8
_DROPOUT = 0.1


class SCDNet(Encoder):
    """x [N, T, C, V, M] -> [N, 2 width], for the number of frames it was built for."""

    pairs = (("t", "i"), ("s", "i"), ("i", "t"), ("i", "s"))

    def __init__(self, skeleton: Skeleton, *, persons: int = 2, frames: int = 64, width: int = 2048) -> None:
        super().__init__()
        require(
            width % _HEADS == 0,
            f"--encoder.width {width} must be a multiple of SCD-Net's {_HEADS} attention heads",
        )
        self.clip_shape = (frames, _CHANNELS[0], skeleton.num_joints, persons)
        self.feature_dim = 2 * width
        self.levels = {"t": slice(0, width), "s": slice(width, 2 * width), "i": slice(None)}
        self.head_hidden = width
        self.temporal_graph = GraphStack(skeleton, persons)
        self.spatial_graph = GraphStack(skeleton, persons)
        self.temporal = TokenTransformer(persons * skeleton.num_joints * _CHANNELS[-1], width)
        self.spatial = TokenTransformer(frames * _CHANNELS[-1], width)

    def encode(self, x: Tensor) -> Tensor:
        require(
            tuple(x.shape[1:]) == self.clip_shape,
            f"this SCD-Net reads clips [N, T, C, V, M] = [N, {', '.join(map(str, self.clip_shape))}], "
            f"got {list(x.shape)}; build it for the clip's frames, joints and persons",
        )
        frames = self.temporal_graph(x).permute(0, 3, 1, 4, 2).flatten(2)
        joints = self.spatial_graph(x).permute(0, 1, 4, 3, 2).flatten(3).flatten(1, 2)
        # frames [N, T, M V C], joints [N, M V, T C]
        return torch.cat((self.temporal(frames), self.spatial(joints)), 1)


class GraphStack(nn.Module):
    """Three CTR-GCN blocks over joints and frames. x [N, T, 3, V, M] -> [N, M, 64, T, V]"""

    def __init__(self, skeleton: Skeleton, persons: int) -> None:
        super().__init__()
        self.input_norm = nn.BatchNorm1d(persons * skeleton.num_joints * _CHANNELS[0])
        partitions = directed_partitions(skeleton.parents)
        self.blocks = nn.Sequential(
            *(
                GraphBlock(channels, out, partitions, residual=i > 0)
                for i, (channels, out) in enumerate(pairwise(_CHANNELS))
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_norm(x.flatten(2).flatten(0, 1)).view(x.shape)  # over C, V and M
        x = x.permute(0, 4, 2, 1, 3)  # [N, M, C, T, V]
        return self.blocks(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class GraphBlock(nn.Module):
    """Graph convolution, then convolution over time. x [N, C, T, V] -> [N, out, T, V], out other than C"""

    def __init__(self, channels: int, out: int, partitions: Tensor, residual: bool) -> None:
        super().__init__()
        self.partitions = nn.Parameter(partitions.clone())
        self.alpha = nn.Parameter(torch.zeros(()))
        self.graphs = nn.ModuleList(TopologyRefinement(channels, out) for _ in partitions)
        self.graph_norm = nn.BatchNorm2d(out)
        nn.init.constant_(self.graph_norm.weight, 1e-6)
        self.graph_residual = nn.Sequential(_convolution(channels, out), nn.BatchNorm2d(out))
        self.time = MultiScaleTime(out)
        self.residual = nn.Sequential(_convolution(channels, out), nn.BatchNorm2d(out)) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        average = x.mean(2)
        mixed = sum(
            graph(x, average, partition, self.alpha)
            for graph, partition in zip(self.graphs, self.partitions.unbind())
        )
        y = self.time(F.relu(self.graph_norm(mixed) + self.graph_residual(x)))
        return F.relu(y if self.residual is None else y + self.residual(x))


class TopologyRefinement(nn.Module):
    """Mixes joints by a graph of each channel's own: a shared one plus `alpha` times learned relations.

    x [N, C, T, V], its mean over time [N, C, V], partition [V, V], alpha scalar -> [N, out, T, V]
    Row u of a graph is what joint u takes from every joint. (CTR-GC)
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        relations = 8 if channels == 3 else channels // 8
        self.relate = _convolution(channels, 2 * relations, parts=2)
        self.refine = _convolution(relations, out)
        self.value = _convolution(channels, out)

    def forward(self, x: Tensor, average: Tensor, partition: Tensor, alpha: Tensor) -> Tensor:
        # a 1x1 convolution of the mean is the mean of the convolution, at 1/T of the cost
        taker, giver = self.relate(average.unsqueeze(2)).squeeze(2).chunk(2, 1)  # [N, R, V] each
        relation = torch.tanh(taker.unsqueeze(3) - giver.unsqueeze(2))  # [N, R, V, V]
        # alpha scales the weights and not their result, which the backward pass would have to keep
        weight, bias = alpha * self.refine.weight, alpha * self.refine.bias  # type: ignore[operator]
        graph = F.conv2d(relation, weight, bias)
        graph = graph + partition.to(graph.dtype)
        return self.value(x) @ graph.transpose(2, 3)


class MultiScaleTime(nn.Module):
    """Time at four scales, a quarter of the channels each. x [N, C, T, V] -> same shape

    Two dilated convolutions, a maximum and the frame itself; their four 1x1 convolutions are one.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        quarter = channels // 4
        self.reduce = nn.Sequential(_convolution(channels, channels, parts=4), _temporal_norm(channels))
        self.near = nn.Sequential(_convolution(quarter, quarter, 5), _temporal_norm(quarter))
        self.far = nn.Sequential(_convolution(quarter, quarter, 5, dilation=2), _temporal_norm(quarter))
        self.peak = nn.Sequential(nn.MaxPool2d((3, 1), 1, (1, 0)), _temporal_norm(quarter))

    def forward(self, x: Tensor) -> Tensor:
        near, far, peak, frame = self.reduce(x).chunk(4, 1)
        return torch.cat((self.near(F.relu(near)), self.far(F.relu(far)), self.peak(F.relu(peak)), frame), 1)


class TokenTransformer(nn.Module):
    """Tokens [N, L, inputs] -> [N, width]: an MLP, one post-norm transformer layer, the maximum over tokens.

    No positions are added: a token's place shows in nothing but its content.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            nn.Linear(inputs, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width)
        )
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(_DROPOUT)
        self.mlp = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Dropout(_DROPOUT), nn.Linear(width, width)
        )
        self.mlp_norm = nn.LayerNorm(width)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(self.query_key_value.bias)
        nn.init.zeros_(self.output.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.attention_norm(x + self.dropout(self._attend(x)))
        x = self.mlp_norm(x + self.dropout(self.mlp(x)))
        return x.amax(1)

    def _attend(self, x: Tensor) -> Tensor:
        """Multi-head self-attention. [N, L, width] -> same shape"""
        query, key, value = (
            part.unflatten(2, (_HEADS, -1)).transpose(1, 2) for part in self.query_key_value(x).chunk(3, 2)
        )
        dropout = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)  # [N, heads, L, .]
        return self.output(mixed.transpose(1, 2).flatten(2))


def _convolution(channels: int, out: int, length: int = 1, *, dilation: int = 1, parts: int = 1) -> nn.Conv2d:
    """Over `length` frames, Kaiming-initialised as `parts` separate convolutions of out / parts channels."""
    padding = dilation * (length // 2)
    layer = nn.Conv2d(channels, out, (length, 1), padding=(padding, 0), dilation=(dilation, 1))
    for weight in layer.weight.data.chunk(parts):
        nn.init.kaiming_normal_(weight, mode="fan_out")
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def _temporal_norm(channels: int) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels)
    nn.init.normal_(layer.weight, 1, 0.02)
    return layer
