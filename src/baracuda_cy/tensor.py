# SPDX-License-Identifier: Apache-2.0
"""Packed weights: bytes with a format and a shape."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

from baracuda_cy.errors import InvalidProblem, Unsupported
from baracuda_cy.formats import GgufBlockFormat
from baracuda_cy.plan import inspect_packed

if TYPE_CHECKING:
    from baracuda_cy.gguf import GgufMmvqMultiMPlan, GgufMmvqPlan
    from baracuda_cy.sku import PlanPreference

__all__ = ["GgufTensor"]


class GgufTensor:
    """A weight packed in a GGUF block format, over bytes that stay where they are.

    Parameters
    ----------
    data : array or buffer
        The packed blocks, row after row: a contiguous uint8 array of any framework, on the host or
        on CUDA, or an object with the buffer protocol (``bytes``, ``mmap``, ``memoryview``).
        Nothing is copied. It may be longer than needed.
    format : GgufBlockFormat or str
        How the blocks are packed.
    shape : tuple of int
        Shape of the weight in elements, rows last: (nrows, ncols) for a matrix, (ncols,) for a
        single row. Leading dimensions, as of stacked experts, count as rows.

    Attributes
    ----------
    data : array
        The packed bytes.
    format : GgufBlockFormat
    shape : tuple of int
    nrows, ncols : int
        The weight as a matrix.
    nbytes : int
        Bytes of the packed blocks.
    device : str
        ``"cpu"`` or, for example, ``"cuda:0"``.

    Raises
    ------
    InvalidProblem
        Bytes of another dtype, too few, misaligned or not contiguous; columns that are no multiple
        of the block size.
    Unsupported
        A GGUF type that is none of the supported block formats.

    Examples
    --------
    >>> import numpy as np
    >>> from baracuda_cy import GgufTensor
    >>> GgufTensor(np.zeros(2 * 144, np.uint8), "Q4_K", shape=(2, 256))
    GgufTensor(Q4_K, shape=(2, 256), 288 bytes on cpu)
    """

    __slots__ = (
        "__weakref__",
        "data",
        "device",
        "format",
        "nbytes",
        "ncols",
        "nrows",
        "shape",
    )

    data: Any
    format: GgufBlockFormat
    shape: tuple[int, ...]
    nrows: int
    ncols: int
    nbytes: int
    device: str

    def __init__(self, data: Any, format: Any, shape: Any) -> None:
        block_format = GgufBlockFormat.of(format, "format")
        shape = _shape(shape)
        nrows, ncols = math.prod(shape[:-1]), shape[-1]
        nbytes = nrows * block_format.row_bytes(ncols)
        if nbytes > 2**63 - 1:
            raise InvalidProblem(
                f"shape: expected a weight whose bytes an int64 counts, got {shape}; split it"
            )
        if not hasattr(data, "__dlpack__") and not hasattr(data, "__cuda_array_interface__"):
            data = _buffer_as_array(data)
        values = {
            "data": data,
            "format": block_format,
            "shape": shape,
            "nrows": nrows,
            "ncols": ncols,
            "nbytes": nbytes,
            "device": inspect_packed(data, nbytes, block_format.alignment),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name}: a GgufTensor is immutable; make another one")

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    def __repr__(self) -> str:
        where = f"{self.nbytes} bytes on {self.device}"
        return f"GgufTensor({self.format.name}, shape={self.shape}, {where})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.to("cpu").data, self.format, self.shape)

    def to(self, device: Any, stream: Any = None) -> GgufTensor:
        """Return the weight on `device`: itself where it is there already.

        Parameters
        ----------
        device : str, Stream or array
            ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or what belongs to a device.
        stream : Stream or object with ``__cuda_stream__``, optional
            Where to copy.

        Raises
        ------
        Unsupported
            The machine or the build has no such device.
        OutOfMemory
            The device is full.
        """
        from baracuda_cy.gguf import move

        data = move(self.data, self.nbytes, device, stream)
        return self if data is self.data else GgufTensor(data, self.format, self.shape)

    def plan(
        self,
        m: int = 1,
        activation: Any = "float32",
        output: Any = None,
        preference: PlanPreference | None = None,
    ) -> GgufMmvqMultiMPlan | GgufMmvqPlan:
        """Select the plan of a product with this weight, on the device that holds it.

        Parameters
        ----------
        m : int
            Number of activation vectors.
        activation : ElementKind or dtype
            Type of the activations.
        output : ElementKind or dtype, optional
            Type of the output: float32 for the staged plan, the activation's for the float plan
            unless said.
        preference : PlanPreference, optional
            ``activations="float"`` asks for the float plan.

        Returns
        -------
        GgufMmvqMultiMPlan or GgufMmvqPlan

        Raises
        ------
        InvalidProblem
            A negative `m`, or a type that is no float32, float16 or bfloat16.

        Examples
        --------
        >>> import numpy as np
        >>> from baracuda_cy import GgufTensor
        >>> w = GgufTensor(np.zeros(2 * 144, np.uint8), "Q4_K", shape=(2, 256))
        >>> w.plan(m=8).sku.activations
        'staged'
        """
        from baracuda_cy import gguf
        from baracuda_cy.sku import GgufMmvqDescriptor, GgufMmvqMultiMDescriptor

        problem: dict[str, Any] = {
            "nrows": self.nrows,
            "ncols": self.ncols,
            "m": m,
            "block_format": self.format,
            "activation": activation,
        }
        if output is not None:
            problem["output"] = output
        # What is no PlanPreference is refused by select.
        if getattr(preference, "activations", None) == "float":
            return gguf.GgufMmvqPlan.select(self.device, GgufMmvqDescriptor(**problem), preference)
        return gguf.GgufMmvqMultiMPlan.select(
            self.device, GgufMmvqMultiMDescriptor(**problem), preference
        )

    def dequantize(self, dtype: Any = "float32") -> Any:
        """Return the weight as floats: `baracuda_cy.dequantize` of it."""
        from baracuda_cy.ops import dequantize

        return dequantize(self, dtype)

    def __dlpack__(self, **arguments: Any) -> Any:
        """Export the packed bytes, so that several frameworks share them without a copy."""
        if not hasattr(self.data, "__dlpack__"):
            raise BufferError(
                f"data: expected an array with __dlpack__, got {type(self.data).__name__}; "
                "make the GgufTensor from one"
            )
        return self.data.__dlpack__(**arguments)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return the DLPack device type and number of the packed bytes."""
        if not hasattr(self.data, "__dlpack_device__"):
            return (1, 0) if self.device == "cpu" else (2, int(self.device.partition(":")[2]))
        return self.data.__dlpack_device__()  # type: ignore[no-any-return]


def _shape(shape: Any) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise InvalidProblem(
            f"shape: expected a tuple of integers, got {shape!r}; pass (nrows, ncols)"
        ) from None
    if not sizes or min(sizes) < 0 or max(sizes) > 2**63 - 1:
        raise InvalidProblem(
            f"shape: expected one or more sizes from 0 to 2**63 - 1, got {sizes}; "
            "pass (nrows, ncols)"
        )
    if len(sizes) > 8:
        raise Unsupported(f"shape: expected at most 8 dimensions, got {len(sizes)}; merge some")
    return sizes


def _buffer_as_array(data: Any) -> Any:
    import numpy as np

    try:
        return np.frombuffer(data, np.uint8)
    except (TypeError, ValueError, BufferError):
        return data  # no buffer: inspect_packed says what was expected
