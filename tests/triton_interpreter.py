"""Lets the Triton kernels' tests run without a GPU: import this before any module that imports triton."""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    import dataclasses
    import functools
    import inspect
    from types import ModuleType

    import numpy as np
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
    # shape, which are made anew for each operation, and into the calls around an operation.
    core, semantic = interpreter.tl.core, interpreter.TritonSemantic
    _init_block_type, _init_tensor, _equals = core.block_type.__init__, core.tensor.__init__, core.dtype.__eq__
    _check_types, _broadcast = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value
    _fits = interpreter._validate_np_data_size
    _types, _shapes, _fitting, _numbers, _joint = {}, {}, {}, {}, {}

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

    def _same_type(self, other):
        return self is other or _equals(self, other)

    def _valid_size(array, kind):
        key = array.itemsize, kind.name
        if key not in _fitting:
            _fitting[key] = _fits(array, kind)
        return _fitting[key]

    def _checked_types(self, lhs, rhs, *args, **options):
        """Operands of one type stay as they are, what may be half a division aside, and so do a pointer and what is
        added to it. A number becomes a tensor of the other operand's shape, once for each number and type."""
        left, right = isinstance(lhs, core.tensor), isinstance(rhs, core.tensor)
        if left and right and not args[3:] and not options:
            a, b = lhs.type.scalar, rhs.type.scalar
            if (args[0] and b.is_int()) if args and a.is_ptr() else (a.name == b.name and not a.is_ptr()):
                return self.broadcast_impl_value(lhs, rhs)
        if left == right or options:
            return _check_types(self, lhs, rhs, *args, **options)
        tensor, number = (lhs, rhs) if left else (rhs, lhs)
        key = tensor.type.name, type(number), number, left, args
        if key in _numbers:
            return (lhs, _numbers[key]) if left else (_numbers[key], rhs)
        found = _check_types(self, lhs, rhs, *args)
        # -0.0 is found as 0.0.
        if found[not left] is tensor and (number or type(number) is not float):
            _numbers[key] = found[left]
            found[left].handle.data.setflags(write=False)
        return found

    def _spread(value, sizes, one):
        data = value.handle.data
        spread = np.empty(sizes, data.dtype)
        spread[...] = data[0] if one else data
        return core.tensor(interpreter.TensorHandle(spread, value.dtype), core.block_type(value.dtype, list(sizes)))

    def _broadcast_values(self, lhs, rhs):
        a, b = getattr(lhs.type, "sizes", ()), getattr(rhs.type, "sizes", ())
        if a == b:
            return _broadcast(self, lhs, rhs) if a == () else (lhs, rhs)
        if a and b and len(a) != len(b):
            return _broadcast(self, lhs, rhs)
        if (a, b) not in _joint:
            # Or they do not fit.
            _broadcast(self, lhs, rhs)
            _joint[a, b] = np.broadcast_shapes(a, b)
        sizes = _joint[a, b]
        if a != sizes:
            lhs = _spread(lhs, sizes, a == ())
        if b != sizes:
            rhs = _spread(rhs, sizes, b == ())
        return lhs, rhs

    @functools.cache
    def _builtins(place):
        """(name, function that passes the interpreter on) of what a launch replaces in a module or class."""

        def passing(function):
            return lambda *args, _semantic=None, **options: function(
                *args, _semantic=interpreter.interpreter_semantic, **options
            )

        # Behind `__wrapped__` is the function without the check that the interpreter was passed on.
        members = [(name, member) for name, member in inspect.getmembers(place) if core.is_builtin(member)]
        found = {name: passing(getattr(member, "__wrapped__", member)) for name, member in members}
        if place is core.tensor:
            found |= {name: function for name, function in _operators() if name in found}
        return list(found.items())

    def _operators():
        """`x + y` is not also `tl.add(x, y)`."""

        def unwrapped(value):
            return value.value if isinstance(value, core.constexpr) else value

        for name in ("add", "sub", "mul"):
            function = functools.partial(getattr(semantic, name), interpreter.interpreter_semantic)
            yield f"__{name}__", lambda x, y, f=function, **_: f(x, unwrapped(y), True)
            yield f"__r{name}__", lambda x, y, f=function, **_: f(unwrapped(y), x, True)

    def _patch_builtin(place, builder, scope):
        for name, function in _builtins(place):
            scope.set_attr(place, name, function)

    core.block_type.__init__, core.tensor.__init__, core.dtype.__eq__ = _block_type, _tensor, _same_type
    semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value = _checked_types, _broadcast_values
    interpreter._validate_np_data_size, interpreter._patch_builtin = _valid_size, _patch_builtin
