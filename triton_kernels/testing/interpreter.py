"""Triton's interpreter, corrected where it silently computes something else than a compiled kernel.

It keeps bf16 as 16-bit integers and calculates with those, truncates to bf16, gets fp8 codes wrong, takes `and`, `or`
and `not` for Python's, and never evaluates tl.device_assert (triton 3.6.0 to 3.9.0; its authors do not support bf16).
After `install()`:

    bf16 operators, math, comparisons, tl.dot    in fp32, rounded once to nearest even, as PTX and HIP do
    bf16 reductions and scans                    accumulate in fp32, rounded once; a GPU rounds after every step
    casts to bf16 and fp8                        to nearest even; fp8 saturates, NaN stays NaN (cvt.rn.satfinite)
    minimum, maximum, clamp                      of a NaN and a number: the number, unless told to propagate it
    `a and b`, `a or b`, `not a`                 element by element
    `a < b < c`                                  SyntaxError: only the compiler of triton 3.9 takes it
    tl.device_assert                             raises where any element is false
    floating-point warnings of numpy             silent, as a GPU is

What it refuses loudly (inline assembly, libdevice, atomics on bf16) it still refuses. Needs TRITON_INTERPRET=1 in the
environment before triton is imported.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

Array = np.ndarray[Any, Any]

_TORCH = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}
_NUMPY_NATIVE = (tl.float64, tl.float32, tl.float16)
_FP8 = (tl.float8e4nv, tl.float8e5, tl.float8e4b8, tl.float8e5b16)
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}

# Methods of the builder that calculate with floating-point operands; not every version has all of them.
_FLOAT_METHODS = (
    *("fadd", "fsub", "fmul", "fdiv", "frem", "fneg", "fma", "dot", "precise_divf", "approx_divf", "clampf"),
    *("minimumf", "maximumf", "minnumf", "maxnumf", "floor", "ceil", "exp", "exp2", "log", "log2", "sin", "cos"),
    *("sqrt", "precise_sqrt", "rsqrt", "erf"),
    *(f"fcmp{kind}{relation}" for kind in "OU" for relation in ("LT", "GT", "LE", "GE", "EQ", "NE")),
)


def decode(codes: Array, dtype: tl.dtype) -> torch.Tensor:
    """Numbers of a triton floating-point dtype as the interpreter stores them, in fp32 (fp64 for fp64); exact."""
    words = torch.from_numpy(np.array(codes)).view(_WORDS[dtype.primitive_bitwidth // 8])
    return words.view(_TORCH[dtype]).to(torch.float64 if dtype == tl.float64 else torch.float32)


def encode(values: torch.Tensor, dtype: tl.dtype, *, toward_zero: bool = False) -> Array:
    """The codes of `values` in a triton floating-point dtype, rounded to nearest even; fp8 saturates."""
    if dtype in _FP8:
        largest = torch.finfo(_TORCH[dtype]).max
        values = torch.where(values.isnan(), values, values.clamp(-largest, largest))
    rounded = values.to(_TORCH[dtype])
    codes = rounded.view(_WORDS[dtype.primitive_bitwidth // 8])
    if toward_zero:  # sign and magnitude: one code less is one step nearer to zero
        codes = codes - (rounded.to(values.dtype).abs() > values.abs()).to(codes.dtype)
    return codes.numpy().view(getattr(np, f"uint{dtype.primitive_bitwidth}"))


def _is_bf16(value: object) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _narrow(codes: Array) -> TensorHandle:
    return TensorHandle(codes, tl.bfloat16)


def _widen(handle: Any) -> Any:
    if not _is_bf16(handle):
        return handle
    return TensorHandle(decode(handle.data, tl.bfloat16).numpy(), tl.float32)


def _in_float32(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """`method` for bf16 operands too: the result is bf16 where the last operand is (that of tl.dot: the sum)."""

    @functools.wraps(method)
    def call(builder: interpreter.InterpreterBuilder, *args: Any) -> TensorHandle:
        if not any(map(_is_bf16, args)):
            return method(builder, *args)
        result = method(builder, *map(_widen, args))
        if result.data.dtype == np.bool_:
            return TensorHandle(result.data, tl.int1)
        operands = [arg for arg in args if isinstance(arg, TensorHandle)]
        if not _is_bf16(operands[-1]):
            return result
        return _narrow(encode(torch.from_numpy(np.array(result.data, np.float32)), tl.bfloat16))

    return call


class CorrectedBuilder(interpreter.InterpreterBuilder):  # type: ignore[misc]
    """The interpreter's table of operations, each a method on numpy arrays."""

    def cast_impl(self, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        source, target = src.dtype.scalar, dst_type.scalar
        numpy_target = interpreter._get_np_dtype(target)
        if target in _TORCH and target not in _NUMPY_NATIVE:
            values = decode(src.data, source) if source in _TORCH else torch.from_numpy(src.data.astype(np.float32))
            return TensorHandle(encode(values, target).view(numpy_target), target)
        if source in _TORCH and source not in _NUMPY_NATIVE:
            return TensorHandle(decode(src.data, source).numpy().astype(numpy_target), target)
        return super().cast_impl(src, dst_type)

    def create_minnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_clampf(
        self, arg: TensorHandle, low: TensorHandle, high: TensorHandle, propagate: object
    ) -> TensorHandle:
        if propagate == ir.PROPAGATE_NAN.NONE:
            return self.create_minnumf(self.create_maxnumf(arg, low), high)
        return self.create_minimumf(self.create_maximumf(arg, low), high)

    def get_bf16(self, value: float) -> TensorHandle:
        return _narrow(encode(torch.tensor([value], dtype=torch.float32), tl.bfloat16))

    def get_all_ones_value(self, type: tl.dtype) -> TensorHandle:
        numpy_type = interpreter._get_np_dtype(type)
        if numpy_type.kind == "u":  # numpy 2 refuses to store -1 there
            return TensorHandle(np.full(1, np.iinfo(numpy_type).max, numpy_type), type.scalar)
        return super().get_all_ones_value(type)


for _name in _FLOAT_METHODS:
    if hasattr(CorrectedBuilder, f"create_{_name}"):
        setattr(CorrectedBuilder, f"create_{_name}", _in_float32(getattr(CorrectedBuilder, f"create_{_name}")))


def _convert_float(codes: Array, source: tl.dtype, target: tl.dtype, rounding_mode: object) -> Array:
    """In place of triton's function of this name: returns the codes as unsigned integers."""
    if source not in _TORCH or target not in _TORCH:
        raise NotImplementedError(f"casts from {source} to {target} are not corrected; use another dtype")
    return encode(decode(codes, source), target, toward_zero=rounding_mode == ir.ROUNDING_MODE.RTZ)


def _accumulate_in_float32(cls: type) -> None:
    """Make a class of reductions or scans widen its bf16 inputs and round its results once."""
    original = cls.apply_impl  # type: ignore[attr-defined]

    def widen(tensor: Any) -> Any:
        if tensor.dtype != tl.bfloat16:
            return tensor
        wide = _widen(tensor.handle)
        return tl.core.tensor(wide, tl.block_type(tl.float32, list(wide.data.shape)))

    def narrow(given: Any, result: Any) -> Any:
        if given.dtype != tl.bfloat16 or result.dtype != tl.float32:
            return result
        codes = encode(torch.from_numpy(np.array(result.handle.data)), tl.bfloat16)
        shape = result.type.shape if result.type.is_block() else None
        return tl.core.tensor(_narrow(codes), tl.block_type(tl.bfloat16, shape) if shape else tl.bfloat16)

    def apply_impl(self: Any, inputs: tuple[Any, ...]) -> Any:
        results = original(self, tuple(map(widen, inputs)))
        if not isinstance(results, (list, tuple)):
            return narrow(inputs[0], results)
        return [narrow(inputs[min(i, len(inputs) - 1)], result) for i, result in enumerate(results)]

    cls.apply_impl = apply_impl  # type: ignore[attr-defined]


def _all_or_any(every: bool, *operands: Callable[[], Any]) -> Any:
    """`a and b` (`every`) or `a or b`: as the compiler does, only what is known at compile time cuts it short."""
    result, tensors = None, []
    for operand in operands:
        result = operand()
        if isinstance(result, tl.core.tensor):
            tensors.append(result)
        elif bool(result) is not every:
            return result
    if not tensors:
        return result
    return functools.reduce(lambda a, b: a.logical_and(b) if every else a.logical_or(b), tensors)


def _negation(operand: Any) -> Any:
    return operand.__not__() if isinstance(operand, tl.core.tensor) else not operand


class _Rewriter(ast.NodeTransformer):
    """Boolean operators become calls; everything else is left to triton's own rewriter, which runs afterwards."""

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        operands: list[ast.expr] = [ast.Lambda(nothing, value) for value in node.values]
        every = ast.Constant(isinstance(node.op, ast.And))
        return ast.Call(ast.Name(_all_or_any.__name__, ast.Load()), [every, *operands], [])

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Not):
            return node
        return ast.Call(ast.Name(_negation.__name__, ast.Load()), [node.operand], [])

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if len(node.ops) > 1:
            raise SyntaxError(f"write `{ast.unparse(node)}` with & in a kernel: triton before 3.9 cannot compile it")
        return node


class _Rewriters:
    def __init__(self, *transformers: Any) -> None:
        self._transformers = transformers

    def visit(self, tree: ast.AST) -> ast.AST:
        return functools.reduce(lambda node, transformer: transformer.visit(node), self._transformers, tree)


def _silently(method: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> None:
        with np.errstate(all="ignore"):
            method(*args, **kwargs)

    return call


def _with_index(patch: Callable[..., None]) -> Callable[..., None]:
    """triton 3.6 turns a scalar of shape [1] into the bound of a loop in a way that numpy deprecates."""

    def call(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.squeeze()))

    return call


def install() -> None:
    """Correct the interpreter of this process. Calling it again changes nothing."""
    builder = interpreter.interpreter_builder
    if isinstance(builder, CorrectedBuilder):
        return
    builder.__class__ = CorrectedBuilder
    # Without debug no assertion is evaluated; with sanitize_overflow every integer operation would be one.
    builder.options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)
    interpreter._convert_float = _convert_float
    for cls in (interpreter.ReduceOps, interpreter.ScanOps):
        _accumulate_in_float32(cls)
    # A rewritten kernel finds names in the globals of triton's module.
    for function in (_all_or_any, _negation):
        setattr(interpreter, function.__name__, function)
    interpreter.FunctionRewriter.ast_transformer = _Rewriters(_Rewriter(), interpreter.FunctionRewriter.ast_transformer)
    interpreter._patch_lang_tensor = _with_index(interpreter._patch_lang_tensor)
    interpreter.GridExecutor.__call__ = _silently(interpreter.GridExecutor.__call__)
