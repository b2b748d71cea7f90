"""Lets the Triton kernels' tests run without a GPU: import this before any module that imports triton."""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    import functools
    from types import ModuleType

    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_with_index(tensor, scope):
        _patch(tensor, scope)
        # The interpreter keeps scalars as arrays of one element, which NumPy 2.4 no longer turns into a loop bound.
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_with_index
    _find_dtype = interpreter._get_np_dtype
    # It builds its table anew for each operation of a kernel.
    _find_once = functools.cache(_find_dtype)

    def _np_dtype(kind):
        return _find_dtype(kind) if kind.scalar.is_ptr() else _find_once(kind.scalar)

    interpreter._get_np_dtype = _np_dtype

    _patch_lang, _patched = interpreter._patch_lang, set()

    def _patch_once_a_launch(fn):
        """The interpreter looks through the whole language for functions to replace, once a launch and again at each
        call of a function within a kernel: a third of the time of a small launch."""
        language = (interpreter.tl, interpreter.tl.core)
        modules = {id(value) for value in fn.__globals__.values() if isinstance(value, ModuleType)}
        modules &= {id(module) for module in language}
        if modules <= _patched:
            return None
        launch = not _patched
        _patched.update(modules)
        scope = _patch_lang(fn)
        if launch:
            restore = scope.restore

            def restore_all():
                _patched.clear()
                restore()

            scope.restore = restore_all
        return scope

    interpreter._patch_lang = _patch_once_a_launch
