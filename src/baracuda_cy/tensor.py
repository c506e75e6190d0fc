# SPDX-License-Identifier: Apache-2.0
"""Packed weights: bytes with a format and a shape."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Self

from baracuda_cy.arguments import as_flag, as_float32, as_index, as_integer, as_shape, choose
from baracuda_cy.errors import InvalidProblem
from baracuda_cy.formats import Codebook, ElementKind, GgufBlockFormat, Nf4Layout, nf4_sizes
from baracuda_cy.plan import inspect_codes, inspect_packed, inspect_scales

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from baracuda_cy.descriptors import PlanPreference
    from baracuda_cy.gguf import GgufMmvqMultiMPlan, GgufMmvqPlan
    from baracuda_cy.nf4 import Nf4MmvqMultiMPlan

__all__ = ["GgufTensor", "NestedAbsmax", "Nf4Tensor"]


class _Immutable:
    __slots__ = ()

    def _set(self, **values: Any) -> None:
        if hasattr(self, "device"):
            raise InvalidProblem(
                f"{type(self).__name__}: expected to be made once; make another one"
            )
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        kind = type(self).__name__
        article = "an" if kind.startswith("N") else "a"
        raise AttributeError(f"{name}: {article} {kind} is immutable; make another one")

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    # What cannot be changed needs no copy, wherever its arrays are.
    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __repr__(self) -> str:
        return self._text() if hasattr(self, "device") else f"{type(self).__name__}(empty)"

    def _text(self) -> str:
        raise NotImplementedError


class PackedWeight(_Immutable):
    """What packed weights share: `data` are their bytes."""

    __slots__ = ()

    data: Any
    device: str
    shape: tuple[int, ...]

    def __getitem__(self, index: Any) -> Self:
        """Return a part along the first axis, such as one of stacked experts, over the same bytes.

        Parameters
        ----------
        index : int or slice
            Which; negative numbers count from the end. Of a slice the step is 1.

        Returns
        -------
        GgufTensor or Nf4Tensor
            Of one dimension less for an integer. Its arrays are views, in libraries that have
            views: those of JAX are copies.

        Raises
        ------
        IndexError
            There is no such part.
        InvalidProblem
            Another index, a weight of a single row, or a part of an `Nf4Tensor` that does not begin
            and end with its blocks.

        Examples
        --------
        >>> import numpy as np
        >>> import baracuda_cy as bcy
        >>> experts = np.ones((8, 4, 32), np.float32)
        >>> bcy.quantize(experts, "Q8_0")[2]
        GgufTensor(Q8_0, shape=(4, 32), 136 bytes on cpu)
        >>> bcy.quantize(experts, "nf4")[2:4]
        Nf4Tensor(NF4, shape=(2, 4, 32), block_size=64, bitsandbytes layout, 144 bytes on cpu)
        """
        return self._part(*_part_of(index, self.shape))

    def _part(self, start: int, stop: int, shape: tuple[int, ...]) -> Self:
        raise NotImplementedError

    def _kind(self) -> str:
        """Return what weights that are joined have in common, their last sizes apart."""
        raise NotImplementedError

    def _join(self, weights: Sequence[Any], shape: tuple[int, ...]) -> Self:
        raise NotImplementedError

    def dequantize(
        self,
        dtype: Any = None,
        out: Any = None,
        stream: Any = None,
        *,
        preference: PlanPreference | None = None,
    ) -> Any:
        """Return the weight as floats: `baracuda_cy.dequantize` of it."""
        from baracuda_cy.ops import dequantize

        return dequantize(self, dtype, out, stream, preference=preference)  # type: ignore[arg-type]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Stand for a tensor in ``torch.nn.functional.linear``, and in nothing else."""
        import torch

        if function is not torch.nn.functional.linear:
            return NotImplemented
        from baracuda_cy.ops import linear

        def product(input: Any, weight: Any, bias: Any = None) -> Any:
            return linear(input, weight, bias)

        return product(*args, **(kwargs or {}))

    def __dlpack__(self, **arguments: Any) -> Any:
        """Export the packed bytes, so that several frameworks share them without a copy."""
        if not hasattr(self.data, "__dlpack__"):
            raise BufferError(
                f"data: expected an array with __dlpack__, got {type(self.data).__name__}; "
                f"make the {type(self).__name__} from one"
            )
        return self.data.__dlpack__(**arguments)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return the DLPack device type and number of the packed bytes."""
        if not hasattr(self.data, "__dlpack_device__"):
            return (1, 0) if self.device == "cpu" else (2, int(self.device.partition(":")[2]))
        return self.data.__dlpack_device__()  # type: ignore[no-any-return]


class GgufTensor(PackedWeight):
    """A weight packed in a GGUF block format, over bytes that stay where they are.

    ``w[3]`` and ``w[2:4]`` are parts along the first axis, over the same bytes. A copy is the
    weight itself; a pickle holds NumPy arrays, wherever the weight is.

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
        "_problem",
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
    # What a plan for this weight was selected for, as plain integers, which compare fast; the last
    # one is the byte that the matrix begins at.
    _problem: tuple[int, int, int, int]

    def __init__(self, data: Any, format: Any, shape: Any) -> None:
        block_format = GgufBlockFormat.of(format, "format")
        shape = _shape(shape)
        nrows, ncols = math.prod(shape[:-1]), shape[-1]
        nbytes = nrows * block_format.row_bytes(ncols)
        data = _as_array(data)
        self._set(
            data=data,
            format=block_format,
            shape=shape,
            nrows=nrows,
            ncols=ncols,
            nbytes=nbytes,
            device=inspect_packed(data, nbytes, block_format.alignment),
            _problem=(nrows, ncols, int(block_format), 0),
        )

    def _text(self) -> str:
        where = f"{self.nbytes} bytes on {self.device}"
        return f"GgufTensor({self.format.name}, shape={self.shape}, {where})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (host_bytes(self.data, self.nbytes), self.format, self.shape)

    def _part(self, start: int, stop: int, shape: tuple[int, ...]) -> GgufTensor:
        size = self.nbytes // (self.shape[0] or 1)
        data = _slice(self.data, ElementKind.U8, start * size, (stop - start) * size)
        return GgufTensor(data, self.format, shape)

    def _kind(self) -> str:
        return self.format.name

    def _join(self, weights: Sequence[GgufTensor], shape: tuple[int, ...]) -> GgufTensor:
        import numpy as np

        data = np.concatenate([host_bytes(w.data, w.nbytes) for w in weights])
        return GgufTensor(data, self.format, shape).to(self.device)

    def to(self, device: Any, stream: Any = None) -> GgufTensor:
        """Return the weight on `device`: itself where it is there already.

        Parameters
        ----------
        device : str, int, Stream or array
            ``"cpu"``, ``"cuda"``, ``"cuda:1"``, the 1 of that, or what belongs to a device.
        stream : Stream or object with ``__cuda_stream__``, optional
            Where to copy; None from the CPU to the CPU.

        Raises
        ------
        InvalidProblem
            There is no such device, or a stream on the CPU.
        Unsupported
            The machine or the build has no such device.
        OutOfMemory
            The device is full.
        """
        from baracuda_cy._ops import move

        data = move(self.data, self.nbytes, device, stream)
        return self if data is self.data else GgufTensor(data, self.format, self.shape)

    def plan(
        self,
        m: int = 1,
        activation: Any = "float32",
        output: Any = None,
        preference: PlanPreference | None = None,
        bias: bool = False,
    ) -> GgufMmvqMultiMPlan | GgufMmvqPlan:
        """Select the plan of a product with this weight, on the device that holds it.

        Parameters
        ----------
        m : int
            Number of activation vectors.
        activation : ElementKind or dtype
            Type of the activations.
        output : ElementKind or dtype, optional
            Type of the output: the activation's unless said.
        preference : PlanPreference, optional
            ``activations="float"`` asks for the float plan.
        bias : bool
            Whether the product adds a bias. Plans of GGUF weights take one in any call.

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
        from baracuda_cy.descriptors import GgufMmvqDescriptor, GgufMmvqMultiMDescriptor

        as_flag(bias, "bias")
        problem: dict[str, Any] = {
            "nrows": self.nrows,
            "ncols": self.ncols,
            "m": m,
            "block_format": self.format,
            "activation": activation,
            "output": activation if output is None else output,
        }
        # What is no PlanPreference is refused by select.
        if getattr(preference, "activations", None) == "float":
            return gguf.GgufMmvqPlan.select(self.device, GgufMmvqDescriptor(**problem), preference)
        return gguf.GgufMmvqMultiMPlan.select(
            self.device, GgufMmvqMultiMDescriptor(**problem), preference
        )


class NestedAbsmax(_Immutable):
    """How the absmax of an NF4 or FP4 weight is quantized itself, to 8 bits.

    Block i has ``absmax[i] = code[u8[i]] * self.absmax[i // block_size] + offset``, each step
    rounded to float32: bitsandbytes' double quantization, ``compress_statistics``.

    Parameters
    ----------
    code : array
        The 256 float32 values that the codes stand for.
    absmax : array
        Contiguous float32: the scale of every `block_size` codes.
    offset : float
        Added to all; rounded to float32. Infinity and NaN are values like others: the mean of
        absmax, where that holds one.
    block_size : int
        Codes that share a scale, a power of two.

    Attributes
    ----------
    code, absmax : array
    offset : float
    block_size : int
    count : int
        Scales.
    device : str
        ``"cpu"`` or, for example, ``"cuda:0"``.

    Raises
    ------
    InvalidProblem
        Arrays of another dtype, not contiguous or on two devices, another number of codes, a block
        size that is no power of two, or an offset of another type.

    Examples
    --------
    >>> import numpy as np
    >>> from baracuda_cy import NestedAbsmax
    >>> code = np.linspace(-1, 1, 256, dtype=np.float32)
    >>> NestedAbsmax(code, np.ones(3, np.float32), offset=0.5)
    NestedAbsmax(3 scales, offset=0.5, block_size=256, on cpu)
    """

    __slots__ = ("__weakref__", "absmax", "block_size", "code", "count", "device", "offset")

    code: Any
    absmax: Any
    offset: float
    block_size: int
    count: int
    device: str

    def __init__(self, code: Any, absmax: Any, offset: float, block_size: int = 256) -> None:
        block_size = as_integer(block_size, "block_size")
        if not 1 <= block_size < 2**31 or block_size & (block_size - 1):
            raise InvalidProblem(
                f"block_size: expected a power of two of codes, up to 2**30, got {block_size}; "
                "bitsandbytes uses 256"
            )
        offset = as_float32(offset, "offset")
        code, absmax = _as_array(code, typed=True), _as_array(absmax, typed=True)
        device, _ = inspect_scales(code, "code", ElementKind.F32, 256)
        there, count = inspect_scales(absmax, "absmax", ElementKind.F32)
        _check_device("absmax", there, device, "code")
        self._set(
            code=code,
            absmax=absmax,
            offset=offset,
            block_size=block_size,
            count=count,
            device=device,
        )

    def _text(self) -> str:
        what = f"offset={self.offset!r}, block_size={self.block_size}"
        return f"NestedAbsmax({self.count} scales, {what}, on {self.device})"

    def __reduce__(self) -> tuple[Any, ...]:
        code, absmax = (host_bytes(it).view("float32") for it in (self.code, self.absmax))
        return type(self), (code, absmax, self.offset, self.block_size)

    def to(self, device: Any, stream: Any = None) -> NestedAbsmax:
        """Return the tables on `device`: itself where they are there already.

        Parameters
        ----------
        device : str, int, Stream or array
            ``"cpu"``, ``"cuda"``, ``"cuda:1"``, the 1 of that, or what belongs to a device.
        stream : Stream or object with ``__cuda_stream__``, optional
            Where to copy; None from the CPU to the CPU.

        Raises
        ------
        InvalidProblem
            There is no such device, or a stream on the CPU.
        Unsupported
            The machine or the build has no such device.
        OutOfMemory
            The device is full.
        """
        code = _move(self.code, 256, ElementKind.F32, device, stream)
        absmax = _move(self.absmax, self.count, ElementKind.F32, device, stream)
        if code is self.code and absmax is self.absmax:
            return self
        return NestedAbsmax(code, absmax, self.offset, self.block_size)


class Nf4Tensor(PackedWeight):
    """A weight in NF4 or FP4, over bytes that stay where they are.

    ``w[3]`` and ``w[2:4]`` are parts along the first axis, over the same bytes, where blocks end
    with them. A copy is the weight itself; a pickle holds NumPy arrays, wherever the weight is.

    ``weight[n, k] = codebook[code(n, k)] * absmax[(n * ncols + k) // block_size]``: blocks are of
    the matrix as one row and run across the ends of its rows.

    Parameters
    ----------
    data : array or buffer
        The codes, two in a byte: a contiguous array of any framework and rank, on the host or on
        CUDA, or an object with the buffer protocol. uint8, or the bytes as float32, float16 or
        bfloat16 (bitsandbytes' ``quant_storage``). Exactly ``ceil(nrows * ncols / 2)`` bytes;
        nothing is copied.
    absmax : array
        The scale of each block, contiguous, exactly ``ceil(nrows * ncols / block_size)`` of them:
        float32; uint8 codes where `nested` is given. On the device of `data`.
    shape : tuple of int
        Shape of the weight in elements: (nrows, ncols). Leading dimensions count as rows.
    block_size : int
        Elements that share a scale.
    codebook : Codebook or str
        ``"nf4"`` or ``"fp4"``.
    layout : Nf4Layout or str
        ``"bitsandbytes"``, with block sizes that are powers of two from 32 to 4096, or
        ``"row_pair"``, with an even number of rows and blocks that divide them.
    nested : NestedAbsmax, optional
        How `absmax` is quantized itself, on the device of `data`.
    dtype : ElementKind or dtype, optional
        Type that the weight had before it was packed, where that is known: float16, bfloat16 or
        float32. `quantize` and `open_bitsandbytes` say it, and `save_bitsandbytes` writes it.

    Attributes
    ----------
    data, absmax : array
    nested : NestedAbsmax or None
    shape : tuple of int
    nrows, ncols : int
        The weight as a matrix.
    block_size : int
    codebook : Codebook
    layout : Nf4Layout
    dtype : ElementKind or None
    nbytes : int
        Bytes of the codes, of `absmax` and of the nested tables.
    device : str
        ``"cpu"`` or, for example, ``"cuda:0"``.

    Raises
    ------
    InvalidProblem
        Arrays of another dtype or length, not contiguous, misaligned or on two devices; sizes that
        the layout cannot express; a type that is no float.

    Examples
    --------
    >>> import numpy as np
    >>> from baracuda_cy import Nf4Tensor
    >>> Nf4Tensor(np.zeros(96, np.uint8), np.ones(3, np.float32), shape=(2, 96))
    Nf4Tensor(NF4, shape=(2, 96), block_size=64, bitsandbytes layout, 108 bytes on cpu)
    """

    __slots__ = (
        "__weakref__",
        "_problem",
        "absmax",
        "block_size",
        "codebook",
        "data",
        "device",
        "dtype",
        "layout",
        "nbytes",
        "ncols",
        "nested",
        "nrows",
        "shape",
    )

    absmax: Any
    nested: NestedAbsmax | None
    shape: tuple[int, ...]
    nrows: int
    ncols: int
    block_size: int
    codebook: Codebook
    layout: Nf4Layout
    dtype: ElementKind | None
    nbytes: int
    # What a plan for this weight was selected for, as plain integers, which compare and hash fast.
    _problem: tuple[int, int, int, int, int, bool]

    def __init__(
        self,
        data: Any,
        absmax: Any,
        shape: Any,
        block_size: int = 64,
        codebook: Codebook | str | int = Codebook.NF4,
        layout: Nf4Layout | str | int = Nf4Layout.BITSANDBYTES,
        nested: NestedAbsmax | None = None,
        dtype: Any = None,
    ) -> None:
        shape = _shape(shape)
        nrows, ncols = math.prod(shape[:-1]), shape[-1]
        block_size = as_integer(block_size, "block_size")
        codebook = choose(Codebook, codebook, "codebook")
        layout = choose(Nf4Layout, layout, "layout")
        nbytes, blocks = nf4_sizes(nrows, ncols, block_size, layout)
        if nested is not None and not isinstance(nested, NestedAbsmax):
            raise InvalidProblem(
                f"nested: expected a NestedAbsmax or None, got {type(nested).__name__}; "
                "make one: NestedAbsmax(code, absmax, offset)"
            )
        if dtype is not None:
            dtype = ElementKind.of(dtype, "dtype")
            if dtype not in _FLOATS:
                raise InvalidProblem(
                    f"dtype: expected {', '.join(it.dtype for it in _FLOATS)} or None, "
                    f"got {dtype.dtype}; choose one of them"
                )
        data, absmax = _as_array(data), _as_array(absmax, typed=True)
        device = inspect_codes(data, nbytes)
        kind = ElementKind.F32 if nested is None else ElementKind.U8
        there, _ = inspect_scales(absmax, "absmax", kind, blocks)
        _check_device("absmax", there, device, "data")
        nbytes += blocks * kind.itemsize
        if nested is not None:
            _check_device("nested", nested.device, device, "data")
            scales = -(-blocks // nested.block_size)
            if nested.count != scales:
                raise InvalidProblem(
                    f"nested: expected {scales} scales for {blocks} blocks, "
                    f"{nested.block_size} to a scale, got {nested!r}; "
                    "pass the tables that belong to absmax"
                )
            nbytes += 4 * (256 + scales)
        self._set(
            data=data,
            absmax=absmax,
            nested=nested,
            shape=shape,
            nrows=nrows,
            ncols=ncols,
            block_size=block_size,
            codebook=codebook,
            layout=layout,
            dtype=dtype,
            nbytes=nbytes,
            device=device,
            _problem=(nrows, ncols, block_size, int(codebook), int(layout), nested is not None),
        )

    def _text(self) -> str:
        nested = ", nested absmax" if self.nested is not None else ""
        return (
            f"Nf4Tensor({self.codebook.name}, shape={self.shape}, block_size={self.block_size}, "
            f"{self.layout.name.lower()} layout{nested}, {self.nbytes} bytes on {self.device})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        data, absmax = host_bytes(self.data), host_bytes(self.absmax)
        if self.nested is None:
            absmax = absmax.view("float32")
        how = (self.shape, self.block_size, self.codebook, self.layout, self.nested, self.dtype)
        return type(self), (data, absmax, *how)

    def _part(self, start: int, stop: int, shape: tuple[int, ...]) -> Nf4Tensor:
        from baracuda_cy.dlpack import inspect

        size, nested = math.prod(self.shape[1:]), self.nested
        first, last = (start * size, stop * size) if start < stop else (0, 0)
        unit = self.block_size * (nested.block_size if nested else 1)
        if self.layout is Nf4Layout.ROW_PAIR:
            unit = math.lcm(unit, 2 * self.ncols or 1)
        # Where codes are stored as floats, a part begins and ends with one of those.
        kind = inspect(self.data)["element"] or ElementKind.U8
        unit = math.lcm(unit, 2 * kind.itemsize)
        if first % unit or (last % unit and last != self.nrows * self.ncols):
            raise InvalidProblem(
                f"index: expected a part that begins and ends with its blocks, at multiples of "
                f"{unit} elements, got elements {first} to {last} of {self!r}; "
                "take a part that does, or unnest() the weight where it is nested"
            )

        def part(array: Any, kind: ElementKind, elements: int) -> Any:
            begin, end = first // elements, -(-last // elements)
            return _slice(array, kind, begin, end - begin)

        blocks = self.block_size
        scales = ElementKind.F32 if nested is None else ElementKind.U8
        if nested is not None:
            outer = part(nested.absmax, ElementKind.F32, blocks * nested.block_size)
            nested = NestedAbsmax(nested.code, outer, nested.offset, nested.block_size)
        data, absmax = part(self.data, kind, 2 * kind.itemsize), part(self.absmax, scales, blocks)
        return self._like(data, absmax, nested, shape=shape)

    def _kind(self) -> str:
        layout = self.layout.name.lower()
        return f"{self.codebook.name}, block_size={self.block_size}, {layout} layout"

    def _join(self, weights: Sequence[Nf4Tensor], shape: tuple[int, ...]) -> Nf4Tensor:
        import numpy as np

        for i, w in enumerate(weights[:-1]):
            if w.nrows * w.ncols % self.block_size:
                raise InvalidProblem(
                    f"weights[{i}]: expected a weight that ends with its blocks, of which the next "
                    f"one has others, got {w!r}; give all smaller ones with to_layout(..., "
                    "block_size=), or put it last"
                )
        data = np.concatenate([host_bytes(w.data) for w in weights])
        absmax = np.concatenate([w._host_absmax() for w in weights])
        dtype = self.dtype if all(w.dtype is self.dtype for w in weights) else None
        return self._like(data, absmax, None, shape=shape, dtype=dtype).to(self.device)

    def _like(
        self, data: Any, absmax: Any, nested: NestedAbsmax | None, **changed: Any
    ) -> Nf4Tensor:
        how: dict[str, Any] = {
            "shape": self.shape,
            "block_size": self.block_size,
            "codebook": self.codebook,
            "layout": self.layout,
            "dtype": self.dtype,
        }
        return Nf4Tensor(data, absmax, nested=nested, **{**how, **changed})

    def to(self, device: Any, stream: Any = None) -> Nf4Tensor:
        """Return the weight on `device`: itself where it is there already.

        Parameters
        ----------
        device : str, int, Stream or array
            ``"cpu"``, ``"cuda"``, ``"cuda:1"``, the 1 of that, or what belongs to a device.
        stream : Stream or object with ``__cuda_stream__``, optional
            Where to copy; None from the CPU to the CPU.

        Raises
        ------
        InvalidProblem
            There is no such device, or a stream on the CPU.
        Unsupported
            The machine or the build has no such device.
        OutOfMemory
            The device is full.
        """
        codes, blocks = nf4_sizes(self.nrows, self.ncols, self.block_size, self.layout)
        kind = ElementKind.F32 if self.nested is None else ElementKind.U8
        data = _move(self.data, codes, ElementKind.U8, device, stream)
        absmax = _move(self.absmax, blocks, kind, device, stream)
        nested = None if self.nested is None else self.nested.to(device, stream)
        if data is self.data and absmax is self.absmax and nested is self.nested:
            return self
        return self._like(data, absmax, nested)

    def plan(
        self,
        m: int = 1,
        activation: Any = "float32",
        output: Any = None,
        preference: PlanPreference | None = None,
        bias: bool = False,
    ) -> Nf4MmvqMultiMPlan:
        """Select the plan of a product with this weight, on the device that holds it.

        Parameters
        ----------
        m : int
            Number of activation vectors.
        activation : ElementKind or dtype
            Type of the activations.
        output : ElementKind or dtype, optional
            Type of the output: the activation's unless said.
        preference : PlanPreference, optional
            Wishes.
        bias : bool
            Whether the product adds a bias.

        Returns
        -------
        Nf4MmvqMultiMPlan

        Raises
        ------
        InvalidProblem
            A negative `m`, or a type that is no float32, float16 or bfloat16.

        Examples
        --------
        >>> import numpy as np
        >>> import baracuda_cy as bcy
        >>> w = bcy.quantize(np.eye(64, dtype=np.float32), "nf4")
        >>> w.plan(m=8).sku.layout
        'bitsandbytes'
        """
        from baracuda_cy.descriptors import Nf4Descriptor, Nf4MmvqMultiMDescriptor
        from baracuda_cy.nf4 import Nf4MmvqMultiMPlan

        base = Nf4Descriptor(
            n=self.nrows,
            k=self.ncols,
            block_size=self.block_size,
            codebook=self.codebook,
            layout=self.layout,
            nested=self.nested is not None,
            bias=bias,
            activation=activation,
            output=output,
        )
        descriptor = Nf4MmvqMultiMDescriptor(base=base, m=m)
        return Nf4MmvqMultiMPlan.select(self.device, descriptor, preference)

    def unnest(self) -> Nf4Tensor:
        """Return the weight with float32 absmax: itself where that is so already.

        The values are the same to the bit. A weight on CUDA is converted on the host.

        Returns
        -------
        Nf4Tensor
        """
        if self.nested is None:
            return self
        absmax = self._host_absmax()
        absmax = _move(absmax, absmax.size, ElementKind.F32, self.device, None)
        return self._like(self.data, absmax, None)

    def to_layout(
        self,
        layout: Nf4Layout | str | int,
        nrows: int | None = None,
        block_size: int | None = None,
    ) -> Nf4Tensor:
        """Return the same values in another layout or other blocks, on the same device.

        Codes and scales are only rearranged: every value keeps its bits. Blocks that run across the
        ends of rows become smaller in the row-pair layout: the greatest common divisor of the
        columns and the block size. Nested absmax stays nested where the blocks stay, and becomes
        float32 where they do not. A weight on CUDA is converted on the host.

        Parameters
        ----------
        layout : Nf4Layout or str
            ``"bitsandbytes"`` or ``"row_pair"``. The row-pair layout has an even number of rows:
            where that is odd, a row of zeros is added.
        nrows : int, optional
            Rows to keep, counted from the first: takes an added row off again. By default all.
        block_size : int, optional
            Elements that share a scale. By default as they do now, or the greatest common divisor
            above.

        Returns
        -------
        Nf4Tensor
            Over uint8 codes; itself where nothing changes.

        Raises
        ------
        InvalidProblem
            A block size that the layout cannot express, or in which one block would need several
            scales.

        Examples
        --------
        >>> import numpy as np
        >>> import baracuda_cy as bcy
        >>> w = bcy.quantize(np.ones((3, 96), np.float32), "nf4", block_size=64)
        >>> pairs = w.to_layout("row_pair")
        >>> pairs
        Nf4Tensor(NF4, shape=(4, 96), block_size=32, row_pair layout, 240 bytes on cpu)
        >>> pairs.to_layout("bitsandbytes", nrows=3, block_size=64).nbytes == w.nbytes
        True
        """
        import numpy as np

        layout = choose(Nf4Layout, layout, "layout")
        kept = self.nrows if nrows is None else as_integer(nrows, "nrows")
        if not 0 <= kept <= self.nrows:
            raise InvalidProblem(
                f"nrows: expected 0 to {self.nrows} (the rows there are), got {kept}; "
                "leave it out to keep all"
            )
        if block_size is None:
            block_size = self.block_size
            if layout is Nf4Layout.ROW_PAIR:
                block_size = math.gcd(self.ncols, block_size)
        block_size = as_integer(block_size, "block_size")
        rows = kept + (kept % 2 if layout is Nf4Layout.ROW_PAIR else 0)
        if (layout, rows, block_size) == (self.layout, self.nrows, self.block_size):
            return self
        nf4_sizes(rows, self.ncols, block_size, layout)
        codes = np.full((rows, self.ncols), _CODE_OF_ZERO[self.codebook], np.uint8)
        codes[:kept] = self._host_codes()[:kept]
        # Blocks of rows that are cut off are the last ones; added rows follow the kept ones.
        blocks = -(-kept * self.ncols // self.block_size)
        nested = self.nested
        if block_size == self.block_size and rows == kept:
            kind = np.float32 if nested is None else np.uint8
            absmax = _fetch(self.absmax, kind)[:blocks]
            if nested is not None:
                nested = nested.to("cpu")
                scales = _fetch(nested.absmax, np.float32)[: -(-blocks // nested.block_size)]
                nested = NestedAbsmax(nested.code, scales, nested.offset, nested.block_size)
        else:
            absmax = self._host_absmax()[:blocks]
            absmax = _reblocked(absmax, self.block_size, block_size, kept * self.ncols)
            added = (rows - kept) * self.ncols // block_size
            absmax = np.concatenate([absmax, np.zeros(added, np.float32)])
            nested = None
        return self._like(
            _packed(codes, layout, self.codebook),
            absmax,
            nested,
            shape=self.shape if rows == self.nrows else (rows, self.ncols),
            block_size=block_size,
            layout=layout,
        ).to(self.device)

    def _host_codes(self) -> NDArray[Any]:
        """Return the codes, one a byte, as [nrows, ncols] on the host."""
        import numpy as np

        data = _fetch(self.data, np.uint8)
        if self.layout is Nf4Layout.ROW_PAIR:
            pairs = data.reshape(self.nrows // 2, self.ncols)
            return np.stack([pairs & 15, pairs >> 4], axis=1).reshape(self.nrows, self.ncols)
        flat = np.stack([data >> 4, data & 15], axis=1).reshape(-1)
        return flat[: self.nrows * self.ncols].reshape(self.nrows, self.ncols)

    def _host_absmax(self) -> NDArray[Any]:
        """Return the absmax of the blocks as float32 on the host."""
        import numpy as np

        if self.nested is None:
            return _fetch(self.absmax, np.float32)
        codes = _fetch(self.absmax, np.uint8)
        scales = _fetch(self.nested.absmax, np.float32)
        scales = scales[np.arange(codes.size) // self.nested.block_size]
        with np.errstate(all="ignore"):
            scaled = _fetch(self.nested.code, np.float32)[codes] * scales
            absmax: NDArray[np.float32] = scaled + np.float32(self.nested.offset)
        return absmax


# What a weight may have been before it was packed.
_FLOATS = (ElementKind.F16, ElementKind.BF16, ElementKind.F32)

# The code of 0, which fills what a layout has room for beyond the weight.
_CODE_OF_ZERO = {Codebook.NF4: 7, Codebook.FP4: 0}


def _packed(codes: NDArray[Any], layout: Nf4Layout, codebook: Codebook) -> NDArray[Any]:
    """Put codes [rows, columns], one a byte, two in a byte."""
    import numpy as np

    if layout is Nf4Layout.ROW_PAIR:
        low, high = codes[0::2], codes[1::2]
    else:
        flat = codes.reshape(-1)
        if flat.size % 2:
            flat = np.append(flat, np.uint8(_CODE_OF_ZERO[codebook]))
        high, low = flat[0::2], flat[1::2]
    data: NDArray[Any] = low | high << 4
    return data.reshape(-1)


def _reblocked(absmax: NDArray[Any], old: int, new: int, count: int) -> NDArray[Any]:
    """Scales for blocks of `new` of `count` elements that have them for blocks of `old`."""
    import numpy as np

    step = math.gcd(old, new)
    fine = np.repeat(absmax, old // step)[: -(-count // step)]
    fine = np.pad(fine, (0, -fine.size % (new // step)), mode="edge" if fine.size else "constant")
    blocks = fine.view(np.uint32).reshape(-1, new // step)
    if (blocks != blocks[:, :1]).any():
        raise InvalidProblem(
            f"block_size: expected blocks of one scale each, got {new} where they have several "
            f"(blocks of {old} now); use a divisor of {old}"
        )
    return np.ascontiguousarray(blocks[:, 0]).view(np.float32)


def _shape(shape: Any) -> tuple[int, ...]:
    sizes = as_shape(shape, ElementKind.F32.itemsize)
    if not sizes:
        raise InvalidProblem("shape: expected one or more sizes, got (); pass (nrows, ncols)")
    if len(sizes) > 8:
        raise InvalidProblem(f"shape: expected at most 8 dimensions, got {len(sizes)}; merge some")
    return sizes


def _part_of(index: Any, shape: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
    """Return what an index of the first axis takes, from where to where, and its shape."""
    size, *others = shape
    if not others:
        raise InvalidProblem(
            f"index: expected a weight of two dimensions or more, got one of shape {shape}; "
            "dequantize a row to take it apart"
        )
    if isinstance(index, slice):
        bounds = (index.start, index.stop)
        if any(it is not None and as_index(it) is None for it in bounds):
            raise InvalidProblem(f"index: expected a slice of integers, got {index!r}; round them")
        if index.step not in (None, 1):
            raise InvalidProblem(
                f"index: expected a slice of step 1, got {index!r}; take one part after the other"
            )
        start, stop, _ = index.indices(size)
        stop = max(start, stop)
        return start, stop, (stop - start, *others)
    number = as_index(index)
    if number is None:
        raise InvalidProblem(
            f"index: expected an integer or a slice, got {index!r}; only the first axis is indexed"
        )
    if not -size <= number < size:
        known = f"{-size} to {size - 1}" if size else "none, as there are none"
        raise IndexError(f"index: expected {known}, got {number}")
    number %= size
    return number, number + 1, tuple(others)


def _slice(array: Any, kind: ElementKind, start: int, count: int) -> Any:
    """Return elements of a contiguous array: a view, in libraries that have views."""
    from baracuda_cy.memory import DeviceArray, DeviceBuffer

    start_byte = start * kind.itemsize
    if isinstance(array, DeviceBuffer):
        return DeviceArray((count,), kind, array, offset=start_byte)
    if isinstance(array, DeviceArray):
        offset = array.ptr - array.buffer.ptr + start_byte
        return DeviceArray((count,), kind, array.buffer, offset=offset)
    if not hasattr(array, "reshape"):
        import numpy as np

        try:
            array = np.from_dlpack(array)
        except (AttributeError, TypeError, ValueError, RuntimeError, BufferError) as error:
            raise InvalidProblem(
                f"data: expected an array that can be sliced, got {type(array).__name__}; "
                "make the weight of a framework's array over it"
            ) from error
    return array.reshape(-1)[start : start + count]


def _check_device(name: str, device: str, expected: str, other: str) -> None:
    if device != expected:
        raise InvalidProblem(
            f"{name}: expected an array on {expected}, where {other} is, got one on {device}; "
            "move it there"
        )


def host_bytes(array: Any, nbytes: int | None = None) -> NDArray[Any]:
    """Return the first bytes, or all, wherever they are: a view of what NumPy has already."""
    import numpy as np

    from baracuda_cy._ops import fetch

    host = np.asarray(array).reshape(-1) if isinstance(array, np.ndarray) else fetch(array)
    return host.view(np.uint8)[:nbytes]


def _fetch(array: Any, dtype: Any) -> NDArray[Any]:
    """Return the bytes of `array`, wherever it is, as a NumPy array of `dtype`."""
    from baracuda_cy._ops import fetch

    return fetch(array).view(dtype)


def _move(array: Any, count: int, kind: ElementKind, device: Any, stream: Any) -> Any:
    """Return `count` elements on `device`: `array` itself where it is there already."""
    import numpy as np

    from baracuda_cy._ops import move
    from baracuda_cy.memory import DeviceArray

    moved = move(array, None, device, stream)
    if moved is array or kind is ElementKind.U8:
        return moved
    if isinstance(moved, np.ndarray):
        return moved.view(kind.dtype)
    return DeviceArray((count,), kind, moved)


def _as_array(data: Any, typed: bool = False) -> Any:
    """Return a buffer (``bytes``, ``mmap``) as an array: of its bytes, or of the type it has."""
    if hasattr(data, "__dlpack__") or hasattr(data, "__cuda_array_interface__"):
        return data
    import numpy as np

    try:
        return np.asarray(memoryview(data)) if typed else np.frombuffer(data, np.uint8)
    except (TypeError, ValueError, BufferError):
        return data  # no buffer: the inspection says what was expected
