"""What reaches the Triton kernels, checked by name, shape and dtype in every test. The layers give what fits, so the
package does not look; what does not fit would read or write beyond a tensor."""

import functools
import inspect
import sys

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SINGLE, FLAG, INTEGER = (torch.float32,), (torch.bool,), (torch.int64,)


def expect(name, tensor, shape, dtypes, like):
    """Raises ValueError, which names the tensor, where its shape, dtype or device is another one."""
    if tensor is None:
        return
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {like.device}")


def expect_all(inputs, like):
    """`expect` for a tensor, or None, with its shape and dtypes by name."""
    for name, (tensor, shape, dtypes) in inputs.items():
        expect(name, tensor, shape, dtypes, like)


def expect_step(name, x, inputs, in_place, paged=False):
    """Raises where a tensor (name -> tensor or None, shape, dtypes) does not fit, or a gradient would be needed."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t, _, _ in inputs.values()):
        raise RuntimeError(f"{name} works in place and has no gradient; call it under torch.no_grad()")
    for argument in in_place:
        # Pages may stand apart.
        if not inputs[argument][0][slice(1 if paged else None)].is_contiguous():
            strides = inputs[argument][0].stride()
            raise ValueError(f"{argument} is written in place and must be contiguous, its strides are {strides}")
    expect_all(inputs, x)


def ema_scan_triton(
    x, decay, input_gain, output_gain, skip, real, reset, state, delayed, delay_decay, activation, **_
):
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, L, D)")
    if activation not in (None, "silu"):
        raise ValueError(f"activation {activation!r} is none of (None, 'silu')")
    if (delayed is None) != (delay_decay is None):
        raise ValueError("delayed and delay_decay go together, one of them is None")
    batch, length, width = x.shape
    table = (width, decay.shape[-1])
    inputs = {"x": (x, x.shape, FLOATS), "skip": (skip, (width,), SINGLE), "delayed": (delayed, x.shape, (x.dtype,))}
    tables = {"decay": decay, "input_gain": input_gain, "output_gain": output_gain, "delay_decay": delay_decay}
    inputs |= {name: (tensor, table, SINGLE) for name, tensor in tables.items()}
    inputs |= {name: (mark, (batch, length), FLAG) for name, mark in {"real": real, "reset": reset}.items()}
    expect_all(inputs | {"state": (state, (batch, *table), SINGLE)}, x)


def ema_parameters_triton(delta, alpha, beta, gamma):
    shape = (*gamma.shape, 1)
    for name, tensor in (("delta", delta), ("alpha", alpha), ("beta", beta)):
        if tensor.shape != shape or tensor.dtype != gamma.dtype:
            raise ValueError(f"{name} must be {shape} {gamma.dtype}, got {tuple(tensor.shape)} {tensor.dtype}")


def ema_step_triton(
    x, decay, input_gain, output_gain, skip, state, real, reset, delayed, delay_decay, block_start, **_
):
    batch, _, width = x.shape
    table = (width, decay.shape[-1])
    inputs = {
        "x": (x, (batch, 1, width), FLOATS),
        "skip": (skip, (width,), FLOATS),
        "state": (state, (batch, *table) if block_start is None else (batch, 2, *table), SINGLE),
        "delayed": (delayed, (batch, 1, width), (x.dtype,)),
    }
    tables = {"decay": decay, "input_gain": input_gain, "output_gain": output_gain, "delay_decay": delay_decay}
    inputs |= {name: (tensor, table, SINGLE) for name, tensor in tables.items()}
    marks = {"real": real, "reset": reset, "block_start": block_start}
    inputs |= {name: (mark, (batch, 1), FLAG) for name, mark in marks.items()}
    expect_step("ema_step_triton", x, inputs, ("state",))


def memory_step_triton(
    q,
    k_new,
    v_new,
    keys,
    values,
    positions,
    activated_count,
    active,
    position,
    activation,
    bias_table,
    pages,
    gate,
    **_,
):
    batch, (held, memory, key_width), value_width = q.shape[0], keys.shape, values.shape[-1]
    if activation not in ("softmax", "relu2", "laplace"):
        raise ValueError(f"activation {activation!r} is none of softmax, relu2 and laplace")
    row, bias = (batch,), 0 if bias_table is None else bias_table.numel()
    inputs = {
        "q": (q, (batch, key_width), FLOATS),
        "k_new": (k_new, (batch, key_width), FLOATS),
        "v_new": (v_new, (batch, value_width), FLOATS),
        "active": (active, row, FLAG),
        "keys": (keys, (held, memory, key_width), FLOATS),
        "values": (values, (held, memory, value_width), FLOATS),
        "positions": (positions, (held, memory), INTEGER),
        "activated_count": (activated_count, row, INTEGER),
        "pages": (pages, row, INTEGER),
        "position": (position, row, INTEGER),
        "bias_table": (bias_table, (bias,), FLOATS),
        "gate": (gate, v_new.shape, (v_new.dtype,)),
    }
    if pages is None and held != batch:
        raise ValueError(f"keys has {held} pages for {batch} rows, and no pages are given")
    expect_step("memory_step_triton", q, inputs, ("keys", "values", "positions"), pages is not None)


def norm_residual_triton(x, weight, bias, **_):
    for name, tensor in (("weight", weight), ("bias", bias)):
        expect(name, tensor, x.shape[-1:], FLOATS, x)


def route_triton(x, weight, bias, log_temperature, real, **_):
    if weight.shape != (2, x.shape[-1]) or bias.shape != (2,) or log_temperature.shape != (1,):
        shapes = tuple(weight.shape), tuple(bias.shape), tuple(log_temperature.shape)
        raise ValueError(f"weight, bias, log_temperature must be (2, {x.shape[-1]}), (2,) and (1,), got {shapes}")
    expect("real", real, x.shape[:-1], FLAG, x)


def gather_rows_triton(x, packed_index, **_):
    expect("packed_index", packed_index, x.shape[:1], INTEGER, x)


def extract_residual_triton(hidden, residual, out, confidence, dropout_p, **_):
    if hidden.shape != residual.shape or out.shape[1:] != hidden.shape[1:]:
        shapes = tuple(hidden.shape), tuple(residual.shape), tuple(out.shape)
        raise ValueError(f"hidden and residual must be (R, D) and out (M, D), got {shapes}")
    expect("confidence", confidence, hidden.shape[:1], SINGLE, hidden)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")


def project_unit_triton(projected, scale, offset, cos, sin, table_rows, **_):
    z = scale.shape[1]
    if scale.shape != (2, z) or offset.shape != (2, z) or projected.shape[1] <= z or (projected.shape[1] - z) % 2:
        raise ValueError(
            "projected must be (M, Z + 2V) and scale, offset (2, Z), got "
            f"{tuple(projected.shape)}, {tuple(scale.shape)}, {tuple(offset.shape)}"
        )
    if cos is None:
        return
    if z % 2:
        raise ValueError(f"rotary positions need an even query width, got {z}")
    expected = (projected.shape[0] if table_rows is None else cos.shape[0], z // 2)
    if cos.shape != expected or sin.shape != expected or cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise ValueError(f"cos and sin must be {expected} float32, got {tuple(cos.shape)} {cos.dtype}")


def gated_unit_triton(
    projected, scale, offset, key_start, key_end, attention, cos, sin, table_rows, bias_table, q_place, k_place,
    memory, **_,
):  # fmt: skip
    project_unit_triton(projected, scale, offset, cos, sin, table_rows)
    if memory is None:
        z = scale.shape[1]
        width = (projected.shape[1] - z) // 2
        parts = projected[:, :z], projected[:, :z], projected[:, z + width :]
        check_attention(*parts, key_start, key_end, attention, bias_table, q_place, k_place, None)


def windowed_attention_triton(
    q, k, v, key_start, key_end, activation, bias_table, q_place, k_place, dropout_p, gate, **_
):
    if dropout_p > 0:
        raise ValueError(f"windowed_attention_triton has no dropout of weights, got dropout_p={dropout_p}")
    check_attention(q, k, v, key_start, key_end, activation, bias_table, q_place, k_place, gate)


def check_attention(q, k, v, key_start, key_end, activation, bias_table, q_place, k_place, gate):
    if activation not in ("softmax", "relu2"):
        raise ValueError(f"windowed_attention_triton takes activation 'softmax' or 'relu2', got {activation!r}")
    if q.dtype not in FLOATS:
        raise ValueError(f"windowed_attention_triton takes float32, float16 or bfloat16, got {q.dtype}")
    for name, tensor in (("k", k), ("v", v), ("gate", gate)):
        if tensor is not None and tensor.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}")
    if q.shape[1] != k.shape[1] or k.shape[0] != v.shape[0]:
        raise ValueError(f"q (M, Z), k (Mk, Z), v (Mk, V) do not fit: {[tuple(t.shape) for t in (q, k, v)]}")
    if q.shape[1] > 256:
        raise ValueError(f"windowed_attention_triton takes a query width up to 256, got {q.shape[1]}")
    if key_start.shape != q.shape[:1] or key_end.shape != q.shape[:1]:
        shapes = tuple(key_start.shape), tuple(key_end.shape)
        raise ValueError(f"key_start and key_end must be ({q.shape[0]},), one for each query, got {shapes}")
    if gate is not None and gate.shape != (q.shape[0], v.shape[1]):
        raise ValueError(f"gate must be {(q.shape[0], v.shape[1])}, got {tuple(gate.shape)}")
    if bias_table is None:
        return
    if bias_table.ndim != 1 or bias_table.numel() == 0:
        raise ValueError(f"bias_table must be (T,) with T > 0, got {tuple(bias_table.shape)}")
    if q_place is None or k_place is None or q_place.shape != q.shape[:1] or k_place.shape != k.shape[:1]:
        raise ValueError("bias_table needs q_place (M,) and k_place (Mk,)")


def checked(function, check):
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checking(*args, **options):
        given = signature.bind(*args, **options)
        given.apply_defaults()
        check(**given.arguments)
        return function(*args, **options)

    return checking


def install():
    """Puts the checks above before the kernels' functions of their names, wherever these have been imported."""
    # Kernels are made for the interpreter or for a GPU when they are defined: not before that has been chosen.
    from modeling_seqboat.kernels_seqboat import OPS

    modules = [module for name, module in sys.modules.items() if name.startswith("modeling_seqboat.")]
    for name, entry in OPS.items():
        check = entry.triton and globals().get(entry.triton.__name__)
        if check is None:
            continue
        function, replaced = entry.triton, checked(entry.triton, check)
        OPS[name] = entry._replace(triton=replaced)
        for module in modules:
            if getattr(module, function.__name__, None) is function:
                setattr(module, function.__name__, replaced)
