"""Launching Triton kernels without paying for argument inspection at every call.

Triton looks at each argument of a launch (type, alignment, divisibility) to find the compiled variant, which costs the
host more than many a kernel here runs. `Kernel` derives a key from the same facts in one short loop.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

# Whether each launch checks that its key stands for one compiled variant; tests set this, and check shapes, too, which
# the layers make fit.
CHECKS = os.environ.get("SEQBOAT_CHECK_KERNELS") == "1"
# Elements of one elementwise program's block: enough independent loads in flight to reach the copy rate.
_ELEMENTS = 2048
_FOUR_WARPS = {"num_warps": 4}


def jit(function: Callable) -> Callable:
    """A function that kernels call; without triton it stays as it is, so that its module can be imported."""
    return function if triton is None else triton.jit(function)


def interpreted() -> bool:
    """Whether kernels run on the CPU in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def first_derivative_only(backward: Callable) -> staticmethod:
    """The static method `backward` of an autograd function that is not differentiable itself.

    torch's `once_differentiable` lets `torch.autograd.grad` with respect to an input pass by what is missing, and
    gives a wrong number; this one raises RuntimeError.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> Any:
        # Under `create_graph=True` alone a backward runs with gradients.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "SeqBoat has first derivatives only: create_graph=True, which asks for a graph of the gradients, is "
                "not supported by its recurrence and attention"
            )
        return backward(ctx, *grads)

    return staticmethod(checked)


class Kernel:
    """A Triton kernel and its compiled variants, by a key of all that a variant depends on: the compile-time
    arguments, the launch options, types, whether pointers are 16-byte aligned, and the values of integers that do not
    vary.

    `varying` names arguments whose value or alignment must not make another variant.
    """

    def __init__(self, function: Callable, varying: tuple[str, ...]):
        self.function = triton.jit(function, do_not_specialize=list(varying))
        self.varies = tuple(name in varying for name in self.function.arg_names)
        self.variants: dict[Hashable, Any] = {}

    def __call__(
        self, grid: tuple[int, ...], *args: Any, options: dict[str, int] = _FOUR_WARPS, **constants: Any
    ) -> None:
        """Launches on the device of the first argument, a tensor.

        Args:
            constants: the compile-time arguments, in the order of the kernel's last parameters.
        """
        device = args[0].device
        if device.type != "cuda":
            self.function[grid](*args, **constants, **options)
            return
        active = triton.runtime.driver.active
        current = active.get_current_device()
        if device.index != current:
            with torch.cuda.device(device):
                self(grid, *args, options=options, **constants)
            return
        numbers, key = self.key(current, args, options, constants)
        variant = self.variants.get(key)
        if variant is None or CHECKS:
            self._launch_first(grid, key, args, options, constants)
            return
        stream = active.get_current_stream(current)
        grid += (1,) * (3 - len(grid))
        variant.run(
            *grid, stream, variant.function, variant.packed_metadata, None, None, None, *numbers, *constants.values()
        )

    def key(
        self, device: int, args: tuple[Any, ...], options: dict[str, int], constants: dict[str, Any]
    ) -> tuple[list[Any], tuple]:
        """The arguments as the launcher takes them, tensors by address, which else it would look up one by one through
        Python; and the key of the variant that fits them."""
        numbers, kinds = [], [device, *options.values()]
        for arg, varies in zip(args, self.varies, strict=False):
            if isinstance(arg, Tensor):
                arg, kind = arg.data_ptr(), arg.dtype
                if arg % 16 and not varies:
                    kind = (kind,)
            elif type(arg) is float:
                kind = float
            elif varies and arg is not None:
                # Integers beyond 32 bits are of another type.
                kind = -(2**31) <= arg < 2**31
            else:
                kind = arg
            numbers.append(arg)
            kinds.append(kind)
        return numbers, (*kinds, *constants.values())

    def _launch_first(self, grid, key, args, options, constants) -> None:
        names = self.function.arg_names[len(args) :]
        if list(constants) != names:
            raise TypeError(f"{self.function.fn.__name__} takes the constants {names}, got {list(constants)}")
        variant = self.function[grid](*args, **constants, **options)
        if self.variants.setdefault(key, variant) is not variant:
            raise RuntimeError(f"{self.function.fn.__name__}: two variants share the key {key}")


def kernel(*varying: str) -> Callable[[Callable], Kernel]:
    """Declares a kernel; `varying` names integers that change from call to call and must not make new variants."""

    def declare(function: Callable) -> Kernel | Callable:
        return function if triton is None else Kernel(function, varying)

    return declare


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, made contiguous where they are not; None stays None."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


@functools.cache
def power_of_two(size: int, least: int = 16) -> int:
    """The smallest power of two that is at least `size` and `least`."""
    return max(least, 1 << max(0, size - 1).bit_length())


@functools.cache
def row_block(width: int) -> tuple[int, int]:
    """Rows and columns of an elementwise program's block; the columns cover a whole row."""
    columns = power_of_two(width)
    return max(1, min(32, _ELEMENTS // columns)), columns


def program_sums(count: int, rows: int, most: int, like: Tensor, *shape: int) -> tuple[int, int, Tensor]:
    """How `count` rows are shared out where programs add up their own rows and the sums are added up afterwards.

    Args:
        rows: a program's block; most: programs at most.
        shape: of one program's sums, float32.

    Returns:
        programs, the blocks that each takes, and the empty sums (programs, *shape).
    """
    blocks = -(-count // rows)
    repeats = max(1, -(-blocks // most))
    programs = max(1, -(-count // (rows * repeats)))
    return programs, repeats, torch.empty(programs, *shape, dtype=torch.float32, device=like.device)
