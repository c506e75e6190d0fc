# SPDX-License-Identifier: Apache-2.0
"""What a GGUF file says of itself, read with the ``gguf`` package."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFValueType

from baracuda_cy.errors import FileFormatError
from baracuda_cy.formats import OTHER_GGUF_TYPES

# type id: name, elements and bytes of a block
_TYPES = {
    **OTHER_GGUF_TYPES,
    **{kind.value: (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()},
}
_SCALARS = GGUFReader.gguf_scalar_to_np
_STRING, _ARRAY, _UINT32 = GGUFValueType.STRING, GGUFValueType.ARRAY, GGUFValueType.UINT32
_DEEPEST_ARRAY = 4
_MOST_DIMENSIONS = 8


class Entry(NamedTuple):
    type_name: str
    shape: tuple[int, ...]
    data: Any  # its bytes, mapped; none for a type whose size is not known here


class Header(GGUFReader):  # type: ignore[misc]
    """Metadata and tensors of a GGUF file, checked against its size.

    GGUFReader believes the lengths that a file claims, does not say which key or tensor is broken,
    and refuses all of a file for one tensor of a type that it does not know. So the methods that
    begin with an underscore are overridden. They are internal to gguf: pyproject.toml limits its
    versions to those tested.
    """

    def __init__(self, path: str) -> None:
        self.path, self.reading, self.depth = path, "the header", 0
        self.metadata: dict[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        with open(path, "rb") as file:
            head = file.read(8)
        if len(head) < 8:
            raise self.error("a GGUF file", f"one of {len(head)} bytes", "it is truncated")
        if head[:4] != b"GGUF":
            raise self.error("the letters GGUF at its start", head[:4], "it is no GGUF file")
        version = int.from_bytes(head[4:], "little")
        if version not in (2, 3):
            raise self.error("version 2 or 3 in little-endian order", version, "convert the file")
        super().__init__(path)

    def error(
        self, expected: str, given: object, remedy: str = "the file is corrupt, fetch it again"
    ) -> FileFormatError:
        return FileFormatError(
            f"{self.path}: {self.reading}: expected {expected}, got {given}; {remedy}"
        )

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        item, count = np.dtype(dtype).newbyteorder("<"), int(count)
        self._check_end(offset, item.itemsize * count)
        return np.frombuffer(self.data, item, count, offset)

    def _check_end(self, offset: int, nbytes: int) -> None:
        if nbytes > self.data.size - offset:
            raise self.error(
                f"{nbytes} bytes at byte {offset}",
                f"a file that ends at byte {self.data.size}",
                "it is truncated or corrupt, fetch it again",
            )

    def _get_str(self, offset: int) -> Any:
        """Read the name at the start of a metadata pair or of a tensor's entry."""
        self.reading = f"{self.part} at byte {offset}"
        length, text = super()._get_str(offset)
        try:
            name = text.tobytes().decode()
        except UnicodeDecodeError:
            raise self.error("a name in UTF-8", text.tobytes()) from None
        self.reading = f"{self.part} {name!r}"
        if name in self.names:
            raise self.error(f"one {self.part} of this name", "two")
        self.names.add(name)
        return length, text

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        kind = int(raw_type)  # NumPy's integers are slow to compare with an enum's members
        if kind == _STRING:  # a value, not a name
            length, text = super()._get_str(orig_offs)
            return 8 + text.size, [length, text], [1], [_STRING]
        if kind in _SCALARS:
            return super()._get_field_parts(orig_offs, kind)
        if kind != _ARRAY or self.depth == _DEEPEST_ARRAY:
            raise self.error("a metadata type", kind)
        item, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        start, count, kind_of_item = orig_offs + 12, int(length[0]), int(item[0])
        # Numbers and strings are one part each; GGUFReader makes one or two of every single one.
        if scalar := _SCALARS.get(kind_of_item):
            numbers = self._get(start, scalar, count)
            return 12 + numbers.nbytes, [item, length, numbers], [2], [_ARRAY]
        self._check_end(start, 8 * count)  # a string takes 8 bytes at least, an array 12
        if kind_of_item == _STRING:
            end, texts = self._texts(start, count)
            return end - orig_offs, [item, length, texts], [2], [_ARRAY]
        if kind_of_item != _ARRAY:
            raise self.error("a metadata type", kind_of_item)
        self.depth += 1
        parts = super()._get_field_parts(orig_offs, kind)
        self.depth -= 1
        return parts

    def _texts(self, start: int, count: int) -> tuple[int, list[str]]:
        """Return where an array of strings ends, and the strings."""
        data, texts = memoryview(self.data), []
        for _ in range(count):
            begin = start + 8
            start = begin + int.from_bytes(data[start:begin], "little")
            self._check_end(begin, start - begin)
            texts.append(_text(data[begin:start]))
        return start, texts

    def _build_fields(self, offs: int, count: int) -> Any:
        own = set(self.fields)  # version and counts, which GGUFReader puts among the pairs
        self.part, self.names = "metadata", own.copy()
        offs = super()._build_fields(offs, count)
        for name, field in self.fields.items():
            if name not in own:
                self.metadata[name] = _value(iter(field.parts[3:]), field.types[0])
        return offs

    def _build_tensor_info(self, offs: int, count: int) -> Any:
        key = "general.alignment"
        if field := self.fields.get(key):
            given = self.metadata[key]
            if field.types != [_UINT32] or given < 8 or given & (given - 1):
                self.reading = f"metadata {key!r}"
                raise self.error("a power of two from 8 up as uint32", repr(given))
        self.part, self.names = "tensor", set()
        return super()._build_tensor_info(offs, count)

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        places = []
        for field in fields:
            self.reading = f"tensor {field.name!r}"
            dims, type_id, offset = field.parts[3], int(field.parts[4][0]), int(field.parts[5][0])
            if len(dims) > _MOST_DIMENSIONS:
                raise self.error(f"at most {_MOST_DIMENSIONS} dimensions", len(dims))
            shape = tuple(reversed(dims.tolist()))  # the fastest dimension comes first in the file
            name, elements, size = _TYPES.get(type_id, (f"type {type_id}", 1, 0))
            if elements > 1 and (not shape or shape[-1] % elements):
                raise self.error(f"rows of a multiple of {elements} elements ({name})", shape)
            if offset % int(self.alignment):
                raise self.error(f"an offset that is a multiple of {self.alignment}", offset)
            # Of no elements, too: NumPy refuses an array whose other dimensions are too large.
            count = math.prod(length or 1 for length in shape)
            if max(count // elements * size, count * 4) >= 2**63:
                raise self.error("a shape whose bytes an int64 counts, as float32 too", shape)
            nbytes = math.prod(shape) // elements * size
            data = self._get(int(start_offs) + offset, np.uint8, nbytes)
            self.entries[field.name] = Entry(name, shape, data)
            if nbytes:
                places.append((offset, offset + nbytes, field.name))
        reached, before = 0, ""
        for begin, end, name in sorted(places):
            if begin < reached:
                self.reading = f"tensor {name!r}"
                raise self.error(f"an offset from {reached}, where {before!r} ends", begin)
            reached, before = end, name


def read(path: str) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Read a file, or the first of a model in several with those beside it, as llama.cpp does."""
    first = Header(path)
    count = first.metadata.get("split.count", 0)
    if type(count) is not int:
        first.reading = "metadata 'split.count'"
        raise first.error("a number of files", repr(count)[:100])
    if count < 2:  # gguf-split leaves 0 where it merges
        return first.metadata, first.entries
    first.reading = "metadata 'split.no'"
    number, tail = first.metadata.get("split.no"), "-{:05}-of-{:05}.gguf".format
    if number != 0 or not path.endswith(tail(1, count)):
        expected = f"0, and a name that ends in {tail(1, count)}"
        raise first.error(expected, number, f"open the first of the {count} files, and rename none")
    entries = dict(first.entries)
    for number in range(1, count):
        beside = path.removesuffix(tail(1, count)) + tail(number + 1, count)
        if not os.path.isfile(beside):
            first.reading = f"file {number + 1} of {count}"
            raise first.error(beside, "none", "the model is incomplete, fetch it again")
        more = Header(beside)
        for key, wanted in (("split.count", count), ("split.no", number)):
            if more.metadata.get(key) != wanted:
                more.reading = f"metadata {key!r}"
                raise more.error(str(wanted), repr(more.metadata.get(key))[:100])
        for name in more.entries.keys() & entries.keys():
            more.reading = f"tensor {name!r}"
            raise more.error("one tensor of this name in all files", "two")
        entries |= more.entries
    return first.metadata, entries


def _value(parts: Iterator[Any], kind: int) -> Any:
    # ReaderField.contents flattens arrays of arrays.
    if kind == _STRING:
        next(parts)
        return _text(next(parts))
    if kind != _ARRAY:
        return next(parts).tolist()[0]
    item, count = int(next(parts)[0]), next(parts)[0]
    if item == _STRING:
        return next(parts)
    if item in _SCALARS:
        return next(parts).tolist()
    return [_value(parts, item) for _ in range(count)]


def _text(raw: Any) -> str:
    return str(raw, "utf-8", "replace")  # a vocabulary may hold text that is no UTF-8
