# SPDX-License-Identifier: Apache-2.0
"""GGUF files, memory-mapped.

The header is read here rather than by the ``gguf`` package, whose reader loops over lengths that a
corrupt file claims, cannot say which tensor is cut off, and does not open a file that holds one
tensor of a type it does not know.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, Self

from baracuda_cy.errors import FileFormatError, Unsupported
from baracuda_cy.formats import OTHER_GGUF_TYPES, GgufBlockFormat
from baracuda_cy.tensor import GgufTensor

__all__ = ["GgufFile", "open_gguf"]

# GGUF type id: name, NumPy dtype
_PLAIN_TYPES = {
    0: ("F32", "<f4"),
    1: ("F16", "<f2"),
    24: ("I8", "<i1"),
    25: ("I16", "<i2"),
    26: ("I32", "<i4"),
    27: ("I64", "<i8"),
    28: ("F64", "<f8"),
    30: ("BF16", "<u2"),  # the width; viewed as bfloat16
}
# metadata type id: struct code
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_DEEPEST_ARRAY = 4
_MOST_DIMENSIONS = 8


class _Entry(NamedTuple):
    type_id: int
    type_name: str
    shape: tuple[int, ...]
    start: int
    nbytes: int  # 0 for a type whose size is not known here


class _Header:
    """A cursor that never leaves the file."""

    def __init__(self, data: mmap.mmap, path: str) -> None:
        self.data, self.path, self.at = data, path, 0
        self.reading = "the header"

    def error(self, problem: str) -> FileFormatError:
        return FileFormatError(f"{self.path}: {self.reading}: {problem}")

    def take(self, size: int) -> int:
        """Step over `size` bytes; return where they start."""
        start = self.at
        if size > len(self.data) - start:
            raise self.error(
                f"expected {size} bytes at byte {start} of a file of {len(self.data)}; "
                "it is truncated or corrupt, fetch it again"
            )
        self.at += size
        return start

    def scalar(self, code: str) -> Any:
        layout = "<" + code
        return struct.unpack_from(layout, self.data, self.take(struct.calcsize(layout)))[0]

    def text(self, errors: str = "strict") -> str:
        size = self.scalar("Q")
        start = self.take(size)
        try:
            return self.data[start : start + size].decode("utf-8", errors)
        except UnicodeDecodeError:
            raise self.error("expected a name in UTF-8; the file is corrupt") from None

    def value(self, type_id: int, depth: int = 0) -> Any:
        if type_id in _SCALARS:
            return self.scalar(_SCALARS[type_id])
        if type_id == _STRING:
            return self.text("replace")
        if type_id != _ARRAY or depth == _DEEPEST_ARRAY:
            raise self.error(f"expected a metadata type, got {type_id}; the file is corrupt")
        item, count = self.scalar("I"), self.scalar("Q")
        if item in _SCALARS:
            size = struct.calcsize("<" + _SCALARS[item])
            start = self.take(count * size)
            return list(struct.unpack_from(f"<{count}{_SCALARS[item]}", self.data, start))
        values = []
        for _ in range(min(count, len(self.data))):
            values.append(self.value(item, depth + 1))  # noqa: PERF401, a comprehension hides the bound
        return values


class GgufFile(Mapping[str, Any]):
    """The tensors of a GGUF file by name, memory-mapped; made by `open_gguf`.

    A tensor in a supported block format is a `GgufTensor`; float and integer tensors are read-only
    NumPy arrays. Nothing is read before it is used. Tensors stay valid after `close`.

    Attributes
    ----------
    path : str
        The file.
    metadata : Mapping
        Its key-value pairs.
    types : Mapping
        GGUF type names of the tensors, such as ``"Q4_K"``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise FileFormatError(f"{self.path}: expected a GGUF file, got an empty one")
            self._data: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        metadata, self._entries = _read_header(_Header(self._data, self.path))
        self.metadata = MappingProxyType(metadata)

    @property
    def types(self) -> Mapping[str, str]:
        return {name: entry.type_name for name, entry in self._entries.items()}

    def __getitem__(self, name: str) -> Any:
        entry = self._entries[name]
        if self._data is None:
            raise ValueError(f"{self.path}: expected an open file, got a closed one; open it again")
        import numpy as np

        if entry.type_id in _PLAIN_TYPES:
            array = np.frombuffer(
                self._data, _PLAIN_TYPES[entry.type_id][1], math.prod(entry.shape), entry.start
            ).reshape(entry.shape)
            return _as_bfloat16(array, name) if entry.type_name == "BF16" else array
        if entry.type_name not in GgufBlockFormat.__members__:
            supported = ", ".join(GgufBlockFormat.__members__)
            raise Unsupported(
                f"{name}: expected one of {supported} or a plain type, got {entry.type_name}; "
                "requantize the tensor to one of them"
            )
        data = np.frombuffer(self._data, np.uint8, entry.nbytes, entry.start)
        return GgufTensor(data, entry.type_id, entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        state = "" if self._data is not None else ", closed"
        return f"GgufFile({self.path!r}, {len(self)} tensors{state})"

    def close(self) -> None:
        """Give no more tensors out; those given keep the file mapped."""
        self._data = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _as_bfloat16(array: Any, name: str) -> Any:
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        raise Unsupported(
            f"{name}: NumPy has no bfloat16; install it, as in pip install ml_dtypes"
        ) from None
    return array.view(bfloat16)


def _read_header(header: _Header) -> tuple[dict[str, Any], dict[str, _Entry]]:
    header.take(4)
    if header.data[:4] != b"GGUF":
        raise header.error("expected the letters GGUF at its start; it is no GGUF file")
    version = header.scalar("I")
    if version not in (2, 3):
        raise header.error(
            f"expected version 2 or 3 in little-endian order, got {version}; convert the file"
        )
    tensor_count, pair_count = header.scalar("Q"), header.scalar("Q")

    metadata: dict[str, Any] = {}
    for index in range(min(pair_count, len(header.data))):
        header.reading = f"metadata {index}"
        key = header.text()
        header.reading = f"metadata {key!r}"
        metadata[key] = header.value(header.scalar("I"))

    raw: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for index in range(min(tensor_count, len(header.data))):
        header.reading = f"tensor {index} of {tensor_count}"
        name = header.text()
        header.reading = f"tensor {name!r}"
        if name in raw:
            raise header.error("expected one tensor of this name, got two; the file is corrupt")
        rank = header.scalar("I")
        if rank > _MOST_DIMENSIONS:
            raise header.error(
                f"expected at most {_MOST_DIMENSIONS} dimensions, got {rank}; the file is corrupt"
            )
        # The fastest dimension comes first in the file.
        shape = tuple(reversed([header.scalar("Q") for _ in range(rank)]))
        raw[name] = shape, header.scalar("I"), header.scalar("Q")

    header.reading = "metadata 'general.alignment'"
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
        raise header.error(f"expected a multiple of 8, got {alignment!r}; the file is corrupt")
    base = -(-header.at // alignment) * alignment

    entries = {}
    for name, (shape, type_id, offset) in raw.items():
        header.reading = f"tensor {name!r}"
        entries[name] = _entry(header, shape, type_id, offset, base, alignment)
    return metadata, entries


def _entry(
    header: _Header, shape: tuple[int, ...], type_id: int, offset: int, base: int, alignment: int
) -> _Entry:
    """Check one tensor against the size of the file."""
    elements, block_bytes = 1, 0
    if type_id in _PLAIN_TYPES:
        type_name, dtype = _PLAIN_TYPES[type_id]
        block_bytes = int(dtype[2:])
    elif type_id in OTHER_GGUF_TYPES:
        type_name, elements, block_bytes = OTHER_GGUF_TYPES[type_id]
    elif type_id in set(GgufBlockFormat):
        block_format = GgufBlockFormat(type_id)
        type_name, elements = block_format.name, block_format.block_size
        block_bytes = block_format.type_size
    else:
        type_name = f"type {type_id}"
    if elements > 1 and (not shape or shape[-1] % elements):
        raise header.error(
            f"expected rows of a multiple of {elements} elements ({type_name}), "
            f"got shape {shape}; the file is corrupt"
        )
    nbytes = math.prod(shape) // elements * block_bytes
    size = len(header.data)
    if offset % alignment:
        raise header.error(
            f"expected an offset that is a multiple of {alignment}, got {offset}; "
            "the file is corrupt"
        )
    if base + offset + nbytes > size:
        raise header.error(
            f"expected {nbytes} bytes of {type_name} {shape} at byte {base + offset}, but the file "
            f"ends at byte {size}; it is truncated, fetch it again"
        )
    return _Entry(type_id, type_name, shape, base + offset, nbytes)


def open_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Open a GGUF file: tensors by name, memory-mapped.

    Parameters
    ----------
    path : str or path-like
        The file.

    Returns
    -------
    GgufFile
        A mapping, and a context manager.

    Raises
    ------
    FileFormatError
        The file is no GGUF file, is truncated or is corrupt; the message names the tensor.
    OSError
        The file cannot be read.

    Examples
    --------
    >>> with open_gguf("model.gguf") as model:  # doctest: +SKIP
    ...     w = model["blk.0.ffn_up.weight"].to("cuda")
    """
    return GgufFile(path)
