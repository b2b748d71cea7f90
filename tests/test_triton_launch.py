"""Launches of Triton kernels: they compile, and what shares a key shares the code that Triton itself would choose. No
GPU is needed."""

from pathlib import Path

import pytest
import strangers
import torch
from kernel_launches import function_of, note_launches

TESTS = Path(__file__).resolve().parent

INTEGERS = (1, 7, 16, 8192, 2**31 + 16)
FLOATS = (0.5, 1.0, 16.0)


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
    return note_launches()


def test_an_equal_key_means_an_equal_variant(launches):
    """P17: no launch runs code that was compiled for other types, alignments or constants."""
    for kernel, args, options, constants in launches:
        function, bind = function_of(kernel)
        variants = {}
        for place, arg in enumerate(args):
            for value in (arg, *alternatives(arg)):
                changed = (*args[:place], value, *args[place + 1 :])
                _, key = kernel.key(0, changed, options, constants)
                bound, kinds, _ = bind(*changed, **constants, **options, debug=False)
                fixed = [value for value, kind in zip(bound.values(), kinds, strict=True) if kind[0] == "constexpr"]
                variant = str((kinds, fixed))
                assert variants.setdefault(key, variant) == variant, (function, function.arg_names[place], value)
        assert len(set(variants.values())) > 1, function


def test_constants_come_in_the_order_of_the_kernels_parameters(launches):
    for kernel, args, _, constants in launches:
        assert list(constants) == list(kernel.function.arg_names[len(args) :]), kernel.function.fn.__name__


def test_what_varies_from_call_to_call_makes_no_variants(launches):
    for kernel, args, options, constants in launches:
        for place, (arg, varies) in enumerate(zip(args, kernel.varies, strict=False)):
            if varies and type(arg) is int:
                others = ((*args[:place], value, *args[place + 1 :]) for value in (1, 7, 16))
                keys = {kernel.key(0, changed, options, constants)[1] for changed in others}
                assert len(keys) == 1, (kernel.function.fn.__name__, kernel.function.arg_names[place])


def test_every_kernel_compiles_for_a_gpu(launches, tmp_path, monkeypatch):
    """The interpreter takes what the compiler refuses, a variable of two types for instance."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    # A process that has the libraries, and no kernel of theirs made for the interpreter.
    places = [str(TESTS.parent), str(TESTS)]
    (tmp_path / "compile.py").write_text(
        f"import sys; sys.path[:0] = {places!r}\nimport kernel_launches\nkernel_launches.compile_all()\n", "utf-8"
    )
    done = strangers.run(tmp_path, "compile.py")
    assert done.returncode == 0, done.stderr
    compiled = {line for line in done.stdout.splitlines() if line.endswith("_kernel")}
    assert compiled == {kernel.function.fn.__name__ for kernel, *_ in launches} and len(compiled) >= 27


def test_no_backward_reads_what_was_saved_twice():
    """Gradient checkpointing raises at a second reading."""
    reads = []

    def pack(tensor):
        reads.append(0)
        return len(reads) - 1, tensor

    def unpack(packed):
        reads[packed[0]] += 1
        return packed[1]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        note_launches()
    assert len(reads) > 50 and max(reads) == 1
