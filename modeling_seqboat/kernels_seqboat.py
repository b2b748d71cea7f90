"""One place that chooses between the torch ops and the Triton kernels, by a table, and says why.

`kernel_backend` of the config asks for `torch`, `triton` or `auto`; the environment variable SEQBOAT_KERNEL_BACKEND
overrides it. `auto` takes Triton wherever the table has nothing against it. `triton` where it cannot run is an error
that gives the reason; nothing switches silently.
"""

import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ops_attention_seqboat import windowed_attention
from .ops_layout_seqboat import ScanPlan
from .ops_s4d_seqboat import s4d_scan
from .ops_s5_seqboat import s5_scan
from .ops_ssm_seqboat import ema_parameters, ema_scan

try:
    import triton

    from .triton_attention_seqboat import windowed_attention_triton
    from .triton_decode_seqboat import ema_step, memory_attention_op, memory_attention_step
    from .triton_ema_seqboat import ema_scan_triton
    from .triton_fused_seqboat import extract_residual, gated_unit, gather_rows, project_unit
    from .triton_linear_seqboat import give_bias_gradient
    from .triton_norm_seqboat import layer_norm_residual
    from .triton_parameters_seqboat import ema_parameters_triton
    from .triton_router_seqboat import PendingStream, route
except ImportError:
    triton = None

BACKENDS = ("auto", "torch", "triton")
ENVIRONMENT_VARIABLE = "SEQBOAT_KERNEL_BACKEND"


def requested_backend(config_value: str) -> str:
    """What the environment asks for, else what the config does."""
    value = os.environ.get(ENVIRONMENT_VARIABLE) or config_value
    if value not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(BACKENDS)}, got {value!r}")
    return value


def why_not_triton(
    op: str, device: torch.device, dtype: torch.dtype, *, activation: str = "softmax", dropout_p: float = 0.0
) -> str | None:
    """The reason why the Triton kernel of `op` (`ema_scan`, `ema_parameters`, `s4d_scan`, `s5_scan`, `route`,
    `project_unit`, `memory_step` or `windowed_attention`) cannot run, or None if it can.

    Triton's interpreter (TRITON_INTERPRET=1) runs kernels on CPU tensors.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    table = (
        (op in ("s4d_scan", "s5_scan"), f"the recurrence of ssm_type={op.removesuffix('_scan')!r} has no kernel"),
        (triton is None, "the triton package is not installed, or too old"),
        (device.type != "cuda" and not interpreted, f"tensors are on {device.type}, Triton needs a CUDA device"),
        (dtype == torch.float64, "the kernels have no float64"),
        (op == "windowed_attention" and activation == "laplace", "laplace attention has no kernel"),
        (op == "windowed_attention" and dropout_p > 0, "attention_dropout has no kernel"),
    )
    return next((reason for applies, reason in table if applies), None)


def choose_backend(op: str, requested: str, device: torch.device, dtype: torch.dtype, **facts) -> str:
    """`torch` or `triton` for one call of `op`.

    Raises:
        ValueError: when `triton` is requested and cannot run, with the reason.
    """
    # The interpreter is for tests: it runs only where it is asked for.
    if requested == "torch" or (requested == "auto" and device.type != "cuda"):
        return "torch"
    reason = why_not_triton(op, device, dtype, **facts)
    if reason is None:
        return "triton"
    if requested == "triton":
        raise ValueError(f"kernel_backend='triton' cannot run {op}: {reason}; use 'auto' or 'torch'")
    return "torch"


def expect_backend(
    requested: str, device: torch.device, dtype: torch.dtype, *, ssm_type: str = "ema", **facts
) -> None:
    """Raises ValueError, as `choose_backend` does, if any op cannot run where `triton` is requested."""
    if requested == "triton":
        choose_backend(f"{ssm_type}_scan", requested, device, dtype)
        choose_backend("windowed_attention", requested, device, dtype, **facts)


def run_ema_scan(
    requested: str,
    x: Tensor,
    *args,
    plan: ScanPlan | None = None,
    need_state: bool = True,
    activation: str | None = None,
    real: Tensor | None = None,
    reset: Tensor | None = None,
    reverse: bool = False,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """`ema_scan` on the chosen backend, followed by `activation` (None or silu).

    With `reverse` the scan runs from the last column to the first; `real`, `reset` and `plan` then describe the columns
    in that order. One column is a handful of elementwise operations and stays in torch.
    """
    if x.shape[1] > 1 and choose_backend("ema_scan", requested, x.device, x.dtype) == "triton":
        if reverse:
            real, reset = (None if marks is None else marks.flip(1) for marks in (real, reset))
        return ema_scan_triton(x, *args, real=real, reset=reset, reverse=reverse, activation=activation, **kwargs)
    y, state = ema_scan(
        x.flip(1) if reverse else x, *args, real=real, reset=reset, plan=plan, need_state=need_state, **kwargs
    )
    if reverse:
        y = y.flip(1)
    return (y if activation is None else F.silu(y)), state


def run_ema_step(
    requested: str,
    x: Tensor,
    *args,
    real: Tensor | None,
    reset: Tensor | None,
    activation: str | None,
) -> Tensor | None:
    """The scan of one column in one kernel, which overwrites the state: y (B, 1, D); None where torch is to make it.

    Args:
        x: (B, 1, D); the rest as in `ema_step`, with real and reset (B, 1).
    """
    if torch.compiler.is_compiling() or choose_backend("ema_scan", requested, x.device, x.dtype) == "torch":
        return None
    real, reset = (None if marks is None else marks[:, 0] for marks in (real, reset))
    return ema_step(x[:, 0], *args, real=real, reset=reset, activation=activation)[:, None]


def run_project_unit(requested: str, projected: Tensor, *args) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """`project_unit` in one kernel; None where torch is to make it: inside a compiled graph, or as the table says."""
    if torch.compiler.is_compiling():
        return None
    if choose_backend("project_unit", requested, projected.device, projected.dtype) == "torch":
        return None
    return project_unit(projected, *args)


def runs_memory_step(requested: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether one token's attention over the memory runs in a kernel of its own, which writes the token into it."""
    return choose_backend("memory_step", requested, device, dtype) == "triton"


def run_memory_step(*args, activation: str, scale: float, position: Tensor, bias_table: Tensor | None = None,
                    bias_center: int = 0, bias_by_index: bool = False) -> Tensor:  # fmt: skip
    """`memory_attention_step` of the decode kernels; only where `runs_memory_step` says so."""
    if torch.compiler.is_compiling():
        return memory_attention_op(*args, activation, scale, bias_table, bias_center, bias_by_index, position)
    return memory_attention_step(
        *args, activation=activation, scale=scale, position=position, bias_table=bias_table, bias_center=bias_center,
        bias_by_index=bias_by_index,
    )  # fmt: skip


def run_ema_parameters(
    requested: str, delta: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`ema_parameters` on the chosen backend; a compiler makes one kernel of the torch form itself."""
    compiling = torch.compiler.is_compiling()
    if not compiling and choose_backend("ema_parameters", requested, gamma.device, gamma.dtype) == "triton":
        return ema_parameters_triton(delta, alpha, beta, gamma)
    return ema_parameters(delta, alpha, beta, gamma)


def run_route(
    requested: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    log_temperature: Tensor,
    real: Tensor | None,
    shift: float,
) -> tuple[Tensor, Tensor] | None:
    """The decision of the tempered softmax in one kernel: confidence (B, L) float32 and active (B, L) bool; None where
    torch is to make it: inside a compiled graph, or as the table says.

    Args:
        x: (B, L, D); the rest as in `route`, with real (B, L).
    """
    if torch.compiler.is_compiling():
        return None
    if choose_backend("route", requested, x.device, x.dtype) == "torch":
        return None
    real = None if real is None else real.flatten()
    found = route(x.flatten(0, 1), weight, bias, log_temperature, real=real, shift=shift)
    return tuple(tensor.view(x.shape[:2]) for tensor in found)


def run_diagonal_scan(ssm_type: str, x: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """`s4d_scan` or `s5_scan`, which run in torch alone; `expect_backend` refuses them where Triton is requested."""
    return {"s4d": s4d_scan, "s5": s5_scan}[ssm_type](x, *args, **kwargs)


def run_windowed_attention(
    requested: str, q: Tensor, k: Tensor, v: Tensor, *args, max_keys: int, dropout_p: float, **kwargs
) -> Tensor:
    """`windowed_attention` on the chosen backend; `max_keys` bounds the keys that one query sees."""
    facts = {"activation": kwargs["activation"], "dropout_p": dropout_p}
    if choose_backend("windowed_attention", requested, q.device, q.dtype, **facts) == "triton":
        return windowed_attention_triton(q, k, v, *args, max_keys=max_keys, **kwargs)
    return windowed_attention(q, k, v, *args, dropout_p=dropout_p, **kwargs)


def runs_fused(requested: str, device: torch.device, dtype: torch.dtype, plain: bool, **facts) -> bool:
    """Whether a layer may replace its elementwise steps by fused kernels.

    Args:
        plain: what the kernels take for granted: silu everywhere and no dropout of values.
        facts: as in `why_not_triton` for the attention.
    """
    if not plain:
        return False
    return choose_backend("windowed_attention", requested, device, dtype, **facts) == "triton"


def run_gated_unit(*args, **kwargs) -> Tensor:
    """`gated_unit`; only where `runs_fused` says so."""
    return gated_unit(*args, **kwargs)


def run_extract_residual(*args) -> Tensor:
    """`extract_residual`; only where `runs_fused` says so."""
    return extract_residual(*args)


def run_gather_rows(*args) -> Tensor:
    """`gather_rows`; only where `runs_fused` says so."""
    return gather_rows(*args)


def run_linear(linear: nn.Module, x: Tensor) -> Tensor:
    """`linear(x)`, with the gradient of its bias by a kernel where it is a plain nn.Linear in training, as an adapter, a
    quantised layer or one whose weights come when it is called are not; only where `runs_fused` says so."""
    bias = getattr(linear, "bias", None)
    plain = type(linear) is nn.Linear and type(bias) in (Tensor, nn.Parameter) and not _does_more(linear)
    if not plain or not torch.is_grad_enabled() or not bias.requires_grad:
        return linear(x)
    return give_bias_gradient(F.linear(x, linear.weight, bias.detach()), bias)


def _does_more(module: nn.Module) -> bool:
    """Whether a call of the module is more than its class's forward: hooks, its own or everybody's, or a forward put in
    place of it, as Accelerate does to offload weights."""
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    everybody = (getattr(nn.modules.module, f"_global{name}", None) for name in hooks)
    return "forward" in vars(module) or any(getattr(module, name) for name in hooks) or any(everybody)


def run_layer_norm_residual(x: Tensor, *args) -> tuple[Tensor, Tensor]:
    """`layer_norm_residual` of (B, L, D); only where `runs_fused` says so."""
    normed, residual = layer_norm_residual(x.flatten(0, 1), *args)
    return normed.view_as(x), residual.view_as(x)


def begin_stream(*args) -> "PendingStream":
    """`PendingStream`, the compression under way; only where `runs_fused` says so."""
    return PendingStream(*args)
