"""Launching Triton kernels without paying for argument inspection at every call.

Triton looks at each argument of a launch (type, alignment, divisibility) to find the compiled variant, which costs the
host more than many a kernel here runs. A caller that knows what its variants depend on says so once a call, as a key.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

try:
    import triton
except ImportError:
    triton = None

# Elements of one elementwise program's block: enough independent loads in flight to reach the copy rate.
_ELEMENTS = 2048


def jit(function: Callable) -> Callable:
    """A function that kernels call; without triton it stays as it is, so that its module can be imported."""
    return function if triton is None else triton.jit(function)


def interpreted() -> bool:
    """Whether kernels run on the CPU in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


class Kernel:
    """A Triton kernel and its compiled variants by the caller's key.

    The key must determine every compile-time argument, the launch options, and of the other arguments their types,
    whether pointers are 16-byte aligned (`alignment`, `aligned_key`), and whether integers are 1 or divisible by 16,
    except for those named to `kernel` as varying.
    """

    def __init__(self, function: Callable, varying: tuple[str, ...]):
        self.function = triton.jit(function, do_not_specialize=list(varying))
        self.variants: dict[Hashable, Any] = {}

    def __call__(
        self, grid: tuple[int, ...], key: Hashable, *args: Any, options: dict[str, int], **constants: Any
    ) -> None:
        """Launches; `constants` are the compile-time arguments, in the order of the kernel's last parameters.

        Without a key (None), Triton finds the variant.
        """
        variant = self.variants.get(key)
        if variant is None:
            self._launch_first(grid, key, args, options, constants)
            return
        active = triton.runtime.driver.active
        stream = active.get_current_stream(active.get_current_device())
        # Addresses as numbers: the launcher would look up those of tensors one by one through Python, and ask the driver.
        numbers = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args]
        grid += (1,) * (3 - len(grid))
        variant.run(
            *grid, stream, variant.function, variant.packed_metadata, None, None, None, *numbers, *constants.values()
        )

    def _launch_first(self, grid, key, args, options, constants) -> None:
        names = self.function.arg_names[len(args) :]
        if list(constants) != names:
            raise TypeError(f"{self.function.fn.__name__} takes the constants {names}, got {list(constants)}")
        variant = self.function[grid](*args, **constants, **options)
        if key is not None and not interpreted():
            self.variants[key] = variant


def kernel(*varying: str) -> Callable[[Callable], Kernel]:
    """Declares a kernel; `varying` names integers that change from call to call and must not make new variants."""

    def declare(function: Callable) -> Kernel | Callable:
        return function if triton is None else Kernel(function, varying)

    return declare


def alignment(*tensors: Tensor | None) -> tuple[bool | None, ...]:
    """The part of a key that depends on where tensors lie."""
    return tuple(None if t is None else t.data_ptr() % 16 == 0 for t in tensors)


def aligned_key(tensors: Iterable[Tensor | None], *facts: Hashable) -> tuple | None:
    """The facts as a key, or None where a tensor is not 16-byte aligned, as slices may be.

    Fresh tensors are aligned and need not be named.
    """
    bits = 0
    for tensor in tensors:
        if tensor is not None:
            bits |= tensor.data_ptr()
    return None if bits % 16 else facts


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Kernels run on the current device, which need not be the tensor's."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def blocks_of(size: int, block: int) -> int:
    """size / block, rounded up; triton.cdiv is a traced function and takes microseconds on the host."""
    return -(-size // block)


def power_of_two(size: int, least: int = 16) -> int:
    """The smallest power of two that is at least `size` and `least`."""
    return max(least, 1 << max(0, size - 1).bit_length())


def row_block(width: int) -> tuple[int, int]:
    """Rows and columns of an elementwise program's block; the columns cover a whole row."""
    columns = power_of_two(width)
    return max(1, min(32, _ELEMENTS // columns)), columns
