# SPDX-License-Identifier: Apache-2.0
"""Packed weights inside of JAX's transformations: jit, grad, vmap, scan.

Outside of them `baracuda_cy.linear` takes JAX's arrays like any others and needs nothing of this.

>>> import jax
>>> import numpy as np
>>> import baracuda_cy as bcy
>>> from baracuda_cy.jax import Weight, linear
>>> w = Weight(bcy.quantize(np.eye(256, dtype=np.float32), "Q4_K"))
>>> jax.jit(linear)(jax.numpy.ones((8, 256)), w).shape
(8, 256)
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import baracuda_cy
from baracuda_cy import _cpu, _cuda, gguf, nf4
from baracuda_cy._xla import call_of
from baracuda_cy.descriptors import GgufDequantizeDescriptor, PlanPreference
from baracuda_cy.dlpack import inspect
from baracuda_cy.errors import InvalidProblem
from baracuda_cy.formats import ElementKind
from baracuda_cy.tensor import GgufTensor, Nf4Tensor, host_bytes

if TYPE_CHECKING:
    from baracuda_cy.plan import Plan

__all__ = ["Weight", "dequantize", "linear"]


# ---- operations as XLA knows them ----------------------------------------------------------------


def _target(operation: str) -> str:
    # Compiled programs outlive this process; the arguments that they hold belong to this version.
    return f"baracuda_cy.{operation}.{baracuda_cy.__version__}"


def _register() -> None:
    names = ("gguf_matmul", "gguf_matvec", "gguf_dequantize", "nf4_matmul", "nf4_dequantize")
    for name in names:
        for platform, module in (("cpu", _cpu), ("CUDA", _cuda)):
            handler = module.xla_handler(name)
            if handler is not None:
                jax.ffi.register_ffi_target(_target(name), handler, platform=platform)


_register()


class _How(NamedTuple):
    """What of a weight is no array, the same in every call of a compiled program."""

    gguf: bool
    problem: Any  # the weight's `_problem`, which its plans are selected by
    shape: tuple[int, ...]
    nested: tuple[int, float]  # block size and offset of nested absmax; 0 where it is none
    device: str

    @property
    def nrows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def ncols(self) -> int:
        return self.shape[-1]


def _call(plan: Plan, how: _How, out: Any, inputs: list[Any], bias: bool = False) -> jax.Array:
    operation, problem = call_of(plan, bias, *how.nested)
    outputs = [out]
    if plan.workspace_size:
        outputs.append(jax.ShapeDtypeStruct((plan.workspace_size,), jnp.uint8))
    call = jax.ffi.ffi_call(_target(operation), outputs, vmap_method="sequential")
    return call(*inputs, problem=np.frombuffer(problem, np.uint8))[0]


def _multiply(
    how: _How, wishes: PlanPreference | None, x: Any, arrays: tuple[Any, ...], bias: Any
) -> Any:
    """Multiply a matrix."""
    element = int(ElementKind.of(x.dtype))
    host, _, ordinal = how.device.partition(":")
    where = (host == "cpu", int(ordinal or 0))
    plan: Plan
    if how.gguf:
        nrows, ncols, block_format, _ = how.problem
        plan = gguf.select_product(
            *where, block_format, nrows, ncols, x.shape[0], element, element, wishes
        )
    else:
        plan = nf4.select_product(
            *where, how.problem, x.shape[0], element, element, bias is not None, wishes
        )
    out = jax.ShapeDtypeStruct((x.shape[0], how.nrows), x.dtype)
    inputs = [*arrays, x] if bias is None else [*arrays, x, bias]
    return _call(plan, how, out, inputs, bias is not None)


def _unpack(how: _How, arrays: tuple[Any, ...], dtype: Any) -> Any:
    """Return the weight as a matrix of floats."""
    element = ElementKind.of(dtype)
    plan: Plan
    if how.gguf:
        nrows, ncols, block_format, _ = how.problem
        descriptor = GgufDequantizeDescriptor(
            nrows=nrows, ncols=ncols, block_format=block_format, output=element
        )
        plan = gguf.GgufDequantizePlan.select(how.device, descriptor)
    else:
        plan = nf4.select_dequantize(how.device, how.problem, element, None)
    return _call(plan, how, jax.ShapeDtypeStruct((how.nrows, how.ncols), dtype), [*arrays])


# ---- what transformations make of them -----------------------------------------------------------


def _multiply_any(
    how: _How, wishes: PlanPreference | None, x: Any, arrays: tuple[Any, ...], bias: Any
) -> Any:
    """Multiply a matrix, or a batch of them, which is one of more rows."""
    one = partial(_multiply, how, wishes)
    multiply = jax.custom_batching.custom_vmap(one)

    def batch(size: int, batched: Any, x: Any, arrays: tuple[Any, ...], bias: Any) -> Any:
        if any(jax.tree.leaves(batched[1:])):
            axes = jax.tree.map(lambda it: 0 if it else None, tuple(batched))
            return jax.vmap(one, in_axes=axes)(x, arrays, bias), True
        y = multiply(x.reshape(-1, how.ncols), arrays, bias)
        return y.reshape(size, -1, how.nrows), True

    multiply.def_vmap(batch)
    return multiply(x, arrays, bias)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear(
    how: _How, wishes: PlanPreference | None, x: Any, arrays: tuple[Any, ...], bias: Any
) -> Any:
    y = _multiply_any(how, wishes, x.reshape(-1, how.ncols), arrays, bias)
    return y.reshape(*x.shape[:-1], how.nrows)


def _forward(how: _How, wishes: Any, x: Any, arrays: tuple[Any, ...], bias: Any) -> Any:
    return _linear(how, wishes, x, arrays, bias), (arrays, bias is not None)


def _backward(how: _How, wishes: Any, kept: Any, gradient: Any) -> Any:
    arrays, has_bias = kept
    of_x = gradient @ _unpack(how, arrays, gradient.dtype)
    of_arrays = tuple(np.zeros(it.shape, jax.dtypes.float0) for it in arrays)
    of_bias = gradient.reshape(-1, how.nrows).sum(0) if has_bias else None
    return of_x, of_arrays, of_bias


_linear.defvjp(_forward, _backward)


# ---- what people write ---------------------------------------------------------------------------


@jax.tree_util.register_pytree_node_class
class Weight:
    """A packed weight as JAX's functions take it: a pytree, whose leaves are its bytes.

    Pass it to compiled functions as an argument: what they only refer to becomes a constant of the
    program. All its leaves are uint8, which `jax.grad` has no gradients for: split parameters, or
    pass ``allow_int=True``.

    Parameters
    ----------
    weight : GgufTensor or Nf4Tensor
        On the device where it is to be used. What is on the host is copied; memory of CUDA is
        shared, but for parts that begin at no multiple of 16 bytes.

    Attributes
    ----------
    arrays : tuple of jax.Array
        The packed bytes; with NF4 and FP4 absmax, and where it is nested its code and scales.
    shape : tuple of int
        The weight's, in elements.

    Raises
    ------
    InvalidProblem
        No packed weight.

    Examples
    --------
    >>> import numpy as np
    >>> import baracuda_cy as bcy
    >>> from baracuda_cy.jax import Weight
    >>> Weight(bcy.quantize(np.eye(64, dtype=np.float32), "nf4"))
    Weight(shape=(64, 64), 2304 bytes, on cpu)
    """

    __slots__ = ("__weakref__", "_how", "arrays")

    arrays: tuple[jax.Array, ...]
    _how: _How

    def __init__(self, weight: GgufTensor | Nf4Tensor) -> None:
        if not isinstance(weight, (GgufTensor, Nf4Tensor)) or not hasattr(weight, "device"):
            raise InvalidProblem(
                f"weight: expected a GgufTensor or an Nf4Tensor, got {type(weight).__name__}; "
                "quantize it, or open a file of such"
            )
        arrays, nested = [weight.data], (0, 0.0)
        if isinstance(weight, Nf4Tensor):
            arrays.append(weight.absmax)
            if weight.nested is not None:
                arrays += [weight.nested.code, weight.nested.absmax]
                nested = (weight.nested.block_size, weight.nested.offset)
        is_gguf = isinstance(weight, GgufTensor)
        nbytes = weight.nbytes if is_gguf else None
        self.arrays = tuple(_bytes(array, nbytes, weight.device) for array in arrays)
        self._how = _How(is_gguf, weight._problem, weight.shape, nested, weight.device)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, in elements."""
        return self._how.shape

    def __repr__(self) -> str:
        nbytes = sum(getattr(it, "nbytes", 0) for it in self.arrays)
        return f"Weight(shape={self.shape}, {nbytes} bytes, on {self._how.device})"

    def tree_flatten(self) -> tuple[tuple[Any, ...], _How]:
        return self.arrays, self._how

    @classmethod
    def tree_unflatten(cls, how: _How, arrays: Any) -> Weight:
        made = object.__new__(cls)
        made.arrays, made._how = tuple(arrays), how
        return made


def linear(
    x: Any, w: Weight, bias: Any = None, *, preference: PlanPreference | None = None
) -> jax.Array:
    """Multiply activations by a packed weight: ``x @ dequantize(w).T + bias``.

    The bits are those of `baracuda_cy.linear`. Gradients reach `x` and `bias`; that of `x` is the
    gradient times the unpacked weight, which takes its memory for that long. ``vmap`` over `x`
    multiplies all at once, over `w` one after the other.

    Parameters
    ----------
    x : array
        [..., K], float32, float16 or bfloat16, on the device of `w`.
    w : Weight
        Of N rows and K columns.
    bias : array, optional
        [N]; rounded to the dtype of `x`.
    preference : PlanPreference, optional
        As for `baracuda_cy.linear`; a constant of compiled programs.

    Returns
    -------
    jax.Array
        [..., N], of the dtype of `x`.

    Raises
    ------
    InvalidProblem
        Arguments that do not fit each other.

    Examples
    --------
    >>> import jax
    >>> import numpy as np
    >>> import baracuda_cy as bcy
    >>> from baracuda_cy.jax import Weight, linear
    >>> w = Weight(bcy.quantize(np.eye(64, dtype=np.float32), "Q8_0"))
    >>> x = jax.numpy.ones((2, 3, 64))
    >>> jax.grad(lambda x: jax.jit(linear)(x, w).sum())(x).shape
    (2, 3, 64)
    """
    _check_weight(w)
    how, x = w._how, jnp.asarray(x)
    if x.ndim == 0 or x.shape[-1] != how.ncols:
        raise InvalidProblem(
            f"x: expected shape [..., {how.ncols}], got {list(x.shape)}; reshape it"
        )
    _check_element(x.dtype, "x")
    if bias is not None:
        bias = jnp.asarray(bias).astype(x.dtype)
        if bias.shape != (how.nrows,):
            raise InvalidProblem(
                f"bias: expected shape [{how.nrows}], got {list(bias.shape)}; reshape it"
            )
    if preference is not None and not isinstance(preference, PlanPreference):
        raise InvalidProblem(
            f"preference: expected a PlanPreference, got {type(preference).__name__}; "
            "pass PlanPreference(...) or None"
        )
    return _linear(how, preference, x, w.arrays, bias)


def dequantize(w: Weight, dtype: Any = jnp.float32) -> jax.Array:
    """Unpack a weight to floats.

    Parameters
    ----------
    w : Weight
        The packed weight.
    dtype : dtype
        float32, float16 or bfloat16.

    Returns
    -------
    jax.Array
        Of the shape of `w`.

    Raises
    ------
    InvalidProblem
        No `Weight`, or another dtype.

    Examples
    --------
    >>> import numpy as np
    >>> import baracuda_cy as bcy
    >>> from baracuda_cy.jax import Weight, dequantize
    >>> dequantize(Weight(bcy.quantize(np.eye(64, dtype=np.float32), "Q8_0")), "bfloat16").dtype
    dtype(bfloat16)
    """
    _check_weight(w)
    dtype = jnp.dtype(dtype)
    _check_element(dtype, "dtype")
    return _unpack(w._how, w.arrays, dtype).reshape(w.shape)


def _check_weight(w: Any) -> None:
    if not isinstance(w, Weight):
        raise InvalidProblem(f"w: expected a Weight, got {type(w).__name__}; make one: Weight(w)")


def _check_element(dtype: Any, name: str) -> None:
    if dtype not in (jnp.float32, jnp.float16, jnp.bfloat16):
        raise InvalidProblem(
            f"{name}: expected float32, float16 or bfloat16, got {dtype}; convert it"
        )


def _bytes(array: Any, nbytes: int | None, device: str) -> jax.Array:
    """Return an array as one row of bytes, where it is."""
    backend, _, ordinal = device.partition(":")
    if not isinstance(array, jax.Array):
        # Programs take memory that begins at any multiple of 16 bytes, and elsewhere a copy.
        if backend == "cpu" or inspect(array)["pointer"] % 16:
            places = jax.local_devices(backend=backend)
            place = next(it for it in places if it.local_hardware_id == int(ordinal or 0))
            return jax.device_put(np.array(host_bytes(array, nbytes)), place)
        array = jnp.from_dlpack(array)
    return jax.lax.bitcast_convert_type(array, jnp.uint8).reshape(-1)[:nbytes]
