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
from baracuda_cy.ops import check_packed
from baracuda_cy.tensor import GgufTensor, Nf4Tensor, host_bytes

if TYPE_CHECKING:
    from baracuda_cy.plan import Plan

__all__ = ["Weight", "dequantize", "linear"]


# ---- operations as XLA knows them ----------------------------------------------------------------


_PLATFORMS = {"cpu": ("cpu", _cpu), "cuda": ("CUDA", _cuda)}


def _target(backend: str, operation: str) -> str:
    # Compiled programs outlive this process; the arguments that they hold belong to this version,
    # and to one backend, as the size of the workspace does.
    return f"baracuda_cy.{baracuda_cy.__version__}.{backend}.{operation}"


def _register() -> None:
    names = ("gguf_matmul", "gguf_matvec", "gguf_dequantize", "nf4_matmul", "nf4_dequantize")
    for backend, (platform, module) in _PLATFORMS.items():
        for name in names:
            handler = module.xla_handler(name)
            if handler is not None:
                jax.ffi.register_ffi_target(_target(backend, name), handler, platform=platform)


_register()


class _Spec(NamedTuple):
    """What of a weight is no array, the same in every call of a compiled program."""

    gguf: bool
    problem: Any  # the weight's `_problem`, which its plans are selected by
    shape: tuple[int, ...]
    sizes: tuple[int, ...]  # bytes of its arrays
    device: str

    @property
    def nrows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def ncols(self) -> int:
        return self.shape[-1]


def _call(plan: Plan, out: Any, inputs: list[Any], bias: bool = False) -> jax.Array:
    operation, problem = call_of(plan, bias)
    outputs = [out]
    if plan.workspace_size:
        outputs.append(jax.ShapeDtypeStruct((plan.workspace_size,), jnp.uint8))
    target = _target(plan.device.partition(":")[0], operation)
    call = jax.ffi.ffi_call(target, outputs, vmap_method="sequential")
    return call(*inputs, problem=np.frombuffer(problem, np.uint8))[0]


def _multiply(
    spec: _Spec, preference: PlanPreference | None, x: Any, arrays: tuple[Any, ...], bias: Any
) -> Any:
    """Multiply a matrix."""
    element = int(ElementKind.of(x.dtype))
    backend, _, ordinal = spec.device.partition(":")
    where = (backend == "cpu", int(ordinal or 0))
    plan: Plan
    if spec.gguf:
        nrows, ncols, block_format, _ = spec.problem
        plan = gguf.select_product(
            *where, block_format, nrows, ncols, x.shape[0], element, element, preference
        )
    else:
        plan = nf4.select_product(
            *where, spec.problem, x.shape[0], element, element, bias is not None, preference
        )
    out = jax.ShapeDtypeStruct((x.shape[0], spec.nrows), x.dtype)
    inputs = [*arrays, x] if bias is None else [*arrays, x, bias]
    return _call(plan, out, inputs, bias is not None)


def _unpack(spec: _Spec, arrays: tuple[Any, ...], dtype: Any) -> Any:
    """Return the weight as a matrix of floats."""
    element = ElementKind.of(dtype)
    plan: Plan
    if spec.gguf:
        nrows, ncols, block_format, _ = spec.problem
        descriptor = GgufDequantizeDescriptor(
            nrows=nrows, ncols=ncols, block_format=block_format, output=element
        )
        plan = gguf.GgufDequantizePlan.select(spec.device, descriptor)
    else:
        plan = nf4.select_dequantize(spec.device, spec.problem, element, None)
    return _call(plan, jax.ShapeDtypeStruct((spec.nrows, spec.ncols), dtype), [*arrays])


# ---- what transformations make of them -----------------------------------------------------------


def _multiply_any(
    spec: _Spec, preference: PlanPreference | None, x: Any, arrays: tuple[Any, ...], bias: Any
) -> Any:
    """Multiply a matrix, or a batch of them, which is one of more rows."""
    one = partial(_multiply, spec, preference)
    multiply = jax.custom_batching.custom_vmap(one)

    def batch(size: int, batched: Any, x: Any, arrays: tuple[Any, ...], bias: Any) -> Any:
        if any(jax.tree.leaves(batched[1:])):
            axes = jax.tree.map(lambda it: 0 if it else None, tuple(batched))
            return jax.vmap(one, in_axes=axes)(x, arrays, bias), True
        y = multiply(x.reshape(math.prod(x.shape[:-1]), spec.ncols), arrays, bias)
        return y.reshape(*x.shape[:-1], spec.nrows), True

    multiply.def_vmap(batch)
    return multiply(x, arrays, bias)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear(
    spec: _Spec, preference: PlanPreference | None, x: Any, arrays: tuple[Any, ...], bias: Any
) -> Any:
    rows = x.reshape(math.prod(x.shape[:-1]), spec.ncols)
    return _multiply_any(spec, preference, rows, arrays, bias).reshape(*x.shape[:-1], spec.nrows)


def _forward(spec: _Spec, preference: Any, x: Any, arrays: tuple[Any, ...], bias: Any) -> Any:
    return _linear(spec, preference, x, arrays, bias), (arrays, bias is not None)


def _backward(spec: _Spec, preference: Any, kept: Any, gradient: Any) -> Any:
    arrays, has_bias = kept
    of_x = gradient @ _unpack(spec, arrays, gradient.dtype)
    of_arrays = tuple(np.zeros(it.shape, jax.dtypes.float0) for it in arrays)
    of_bias = gradient.sum(tuple(range(gradient.ndim - 1))) if has_bias else None
    return of_x, of_arrays, of_bias


_linear.defvjp(_forward, _backward)
# Outside of jit, too, a program is compiled once.
_compiled = jax.jit(_linear, static_argnums=(0, 1), inline=True)


# ---- what people write ---------------------------------------------------------------------------


@jax.tree_util.register_pytree_with_keys_class
class Weight:
    """A packed weight as JAX's functions take it: a pytree, whose leaves are its bytes.

    Pass it to compiled functions as an argument: what they only refer to becomes a constant of the
    program. Weights of one shape and format, stacked leaf by leaf, are for `jax.lax.scan` and
    `jax.vmap`. All leaves are uint8, which `jax.grad` has no gradients for: split parameters, or
    pass ``allow_int=True``; and a cast of parameters is for the others alone.

    Parameters
    ----------
    weight : GgufTensor or Nf4Tensor
        On the device where it is to be used; for another one make another. Codes on CUDA are
        shared, but for parts that begin at no multiple of 16 bytes; all else is copied. Nested
        absmax becomes float32, with the same values.

    Attributes
    ----------
    arrays : tuple of jax.Array
        The packed bytes, and with NF4 and FP4 those of absmax.
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
    Weight(shape=(64, 64), 2304 bytes on cpu)
    """

    __slots__ = ("__weakref__", "_spec", "arrays")

    arrays: tuple[jax.Array, ...]
    _spec: _Spec

    def __init__(self, weight: GgufTensor | Nf4Tensor) -> None:
        check_packed(weight, "weight")
        device = weight.device
        if is_gguf := isinstance(weight, GgufTensor):
            self.arrays = (_bytes(weight.data, weight.nbytes, device),)
        else:
            # An offset, which no array holds, would be a constant of programs.
            weight = weight.unnest()
            self.arrays = tuple(_bytes(it, None, device) for it in (weight.data, weight.absmax))
        sizes = tuple(array.size for array in self.arrays)
        self._spec = _Spec(is_gguf, weight._problem, weight.shape, sizes, device)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, in elements."""
        return self._spec.shape

    def __repr__(self) -> str:
        return f"Weight(shape={self.shape}, {sum(self._spec.sizes)} bytes on {self._spec.device})"

    # For each call of a program; the other one is for messages and checkpoints.
    def tree_flatten(self) -> tuple[Any, _Spec]:
        return self.arrays, self._spec

    def tree_flatten_with_keys(self) -> tuple[Any, _Spec]:
        names = map(jax.tree_util.GetAttrKey, ("data", "absmax"))
        return tuple(zip(names, self.arrays, strict=False)), self._spec

    @classmethod
    def tree_unflatten(cls, spec: _Spec, arrays: Any) -> Weight:
        made = object.__new__(cls)
        made.arrays, made._spec = tuple(arrays), spec
        return made


def linear(
    x: Any, w: Weight, bias: Any = None, *, preference: PlanPreference | None = None
) -> jax.Array:
    """Multiply activations by a packed weight: ``x @ dequantize(w).T + bias``.

    The bits are those of `baracuda_cy.linear`. Gradients reach `x` and `bias`, in reverse mode:
    that of `x` is the gradient times the unpacked weight, which takes its memory for that long.
    ``vmap`` over `x` alone multiplies all at once, over `w` or `bias` one after the other.

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
    spec, x = w._spec, jnp.asarray(x)
    if x.ndim == 0 or x.shape[-1] != spec.ncols:
        raise InvalidProblem(
            f"x: expected shape [..., {spec.ncols}], got {list(x.shape)}; reshape it"
        )
    _check_element(x.dtype, "x")
    if bias is not None:
        bias = jnp.asarray(bias).astype(x.dtype)
        if bias.shape != (spec.nrows,):
            raise InvalidProblem(
                f"bias: expected shape [{spec.nrows}], got {list(bias.shape)}; reshape it"
            )
    if preference is not None and not isinstance(preference, PlanPreference):
        raise InvalidProblem(
            f"preference: expected a PlanPreference, got {type(preference).__name__}; "
            "pass PlanPreference(...) or None"
        )
    return _compiled(spec, preference, x, w.arrays, bias)


def dequantize(w: Weight, dtype: Any = jnp.float32) -> jax.Array:
    """Unpack a weight to floats.

    Parameters
    ----------
    w : Weight
        The packed weight.
    dtype : ElementKind or dtype
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
    dtype = jnp.dtype(ElementKind.of(dtype, "dtype").dtype)
    _check_element(dtype, "dtype")
    return _unpack(w._spec, w.arrays, dtype).reshape(w.shape)


def _check_weight(w: Any) -> None:
    if not isinstance(w, Weight):
        raise InvalidProblem(f"w: expected a Weight, got {type(w).__name__}; make one: Weight(w)")
    given = [(getattr(it, "shape", None), getattr(it, "dtype", None)) for it in w.arrays]
    wanted = [((size,), jnp.dtype("uint8")) for size in w._spec.sizes]
    if given != wanted:
        expected, got = (
            ", ".join(f"{dtype}{list(shape or ())}" for shape, dtype in them)
            for them in (wanted, given)
        )
        raise InvalidProblem(
            f"w: expected leaves {expected}, got {got}; scan or vmap over weights that are "
            "stacked, and neither cast nor cut what is packed"
        )


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
    if array.dtype != jnp.uint8:
        array = jax.lax.bitcast_convert_type(array, jnp.uint8)
    array = array.reshape(-1)
    return array if nbytes in (None, array.size) else array[:nbytes]
