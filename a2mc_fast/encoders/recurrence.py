"""How a run computes its recurrent layers: by cuDNN or by one of the forms of the fused kernels, whichever is
fastest there.

The kernels are compared with float64 on the run's own width first, and then all are timed on what one step
does with them: the key's pass, the attack's with the gradient of its input, the query's with all gradients.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

import a2mc_fast.kernels as kernels
from a2mc_fast.config import Config
from a2mc_fast.encoders.bigru import BiGRU, recurrent_dtype
from a2mc_fast.encoders.branch import Encoder, Recurrence, frozen, weights_held
from a2mc_fast.encoders.fused import fused
from a2mc_fast.errors import first_line, require

_NAMES = {
    "torch": "cuDNN",
    "fused": "fused kernels",
    "resident": "fused kernels with all time steps in one launch",
}
_ROUNDS = 5


def no_triton() -> bool:
    """Whether Triton is missing, which builds of torch for GPUs bring."""
    return importlib.util.find_spec("triton") is None


def require_kernels(flag: str, otherwise: str, device: torch.device) -> None:
    """`InputError` where the Triton kernels that a flag asks for cannot run."""
    require(
        not no_triton(), f"{flag} needs triton, which is not installed: pip install triton, or {otherwise}"
    )
    require(
        device.type == "cuda" or kernels.common.INTERPRET,
        f"{flag} needs a GPU: {otherwise} (Triton's interpreter, with TRITON_INTERPRET=1, is for tests)",
    )


def choose_recurrence(
    config: Config, encoder: Encoder, device: torch.device, clips: int, before: Recurrence | None = None
) -> tuple[Recurrence, str]:
    """What computes the recurrent layers, and why, as a sentence for the log or "".

    `auto` takes fused kernels on a GPU, of the fastest form, if they agree with float64 there and are faster
    than cuDNN, with so many `clips` of a batch on this device. A run that goes on keeps what it had `before`,
    faster or not, for the bits would be others; where it cannot, the sentence says so.
    """
    asked = config.encoder.recurrence
    if asked in ("fused", "resident"):
        require_kernels(f"--encoder.recurrence {asked}", "leave it at auto", device)
    if asked != "auto":
        return ("torch" if asked == "cudnn" else asked), ""
    others = (
        "; until now it was the other, so from here on the run's last bits are not those it would have had"
    )
    if device.type != "cuda" or not isinstance(encoder, BiGRU) or no_triton():
        changed = before not in (None, "torch")
        note = f"recurrent layers by torch, not by fused kernels, which need a GPU and triton{others}"
        return "torch", note if changed else ""
    if before == "torch":
        return "torch", "recurrent layers by cuDNN, as until now"
    forms: list[Recurrence] = [before] if before else ["fused", "resident"]
    reasons = {form: _mismatch(config, encoder, device, clips, form) for form in forms}
    right = [form for form in forms if not reasons[form]]
    if not right:
        return (
            "torch",
            f"recurrent layers by cuDNN, because the fused kernels cannot be used here: {reasons[forms[0]]}"
            + (others if before else ""),
        )
    if before:
        return before, f"recurrent layers by {_NAMES[before]}, as until now"
    try:
        times = {form: milliseconds(config, encoder, device, clips, form) for form in ("torch", *right)}
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the driver or of a compiler: the layers that torch has always had remain
        return "torch", f"recurrent layers by cuDNN, because timing failed: {first_line(error)}"
    first, *rest = sorted(times, key=times.__getitem__)
    beside = ", ".join(f"{times[form]:.1f} by {_NAMES[form]}" for form in rest)
    return first, f"recurrent layers by {_NAMES[first]}: {times[first]:.1f} ms of a step, {beside}"


def _mismatch(config: Config, encoder: BiGRU, device: torch.device, clips: int, form: Recurrence) -> str:
    """Why these kernels cannot be used for the run's passes; "" if they agree with float64."""
    for dtype in dict.fromkeys(_dtypes(config, form)):
        reason = kernels.verify.recurrence_mismatch(
            device,
            encoder.hidden,
            (clips, 3 * clips),
            dtype,
            reverse=encoder.time_mode == "bidirectional",
            precision="tf32" if torch.backends.cudnn.allow_tf32 else "ieee",
            form=cast(kernels.gru_plan.Form, form),
        )
        if reason:
            return reason
    return ""


def milliseconds(config: Config, encoder: BiGRU, device: torch.device, clips: int, form: Recurrence) -> float:
    """What one step's passes through the recurrent layers take on a GPU, captured if the run's steps are."""
    shape = config.views.frames, encoder.input_dim
    single, triple = (torch.randn(n, *shape, device=device) for n in (clips, 3 * clips))
    before, encoder.recurrence = encoder.recurrence, form
    try:
        with weights_held(encoder):
            passes = step_passes(config, encoder, single, triple, form)
            return _time(passes, device, graph=config.run.graph != "off")
    finally:
        encoder.recurrence = before


def step_passes(
    config: Config, encoder: BiGRU, single: Tensor, triple: Tensor, form: Recurrence
) -> Callable[[], None]:
    """What one step computes of its recurrent layers, over sequences [N, T, W] and [3N, T, W]."""
    low, wide = _dtypes(config, form)
    attacked = bool(config.attack.radius)
    rides = attacked and form != "torch" and low == wide

    def run() -> None:
        encoder.weights_changed()
        if not rides:
            with torch.no_grad():
                encoder.recur(single, low)
        if attacked:
            with frozen(encoder):
                clips = single.detach().requires_grad_()
                # the key's pass rides along; another encoder's weights would take no other time
                feature = (
                    fused((encoder, encoder), (clips, single), wide)[0]
                    if rides
                    else encoder.recur(clips, wide)
                )
                torch.autograd.grad(feature.float().sum(), clips)
        weights = list(encoder.directions.parameters())
        torch.autograd.grad(encoder.recur(triple, low).float().sum(), weights)

    return run


def _dtypes(config: Config, form: Recurrence) -> tuple[torch.dtype, torch.dtype]:
    """Of the views' passes, and of the attack's."""
    if config.precision == "fp16":
        return torch.float16, torch.float32
    if config.precision != "bf16":
        return torch.float32, torch.float32
    if form != "torch":
        return torch.bfloat16, torch.bfloat16
    with torch.autocast("cuda", torch.bfloat16):
        return recurrent_dtype(), recurrent_dtype()


def _time(function: Callable[[], None], device: torch.device, graph: bool) -> float:
    """Median milliseconds of some calls, after two that compile and choose algorithms."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
        call: Callable[[], object] = function
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, stream=stream, capture_error_mode="thread_local"):
                function()
            call = captured.replay
            call()
        times = []
        for _ in range(_ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    torch.cuda.current_stream(device).wait_stream(stream)
    return sorted(times)[_ROUNDS // 2]


def waited_too_long(encoder: Encoder, device: torch.device) -> bool:
    """Whether a launch whose programs wait for one another has given up, which made its states NaN."""
    resident = isinstance(encoder, BiGRU) and encoder.recurrence == "resident"
    return resident and kernels.gru_resident.timed_out(device)
