# SPDX-License-Identifier: Apache-2.0
"""What people type every day: products with packed weights, unpacking, packing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from baracuda_cy import gguf
from baracuda_cy.errors import InvalidProblem
from baracuda_cy.formats import GgufBlockFormat
from baracuda_cy.sku import PlanPreference
from baracuda_cy.tensor import GgufTensor

if TYPE_CHECKING:
    from baracuda_cy.stream import Stream

__all__ = ["dequantize", "linear", "quantize"]


def _check_packed(w: Any) -> None:
    if not isinstance(w, GgufTensor):
        raise InvalidProblem(
            f"w: expected a GgufTensor, got {type(w).__name__}; "
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
    w: GgufTensor,
    *,
    bias: Any = None,
    out: Any = None,
    stream: Stream | Any = None,
    preference: PlanPreference | None = None,
) -> Any:
    """Multiply activations by a packed weight: ``x @ dequantize(w).T + bias``.

    The activations are staged to int8 at every size of the batch, so that the bits of a token never
    depend on what else is in it. Output and scratch are the only memory it allocates, from the
    framework that `x` is from.

    Parameters
    ----------
    x : array
        Activations [..., K], float32, float16 or bfloat16, of any framework.
    w : GgufTensor
        Weight of N rows and K columns, on the device of `x`.
    bias : array, optional
        [N], of the output's dtype.
    out : array, optional
        [..., N], of the dtype of `x` or float32, to write to.
    stream : Stream or object with ``__cuda_stream__``, optional
        Where to run on CUDA. By default the current stream of the framework of `x`, else the legacy
        default stream.
    preference : PlanPreference, optional
        ``activations="float"`` multiplies the activations as they are; ``threads`` is for the CPU.

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
    _check_packed(w)
    _check_preference(preference)
    return gguf.multiply(x, w, bias, out, stream, preference)


def dequantize(
    w: GgufTensor,
    dtype: Any = None,
    out: Any = None,
    stream: Stream | Any = None,
    *,
    preference: PlanPreference | None = None,
) -> Any:
    """Unpack a weight to floats.

    Parameters
    ----------
    w : GgufTensor
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
    _check_packed(w)
    _check_preference(preference)
    return gguf.unpack(w, dtype, out, stream, preference)


def quantize(
    array: Any, format: GgufBlockFormat | str | int, *, threads: int | None = None
) -> GgufTensor:
    """Pack an array into a GGUF block format, on the CPU.

    Scales and minima are float16 in every format but Q8_K and MXFP4. Blocks of values so large that
    one of them would exceed 65504 (none does below that) come back as infinity or NaN from the
    formats that have ggml's bytes, as they do from ggml's, and cut off from the others; scale such
    weights down first.

    Parameters
    ----------
    array : array
        float32, float16 or bfloat16 on the host, [..., K]: K a multiple of the block size, rows
        contiguous.
    format : GgufBlockFormat or str
        What to pack into.
    threads : int, optional
        Threads to use; by default as `PlanPreference` has it. The bytes do not depend on it.

    Returns
    -------
    GgufTensor
        Of the shape of `array`, over a NumPy array.

    Raises
    ------
    InvalidProblem
        An array of another dtype, on a device, with NaN or infinity in it, or with columns that are
        no multiple of the block size.

    Examples
    --------
    >>> import numpy as np
    >>> import baracuda_cy as bcy
    >>> bcy.quantize(np.eye(32, dtype=np.float32), "Q4_0")
    GgufTensor(Q4_0, shape=(32, 32), 576 bytes on cpu)
    """
    block_format = GgufBlockFormat.of(format, "format")
    workers = PlanPreference(threads=threads).threads or 0
    data, shape = gguf.pack(array, block_format, workers)
    return GgufTensor(data, block_format, shape)
