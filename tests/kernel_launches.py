"""Every launch of the Triton kernels by their ops, noted and not run; and, where kernels are not made for the
interpreter, compiled for a GPU that need not be there."""

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, create_function_from_signature

from modeling_seqboat.ops_layout_seqboat import Packed
from modeling_seqboat.triton_decode_seqboat import ema_step_triton, memory_step_triton
from modeling_seqboat.triton_ema_seqboat import ema_parameters_triton, ema_scan_triton
from modeling_seqboat.triton_launch_seqboat import Kernel
from modeling_seqboat.triton_rows_seqboat import (
    column_sums,
    extract_residual_triton,
    gather_rows_triton,
    norm_residual_triton,
    pack_triton,
    route_triton,
    write_memory_triton,
)
from modeling_seqboat.triton_unit_seqboat import gated_unit_triton, project_unit_triton

TARGET = GPUTarget("cuda", 90, 32)
BACKEND = CUDABackend(TARGET)


def zeros(*shape):
    return torch.zeros(shape, requires_grad=True)


def backward(*outputs):
    sum(output.float().sum() for output in outputs).backward()


def run_every_op():
    """Every op once, forward and backward, with what is optional."""
    marks, index = torch.ones(2, 40, dtype=torch.bool), torch.arange(80)
    tables = [zeros(24, 4) for _ in range(3)]
    scan = {"real": marks, "reset": marks, "state": zeros(2, 24, 4), "activation": "silu"}
    delay = {"delayed": zeros(2, 40, 24), "delay_decay": zeros(24, 4)}
    backward(*ema_scan_triton(zeros(2, 40, 24), *tables, zeros(24), **scan, **delay))
    backward(ema_scan_triton(zeros(2, 4000, 24), *tables, None, reverse=True)[0])
    backward(*ema_parameters_triton(zeros(24, 4, 1), zeros(24, 4, 1), zeros(24, 4, 1), zeros(24, 4)))
    backward(*norm_residual_triton(zeros(2, 40, 24), None, zeros(24), zeros(24), 1e-5, True, torch.float32))
    backward(route_triton(zeros(2, 40, 24), zeros(2, 24), zeros(2), zeros(1), marks, 0.5)[0])
    pack_triton(marks, 8, True, index.expand(2, -1), capacity=64)
    backward(gather_rows_triton(zeros(80, 24), index, index))
    parts = zeros(80, 24), zeros(80, 24), zeros(80, 24), zeros(80)
    backward(extract_residual_triton(*parts, Packed(index, index), 0.1))
    column_sums(zeros(80, 24))
    angles = {"cos": torch.zeros(80, 8), "sin": torch.zeros(80, 8), "table_rows": index}
    bias = {"bias_table": zeros(9), "bias_center": 4, "q_place": index, "k_place": index}
    unit = zeros(80, 16 + 2 * 24), zeros(2, 16), zeros(2, 16)
    for kind in ("softmax", "relu2"):
        options = {"attention": kind, "attention_scale": 0.1, "max_keys": 9}
        backward(gated_unit_triton(*unit, index, index + 1, **options, **angles, **bias)[0])
    backward(*project_unit_triton(*unit, *angles.values()))
    with torch.no_grad():
        ema_step_triton(zeros(2, 1, 24), *tables, zeros(24), zeros(2, 24, 4), real=marks[:, :1], reset=marks[:, :1])
        count = torch.zeros(2, dtype=torch.int64)
        ring = zeros(2, 5, 16), zeros(2, 5, 24), torch.zeros(2, 5, dtype=torch.int64)
        write_memory_triton(
            ring, [zeros(80, 16), zeros(80, 24), index], marks.flatten().cumsum(0).view(2, 40), count, count
        )
        for kind in ("softmax", "laplace"):
            memory_step_triton(
                zeros(2, 16), zeros(2, 16), zeros(2, 24), *ring, count, marks[:, 0], count, activation=kind,
                scale=0.1, bias_table=zeros(9), bias_center=4, bias_by_index=kind == "laplace",
                pages=count if kind == "laplace" else None, gate=zeros(2, 24) if kind == "softmax" else None,
            )  # fmt: skip


def note_launches():
    """(kernel, arguments, options, constants) of each launch of `run_every_op`, whose results mean nothing."""
    found, launch = [], Kernel.__call__

    def note(self, grid, *args, options=None, **constants):
        found.append((self, args, options or {"num_warps": 4}, constants))

    Kernel.__call__ = note
    try:
        run_every_op()
    finally:
        Kernel.__call__ = launch
    return found


def function_of(kernel):
    """The kernel as Triton would compile it, also where it was made for the interpreter, and what binds arguments."""
    varying = [name for name, varies in zip(kernel.function.arg_names, kernel.varies, strict=True) if varies]
    function = JITFunction(kernel.function.fn, do_not_specialize=varying)
    return function, create_function_from_signature(function.signature, function.params, BACKEND)


def compile_all():
    """Compiles each launch as far as types and shapes are checked."""
    from triton._C.libtriton import ir
    from triton.compiler import ASTSource

    for kernel, args, options, constants in note_launches():
        function, bind = function_of(kernel)
        bound, kinds, given = bind(*args, **constants, **options, debug=False)
        parsed, signature, fixed, attributes = function._pack_args(
            BACKEND, {**constants, **options, "debug": False}, bound, kinds, given
        )
        context = ir.context()
        ir.load_dialects(context)
        BACKEND.load_dialects(context)
        source = ASTSource(function, signature, fixed, attributes)
        source.make_ir(TARGET, parsed, BACKEND.get_codegen_implementation(parsed), BACKEND.get_module_map(), context)
        print(kernel.function.fn.__name__, flush=True)
