"""One place that chooses between the torch ops and the Triton kernels, by a table, and says why.

`kernel_backend` of the config asks for `torch`, `triton` or `auto`; the environment variable SEQBOAT_KERNEL_BACKEND
overrides it. `auto` takes Triton wherever the table has nothing against it. `triton` where it cannot run is an error
that gives the reason; nothing switches silently.
"""

import os

import torch
from torch import Tensor

from .ops_attention_seqboat import windowed_attention
from .ops_layout_seqboat import ScanPlan
from .ops_s4d_seqboat import s4d_scan
from .ops_s5_seqboat import s5_scan
from .ops_ssm_seqboat import ema_scan

try:
    import triton

    from .triton_attention_seqboat import windowed_attention_triton
    from .triton_ema_seqboat import ema_scan_triton
    from .triton_fused_seqboat import extract_residual, gated_unit, gather_rows
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
    """The reason why the Triton kernel of `op` (`ema_scan`, `s4d_scan`, `s5_scan` or
    `windowed_attention`) cannot run, or None if it can.

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
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """`ema_scan` on the chosen backend, followed by `activation` (None or silu).

    One column is a handful of elementwise operations and stays in torch.
    """
    if x.shape[1] > 1 and choose_backend("ema_scan", requested, x.device, x.dtype) == "triton":
        return ema_scan_triton(x, *args, activation=activation, **kwargs)
    y, state = ema_scan(x, *args, plan=plan, need_state=need_state, **kwargs)
    return (y if activation is None else torch.nn.functional.silu(y)), state


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
        plain: what the kernels take for granted: silu everywhere and no dropout between the steps.
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
