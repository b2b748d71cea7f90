"""Lets the Triton kernels' tests run without a GPU: import this before any module that imports triton."""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    import dataclasses
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

    @functools.cache
    def _languages(fn):
        language = (interpreter.tl, interpreter.tl.core)
        modules = {id(value) for value in fn.__globals__.values() if isinstance(value, ModuleType)}
        return modules & {id(module) for module in language}

    def _patch_once_a_launch(fn):
        """The interpreter looks through the whole language for functions to replace, once a launch and again at each
        call of a function within a kernel: a third of the time of a small launch."""
        modules = _languages(fn)
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

    # Sums and products of integers are worked out a second time in int64 for an assertion, which is then left out.
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    # What follows is the interpreter's own, by a shorter way: most of its time goes into the objects that describe a
    # shape, which are made anew for each operation.
    core, semantic = interpreter.tl.core, interpreter.TritonSemantic
    _init_block_type, _init_tensor = core.block_type.__init__, core.tensor.__init__
    _check_types, _broadcast = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value
    _types, _shapes = {}, {}

    def _block_type(self, element_ty, shape):
        sizes = tuple(size.value if isinstance(size, core.constexpr) else size for size in shape)
        key = (type(element_ty), element_ty.name, sizes)
        if key not in _types:
            _init_block_type(self, element_ty, shape)
            _types[key] = (self.shape, self.numel, self.name)
        self.element_ty, self.sizes = element_ty, sizes
        self.shape, self.numel, self.name = _types[key]

    def _tensor(self, handle, type):
        sizes = getattr(type, "sizes", ())
        if sizes not in _shapes:
            _init_tensor(self, handle, type)
            _shapes[sizes] = (self.shape, self.numel)
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = _shapes[sizes]

    def _checked_types(self, lhs, rhs, *args, **options):
        """Operands of one type stay as they are, pointers and what may be half a division aside."""
        if isinstance(lhs, core.tensor) and isinstance(rhs, core.tensor) and not args[3:] and not options:
            a, b = lhs.type, rhs.type
            if a.name == b.name and not a.scalar.is_ptr():
                return lhs, rhs
        return _check_types(self, lhs, rhs, *args, **options)

    def _broadcast_values(self, lhs, rhs):
        sizes = getattr(lhs.type, "sizes", ())
        return (lhs, rhs) if sizes and sizes == getattr(rhs.type, "sizes", ()) else _broadcast(self, lhs, rhs)

    core.block_type.__init__, core.tensor.__init__ = _block_type, _tensor
    semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value = _checked_types, _broadcast_values
