# SPDX-License-Identifier: Apache-2.0
"""What people type every day: products with packed weights, unpacking, packing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from baracuda_cy import _ops
from baracuda_cy.arguments import as_flag, as_integer
from baracuda_cy.descriptors import PlanPreference
from baracuda_cy.errors import InvalidProblem
from baracuda_cy.formats import Codebook, GgufBlockFormat, Nf4Layout, nf4_sizes
from baracuda_cy.tensor import GgufTensor, NestedAbsmax, Nf4Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from baracuda_cy.stream import Stream

__all__ = ["concatenate", "dequantize", "linear", "quantize"]

_WEIGHTS = (GgufTensor, Nf4Tensor)
_Weight = TypeVar("_Weight", GgufTensor, Nf4Tensor)


def check_packed(w: Any, name: str = "w") -> None:
    # What came out of `__new__` alone has no device.
    if not isinstance(w, _WEIGHTS) or not hasattr(w, "device"):
        given = repr(w) if isinstance(w, _WEIGHTS) else type(w).__name__
        raise InvalidProblem(
            f"{name}: expected a GgufTensor or an Nf4Tensor, got {given}; "
            'make one: GgufTensor(data, "Q4_K", shape=(nrows, ncols)), or quantize(array, "Q4_K")'
        )


def _check_preference(preference: Any) -> None:
    if preference is not None and not isinstance(preference, PlanPreference):
        raise InvalidProblem(
            f"preference: expected a PlanPreference, got {type(preference).__name__}; "
            "pass PlanPreference(...) or None"
        )


def linear(
    x: Any,
    w: GgufTensor | Nf4Tensor,
    bias: Any = None,
    *,
    out: Any = None,
    stream: Stream | Any = None,
    preference: PlanPreference | None = None,
) -> Any:
    """Multiply activations by a packed weight: ``x @ dequantize(w).T + bias``.

    With a GGUF weight the activations are staged to int8, with one in NF4 or FP4 they are
    multiplied as they are: at every size of the batch, so that the bits of a token never depend on
    what else is in it. Output and scratch are the only memory it allocates, from the framework that
    `x` is from, but for native scratch of float activations on the CPU.

    Parameters
    ----------
    x : array
        Activations [..., K], float32, float16 or bfloat16, of any framework.
    w : GgufTensor or Nf4Tensor
        Weight of N rows and K columns, on the device of `x`.
    bias : array, optional
        [N], of the output's dtype.
    out : array, optional
        [..., N], of the dtype of `x` or float32, to write to.
    stream : Stream or object with ``__cuda_stream__``, optional
        Where to run on CUDA. By default the current stream of the framework of `x`, else the legacy
        default stream.
    preference : PlanPreference, optional
        ``activations="float"`` takes 24 bits of the activations with a GGUF weight, not 8;
        ``bit_stable_across_hardware`` is for NF4 and FP4 on CUDA, ``threads`` for the CPU.

    Returns
    -------
    array
        `out`, or [..., N] in the dtype of `x` and of its own kind of array.

    Raises
    ------
    InvalidProblem
        Arguments that do not fit each other, or rows of `x` that do not lie at one stride.

    Examples
    --------
    >>> import numpy as np
    >>> import baracuda_cy as bcy
    >>> w = bcy.quantize(np.eye(64, dtype=np.float32), "Q8_0")
    >>> bcy.linear(np.ones((2, 3, 64), np.float32), w).shape
    (2, 3, 64)
    """
    check_packed(w)
    _check_preference(preference)
    return _ops.multiply(x, w, bias, out, stream, preference)


def dequantize(
    w: GgufTensor | Nf4Tensor,
    dtype: Any = None,
    out: Any = None,
    stream: Stream | Any = None,
    *,
    preference: PlanPreference | None = None,
) -> Any:
    """Unpack a weight to floats.

    Parameters
    ----------
    w : GgufTensor or Nf4Tensor
        The packed weight.
    dtype : ElementKind or dtype, optional
        float32, float16 or bfloat16; by default that of `out`, else float32.
    out : array, optional
        Where to write: the shape of `w`.
    stream : Stream or object with ``__cuda_stream__``, optional
        Where to run on CUDA.
    preference : PlanPreference, optional
        ``threads`` is for the CPU.

    Returns
    -------
    array
        `out`, or an array of the kind that ``w.data`` is: NumPy for files and buffers, a
        `DeviceArray` for weights moved with ``w.to("cuda")``.

    Raises
    ------
    InvalidProblem
        Another dtype, or an `out` that does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> import baracuda_cy as bcy
    >>> bcy.dequantize(bcy.quantize(np.eye(32, dtype=np.float32), "Q8_0")).dtype
    dtype('float32')
    """
    check_packed(w)
    _check_preference(preference)
    return _ops.unpack(w, dtype, out, stream, preference)


@overload
def quantize(
    array: Any,
    format: Literal["nf4", "fp4", "NF4", "FP4"] | Codebook,
    *,
    block_size: int = 64,
    nested: bool = False,
    threads: int | None = None,
) -> Nf4Tensor: ...


@overload
def quantize(
    array: Any,
    format: GgufBlockFormat | str | int,
    *,
    block_size: int = 64,
    nested: bool = False,
    threads: int | None = None,
) -> GgufTensor: ...


def quantize(
    array: Any,
    format: Codebook | GgufBlockFormat | str | int,
    *,
    block_size: int = 64,
    nested: bool = False,
    threads: int | None = None,
) -> GgufTensor | Nf4Tensor:
    """Pack an array: into NF4 or FP4 where it is, into a GGUF block format on the CPU.

    NF4 and FP4 have the bytes and the absmax that bitsandbytes has on the CPU, on every device.

    Scales and minima of GGUF formats are float16, except in Q8_K and MXFP4. Where one of them would
    exceed 65504, which takes a value beyond that, the block becomes infinities or NaN in the
    formats with ggml's bytes, as with ggml, and is clipped in the others; scale such weights down
    first. Smaller values never cause this.

    Parameters
    ----------
    array : array
        float32, float16 or bfloat16, [..., K]. For GGUF on the host, K a multiple of the block size
        and rows contiguous. For NF4 and FP4 of any shape, contiguous, on the host or on CUDA.
    format : Codebook, GgufBlockFormat or str
        What to pack into: ``"nf4"``, ``"fp4"`` or a GGUF format such as ``"Q4_K"``.
    block_size : int
        NF4 and FP4: elements that share a scale, a power of two from 32 to 4096. They are counted
        through the whole array, across the ends of its rows.
    nested : bool
        NF4 and FP4: whether to quantize the scales themselves to 8 bits. Their mean is taken on the
        host: on CUDA that waits for the device.
    threads : int, optional
        Threads to use on the CPU; by default as `PlanPreference` has it. The bytes do not depend on
        it.

    Returns
    -------
    GgufTensor or Nf4Tensor
        Of the shape of `array`: over NumPy arrays; for NF4 and FP4 on CUDA over arrays of the kind
        that `array` is, on its device and in the order of its framework's current stream.

    Raises
    ------
    InvalidProblem
        An array of another dtype, not contiguous, with NaN or infinity in it (looked for on the
        host only: on CUDA a block with one is packed as it may be), for GGUF one on a device or
        with columns that are no multiple of the block size; a block size out of range; or options
        of NF4 and FP4 for GGUF.

    Examples
    --------
    >>> import numpy as np
    >>> import baracuda_cy as bcy
    >>> bcy.quantize(np.eye(32, dtype=np.float32), "Q4_0")
    GgufTensor(Q4_0, shape=(32, 32), 576 bytes on cpu)
    >>> bcy.quantize(np.eye(32, dtype=np.float32), "nf4")
    Nf4Tensor(NF4, shape=(32, 32), block_size=64, bitsandbytes layout, 576 bytes on cpu)
    """
    as_flag(nested, "nested")
    block_size = as_integer(block_size, "block_size")
    workers = PlanPreference(threads=threads).threads or 0
    codebook = _codebook(format)
    if codebook is not None:
        nf4_sizes(0, 0, block_size, Nf4Layout.BITSANDBYTES)
        data, absmax, tables, shape, kind = _ops.encode(
            array, codebook, block_size, nested, workers
        )
        outer = None if tables is None else NestedAbsmax(*tables)
        return Nf4Tensor(data, absmax, shape, block_size, codebook, nested=outer, dtype=kind)
    try:
        block_format = GgufBlockFormat.of(format, "format")
    except InvalidProblem as error:
        raise InvalidProblem(f"{error}, NF4, FP4") from None
    for name, asked in (("nested", nested), ("block_size", block_size != 64)):
        if asked:
            raise InvalidProblem(
                f"{name}: expected no such option for {block_format.name}, which has its own "
                f"blocks, got one; leave it out, or quantize to NF4 or FP4"
            )
    data, shape = _ops.pack(array, block_format, workers)
    return GgufTensor(data, block_format, shape)


def concatenate(weights: Iterable[_Weight]) -> _Weight:
    """Join weights along their first axis, for one product in place of several.

    Weights that multiply the same activations, such as those of queries, keys and values, are one
    weight with all their rows: each row's products keep their bits, and one launch takes less time
    than several.

    Parameters
    ----------
    weights : iterable of GgufTensor or of Nf4Tensor
        One or more of two dimensions or more, alike in all but the first: of one format, or one
        codebook, layout and block size, on one device. An `Nf4Tensor` that others follow ends with
        its blocks.

    Returns
    -------
    GgufTensor or Nf4Tensor
        Over bytes of its own, on the device of `weights`: NumPy arrays on the host, device memory
        on CUDA, where they are joined on the host. Nested absmax becomes float32, with the same
        values.

    Raises
    ------
    InvalidProblem
        No weights, or some that do not fit each other.

    Examples
    --------
    >>> import numpy as np
    >>> import baracuda_cy as bcy
    >>> gate, up = (bcy.quantize(np.eye(64, dtype=np.float32), "Q8_0") for _ in range(2))
    >>> both = bcy.concatenate([gate, up])
    >>> both
    GgufTensor(Q8_0, shape=(128, 64), 8704 bytes on cpu)
    >>> y_gate, y_up = np.split(bcy.linear(np.ones((1, 64), np.float32), both), 2, axis=-1)
    """
    if isinstance(weights, _WEIGHTS):
        raise InvalidProblem(f"weights: expected several, got {weights!r}; pass a list of them")
    try:
        joined = list(weights)
    except TypeError:
        given = type(weights).__name__
        raise InvalidProblem(
            f"weights: expected several, got {given}; pass a list of them"
        ) from None
    if not joined:
        raise InvalidProblem("weights: expected one or more, got none; pass a list of them")
    for i, w in enumerate(joined):
        check_packed(w, f"weights[{i}]")
    first = joined[0]
    if len(first.shape) < 2:
        raise InvalidProblem(
            f"weights[0]: expected two dimensions or more, got {first!r}; make a matrix of its row"
        )
    kind: str = first._kind()
    sizes: tuple[int, ...] = first.shape[1:]
    for i, w in enumerate(joined):
        if (type(w), w._kind(), w.shape[1:], w.device) != (type(first), kind, sizes, first.device):
            shape = ", ".join(map(str, ("any number", *sizes)))
            raise InvalidProblem(
                f"weights[{i}]: expected {kind}, shape ({shape}), on {first.device}, as "
                f"weights[0], got {w!r}; join what fits, and multiply by the others apart"
            )
    return first._join(joined, (sum(w.shape[0] for w in joined), *sizes))


def _codebook(format: Any) -> Codebook | None:
    if isinstance(format, Codebook):
        return format
    return Codebook.__members__.get(format.upper()) if isinstance(format, str) else None
