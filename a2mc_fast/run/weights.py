"""Encoders from elsewhere: a run, a checkpoint, or a released file of the CMD, ISC or PCM3 code.

A released file (`.pth.tar`) is a pickle of which only tensors and plain values are read; nothing in it is
executed. It counts as the checkpoint of a run of the paper's BiGRU on NTU's joints.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from a2mc_fast.config import Config, EncoderConfig, preset
from a2mc_fast.encoders.bigru import BiGRU
from a2mc_fast.encoders.branch import Branch
from a2mc_fast.errors import InputError, first_line, require
from a2mc_fast.model import A2MC
from a2mc_fast.run import checkpoint
from a2mc_fast.run.checkpoint import Checkpoint
from a2mc_fast.skeleton import NTU25

_RELEASED = (".tar", ".pth", ".pt")
_FIRST = "encoder.gru.weight_ih_l0"
_PERSONS = 2


def load(path: Path) -> Checkpoint:
    """A run's newest checkpoint, a checkpoint, or a released file as one. `InputError` if it is none."""
    if path.suffix not in _RELEASED or path.is_dir():
        return checkpoint.load(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, AttributeError) as error:
        raise InputError(f"{path} holds more than tensors, or is damaged ({first_line(error)})") from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} is not a state dict of tensors")
    return _released(path, state)


def _released(path: Path, state: dict[str, Tensor]) -> Checkpoint:
    """The checkpoint that such a run would have left, without heads and banks."""
    prefix = _query(state, str(path))
    first = state[prefix + _FIRST]
    width = 3 * NTU25.num_joints * _PERSONS
    require(
        first.ndim == 2 and first.shape[1] == width,
        f"{path}: its BiGRU reads {list(first.shape)[1:]} numbers a frame, not {width} of two persons with "
        "25 joints each",
    )
    layers = sum(f"{prefix}{_FIRST[:-1]}{layer}" in state for layer in range(len(state)))
    normed = f"{prefix}input_norm.weight" in state
    encoder = EncoderConfig(hidden=first.shape[0] // 3, layers=layers, input_norm=normed)
    try:
        bigru = BiGRU(NTU25, persons=_PERSONS, **encoder.options)
        load_reference(bigru, state)
    except (InputError, RuntimeError) as error:
        raise InputError(f"{path} is not whole: {first_line(error)}") from None
    require(all(bool(t.isfinite().all()) for t in bigru.parameters()), f"{path}: a weight is not finite")
    return Checkpoint(
        path=path,
        step=0,
        config=dataclasses.replace(preset("ntu60-xsub"), preset="released", encoder=encoder),
        skeleton=NTU25,
        persons=_PERSONS,
        classes=1,
        data="",
        progress={},
        scaler={},
        tensors={f"model.query.encoder.{name}": t for name, t in bigru.state_dict().items()},
    )


def _query(state: Mapping[str, Tensor], where: str) -> str:
    """What stands before the names of the query encoder's tensors. `InputError` unless there is just one."""
    prefixes = [name.removesuffix(_FIRST) for name in state if name.endswith(_FIRST)]
    query = [p for p in prefixes if not any(other in p for other in ("encoder_k", "motion", "bone"))]
    require(len(query) == 1, f"{where} holds no query encoder of CMD, ISC or PCM3 (*{_FIRST})")
    return query[0]


def load_reference(bigru: BiGRU, state: Mapping[str, Tensor]) -> None:
    """Take the weights of a released CMD, ISC or PCM3 query encoder.

    `state` is that code's state dict, as `torch.load(file, weights_only=True)["state_dict"]` gives it. Its
    `encoder.gru.*_l{k}` become direction 0 of layer k and `..._l{k}_reverse` direction 1; `input_norm.*`,
    where present, the input BatchNorm. Prefixes do not matter; other tensors (heads, queues) are not read.
    """
    prefix = _query(state, "the state dict")
    persons, width = bigru.persons, bigru.input_dim
    order = torch.arange(width).view(-1, 3, persons).transpose(0, 1).flatten()
    mapped: dict[str, Tensor] = {}
    for name in bigru.state_dict():
        source = prefix + name
        reads_input = name.startswith("input_norm.") and name != "input_norm.num_batches_tracked"
        if name.startswith("directions."):
            _, layer, direction, weight = name.split(".")
            kind = weight.removesuffix("_l0")
            source = f"{prefix}encoder.gru.{kind}_l{layer}" + ("_reverse" if direction == "1" else "")
            reads_input = layer == "0" and kind == "weight_ih"
        require(source in state, f"the reference state dict has no {source}")
        mapped[name] = state[source][..., order] if reads_input else state[source]
    bigru.load_state_dict(mapped)


def whole(saved: Checkpoint, device: torch.device | str = "cpu") -> A2MC:
    """The trained model, heads and banks included. `InputError` if it would not fit the file's tensors."""
    model = saved.fitting(
        lambda: A2MC(saved.config, saved.skeleton, saved.persons, saved.classes),
        saved.config.bank.size,
        saved.classes,
    )
    saved.restore(model)
    return model.to(device)


def begin_with(model: A2MC, config: Config) -> str:
    """Start both encoders of a new run with that of `config.init_from`; heads and banks stay new.

    Returns a sentence for the log. `InputError` for an encoder of another kind, width or skeleton.
    """
    source = load(Path(config.init_from))
    _copy(source, model.query)
    model.key.load_state_dict(model.query.state_dict())
    return f"encoder from {source.path}, step {source.step}"


def untrained(saved: Checkpoint, device: torch.device | str = "cpu") -> Branch:
    """A run's query encoder as it was before training: random, or that of its `init_from`."""
    branch = saved.branch(untrained=True)
    if saved.config.init_from:
        _copy(load(Path(saved.config.init_from)), branch)
    return branch.to(device)


def _copy(source: Checkpoint, target: Branch) -> None:
    def described(config: EncoderConfig) -> str:
        options = {"name": config.name, **config.options}
        options.pop("pool", None)  # which has no weights
        return ", ".join(f"{name} {value}" for name, value in options.items())

    held, asked = described(source.config.encoder), described(target.config.encoder)
    require(held == asked, f"{source.path} has {held}, but asked for is {asked}: set --encoder.* alike")
    state, own = source.branch().encoder.state_dict(), target.encoder.state_dict()
    # statistics of the feature, which one of them may be without
    state = {n: t for n, t in state.items() if n in own or not n.startswith("feature_norm.")}
    state |= {n: t for n, t in own.items() if n.startswith("feature_norm.") and n not in state}
    try:
        target.encoder.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(
            f"{source.path} is of {source.skeleton.num_joints} joints, {source.persons} persons and "
            f"--views.frames {source.config.views.frames}, which this run's are not: {reason}"
        ) from None
