"""Launches of Triton kernels: what shares a key would share the compiled code that Triton itself would choose."""

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton_interpreter import DEVICE

from modeling_seqboat.ops_layout_seqboat import Packed
from modeling_seqboat.triton_decode_seqboat import ema_step_triton, memory_step_triton
from modeling_seqboat.triton_ema_seqboat import ema_parameters_triton, ema_scan_triton
from modeling_seqboat.triton_launch_seqboat import Kernel
from modeling_seqboat.triton_rows_seqboat import (
    column_sums,
    extract_residual_triton,
    gather_rows_triton,
    norm_residual_triton,
    route_triton,
)
from modeling_seqboat.triton_unit_seqboat import gated_unit_triton, project_unit_triton

INTEGERS = (1, 7, 16, 8192, 2**31 + 16)
FLOATS = (0.5, 1.0, 16.0)


def run_everything():
    """Every op once, forward and backward, with what is optional."""

    def wide(*shape):
        return torch.zeros(shape, device=DEVICE, requires_grad=True)

    def total(*outputs):
        sum(output.float().sum() for output in outputs).backward()

    marks = torch.ones(2, 40, dtype=torch.bool, device=DEVICE)
    tables = [wide(24, 4) for _ in range(3)]
    total(*ema_scan_triton(wide(2, 40, 24), *tables, wide(24), real=marks, reset=marks, activation="silu"))
    total(*ema_parameters_triton(wide(24, 4, 1), wide(24, 4, 1), wide(24, 4, 1), wide(24, 4)))
    total(*norm_residual_triton(wide(2, 40, 24), None, wide(24), wide(24), 1e-5, True, torch.float32))
    total(route_triton(wide(2, 40, 24), wide(2, 24), wide(2), wide(1), marks, 0.5)[0])
    index = torch.arange(80, device=DEVICE)
    total(gather_rows_triton(wide(80, 24), index, index))
    out, confidence = wide(80, 24), wide(80)
    total(extract_residual_triton(wide(80, 24), wide(80, 24), out, confidence, Packed(index, index), 0.1))
    column_sums(wide(80, 24))
    angles = {"cos": wide(80, 8).detach(), "sin": wide(80, 8).detach(), "table_rows": index}
    bias = {"bias_table": wide(9), "bias_center": 4, "q_place": index, "k_place": index}
    unit = wide(80, 16 + 2 * 24), wide(2, 16), wide(2, 16)
    numbers = {"attention": "softmax", "attention_scale": 0.1, "max_keys": 9}
    total(gated_unit_triton(*unit, index, index + 1, **numbers, **angles, **bias)[0])
    total(*project_unit_triton(*unit, *angles.values()))
    with torch.no_grad():
        state = wide(2, 24, 4)
        ema_step_triton(wide(2, 1, 24), *tables, wide(24), state, real=marks[:, :1])
        count = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        ring = wide(2, 5, 16), wide(2, 5, 24), torch.zeros(2, 5, dtype=torch.int64, device=DEVICE)
        memory_step_triton(
            wide(2, 16), wide(2, 16), wide(2, 24), *ring, count, marks[:, 0], count, activation="softmax", scale=0.1,
            bias_table=wide(9), bias_center=4,
        )  # fmt: skip


def alternatives(arg):
    """Values that another call may have in this argument's place."""
    if isinstance(arg, torch.Tensor):
        memory = torch.zeros(64, dtype=arg.dtype)
        return memory, memory[1:], memory.to(torch.float16)
    if type(arg) is float:
        return FLOATS
    return INTEGERS if type(arg) is int else ()


@pytest.fixture(scope="module")
def launches():
    """(kernel, arguments, options, constants) of each launch; nothing is computed."""
    found, patch = [], pytest.MonkeyPatch()

    def note(self, grid, *args, options=None, **constants):
        found.append((self, args, options or {"num_warps": 4}, constants))

    patch.setattr(Kernel, "__call__", note)
    run_everything()
    patch.undo()
    return found


def test_an_equal_key_means_an_equal_variant(launches):
    """P17: no launch runs code that was compiled for other types, alignments or constants."""
    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    assert len({kernel for kernel, *_ in launches}) >= 25
    for kernel, args, options, constants in launches:
        function = kernel.function.fn
        varying = [name for name, varies in zip(kernel.function.arg_names, kernel.varies, strict=True) if varies]
        bind = create_function_from_signature(
            (jit := JITFunction(function, do_not_specialize=varying)).signature, jit.params, backend
        )
        variants = {}
        for place, arg in enumerate(args):
            for value in (arg, *alternatives(arg)):
                changed = (*args[:place], value, *args[place + 1 :])
                _, key = kernel.key(0, changed, options, constants)
                bound, kinds, _ = bind(*changed, **constants, **options, debug=False)
                constant = [value for value, kind in zip(bound.values(), kinds, strict=True) if kind[0] == "constexpr"]
                variant = str((kinds, constant))
                assert variants.setdefault(key, variant) == variant, (function.__name__, jit.arg_names[place], value)
        assert len(set(variants.values())) > 1, function.__name__


def test_what_varies_from_call_to_call_makes_no_variants(launches):
    for kernel, args, options, constants in launches:
        for place, (arg, varies) in enumerate(zip(args, kernel.varies, strict=False)):
            if varies and type(arg) is int:
                keys = {
                    kernel.key(0, (*args[:place], n, *args[place + 1 :]), options, constants)[1] for n in (1, 7, 16)
                }
                assert len(keys) == 1, (kernel.function.fn.__name__, kernel.function.arg_names[place])
