# SPDX-License-Identifier: Apache-2.0
"""A weight in NF4 or FP4 and the tensors that a state_dict has for it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from baracuda_cy._ops import fetch
from baracuda_cy.codebooks import CODEBOOKS
from baracuda_cy.errors import InvalidProblem
from baracuda_cy.files.safetensors import (
    DTYPE_OF_NUMPY,
    INCOMPLETE,
    Entry,
    Output,
    as_array,
    broken,
    of_tensor,
    output_of,
    parse_object,
    sizes_of,
)
from baracuda_cy.formats import Codebook, ElementKind, Nf4Layout
from baracuda_cy.tensor import NestedAbsmax, Nf4Tensor

# A weight "w" lies in "w" (the codes), "w.absmax", "w.quant_map", "w.quant_state.bitsandbytes__nf4"
# (JSON) and, where absmax is quantized itself, two more.
_NESTED_PARTS = ("nested_absmax", "nested_quant_map")
_PARTS = ("absmax", "quant_map", *_NESTED_PARTS)
_STATE = "quant_state.bitsandbytes__"
_KINDS = {codebook.name.lower(): codebook for codebook in Codebook}
_FIELDS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_FIELDS = ("nested_blocksize", "nested_dtype", "nested_offset")

_QUANT_MAPS = {  # without FP4's -0, as bitsandbytes writes it
    codebook: np.array(values, np.float32) + np.float32(0) for codebook, values in CODEBOOKS.items()
}
DTYPES = ("float16", "bfloat16", "float32")  # of the weight before it was quantized
STORAGE = (ElementKind.U8, ElementKind.F16, ElementKind.BF16, ElementKind.F32)
_STORED = ("U8", "I8", "F16", "BF16", "F32", "F64")  # what bnb_4bit_quant_storage may be
_LARGEST = float(np.finfo(np.float32).max)
_BLOCK_SIZES = tuple(2**exponent for exponent in range(5, 13))


def parts_of(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the 4-bit weights among `names`: the names of their parts."""
    names = set(names)
    found: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        for part in _PARTS:
            if name.endswith(f".{part}"):
                found.setdefault(name.removesuffix(f".{part}"), {})[part] = name
        weight, dot, kind = name.rpartition(f".{_STATE}")
        if dot:
            found.setdefault(weight, {})[_STATE + kind] = name
    # What is only named like a part, with nothing that it could be a part of, is no part.
    return {
        weight: parts
        for weight, parts in found.items()
        if weight in names or "quant_map" in parts or any(it.startswith(_STATE) for it in parts)
    }


class _Nested(NamedTuple):
    quant_map: Entry
    absmax: Entry
    offset: float
    block_size: int


class Weight(NamedTuple):
    data: Entry
    absmax: Entry
    nested: _Nested | None
    shape: tuple[int, ...]
    block_size: int
    codebook: Codebook
    dtype: str

    def tensor(self, name: str) -> Nf4Tensor:
        nested = None
        if self.nested:
            nested = NestedAbsmax(
                as_array(name, self.nested.quant_map).reshape(-1),
                as_array(name, self.nested.absmax).reshape(-1),
                self.nested.offset,
                self.nested.block_size,
            )
        return Nf4Tensor(
            self.data.data,
            as_array(name, self.absmax).reshape(-1),
            shape=self.shape,
            block_size=self.block_size,
            codebook=self.codebook,
            layout=Nf4Layout.BITSANDBYTES,
            nested=nested,
            dtype=self.dtype,
        )


def weights_of(path: str, entries: Mapping[str, Entry]) -> tuple[dict[str, Weight], set[str]]:
    """Return the weights in a checkpoint, and the names of what belongs to them.

    `path` is what a message says where something is missing.
    """
    found = parts_of(entries)
    all_parts = {part for parts in found.values() for part in parts.values()}
    for name in sorted(found.keys() & all_parts):
        given = f"one with {', '.join(found[name].values())}"
        raise broken(path, name, "a part of a weight, which has no parts itself", given)
    weights = {name: _Reader(path, entries, name, parts).read() for name, parts in found.items()}
    return weights, all_parts


class _Reader:
    """Puts one weight together from its parts, which must fit each other."""

    def __init__(
        self, path: str, entries: Mapping[str, Entry], name: str, parts: Mapping[str, str]
    ) -> None:
        self.path, self.entries, self.name, self.parts = path, entries, name, parts
        kinds = sorted(part.removeprefix(_STATE) for part in parts if part.startswith(_STATE))
        self.key = f"{name}.{_STATE}{kinds[-1] if kinds else 'nf4'}"
        if not kinds:
            beside = ", ".join(parts.values())
            raise broken(path, self.key, f"this tensor beside {beside}", "none", INCOMPLETE)
        if len(kinds) > 1:
            raise self.error("one quant_state of a weight", f"those of {' and '.join(kinds)}")
        if kinds[0] not in _KINDS:
            raise self.error("bitsandbytes__nf4 or bitsandbytes__fp4", f"bitsandbytes__{kinds[0]}")
        self.codebook = _KINDS[kinds[0]]
        self.state = self.read_state()

    def error(self, expected: str, given: object) -> Exception:
        """Say what is wrong in the quant_state."""
        entry = self.entries.get(self.key)
        return broken(entry.path if entry else self.path, self.key, expected, given)

    def read_state(self) -> dict[str, Any]:
        entry = self.entries[self.key]
        if entry.dtype != "U8":
            raise self.error("JSON as U8", entry.dtype)
        state = parse_object(entry.data.tobytes(), entry.path, self.key)
        self.nested = any(it in state for it in _NESTED_FIELDS) or any(
            it in self.parts for it in _NESTED_PARTS
        )
        expected = _FIELDS + _NESTED_FIELDS if self.nested else _FIELDS
        for field in expected:
            if field not in state:
                raise self.error(f"{field} in the JSON", f"none beside {', '.join(state)}")
        if extra := [field for field in state if field not in expected]:
            raise self.error(f"{', '.join(expected)} in the JSON", f"{extra[0]!r} too")
        return state

    def size(self, field: str, wanted: str, fits: Callable[[int], bool]) -> int:
        value = self.state[field]
        if type(value) is not int or not fits(value):
            raise self.error(f"{wanted} as the {field}", repr(value)[:100])
        return value

    def choice(self, field: str, *choices: str) -> str:
        value = self.state[field]
        if value not in choices:
            raise self.error(f"{' or '.join(choices)} as the {field}", repr(value)[:100])
        return str(value)

    def shape(self) -> tuple[int, ...]:
        shape = sizes_of(self.state["shape"])
        if not shape or len(shape) > 8 or math.prod(size or 1 for size in shape) >= 2**61:
            raise self.error("a shape of 1 to 8 sizes", repr(self.state["shape"])[:100])
        return shape

    def offset(self) -> float:
        value = self.state["nested_offset"]
        if type(value) not in (int, float) or math.inf > abs(value) > _LARGEST:
            raise self.error("a float32 as the nested_offset", repr(value)[:100])
        return float(value)

    def part(self, part: str, dtype: str, count: int) -> Entry:
        key = f"{self.name}.{part}"
        entry = self.entries.get(key)
        if entry is None:
            raise broken(self.path, key, f"{count} values of {dtype}", "none", INCOMPLETE)
        if entry.dtype != dtype or math.prod(entry.shape) != count:
            given = f"the shape {list(entry.shape)} of {entry.dtype}"
            raise broken(entry.path, key, f"{count} values of {dtype}", given)
        return entry

    def read(self) -> Weight:
        self.choice("quant_type", self.codebook.name.lower())
        block_size = self.size(
            "blocksize", "a power of two from 32 to 4096", _BLOCK_SIZES.__contains__
        )
        dtype, shape = self.choice("dtype", *DTYPES), self.shape()
        count = math.prod(shape)
        data = self.entries.get(self.name)
        wanted = f"{(count + 1) // 2} bytes of codes for the shape {list(shape)}"
        if data is None:
            raise broken(self.path, self.name, wanted, "none", INCOMPLETE)
        if data.dtype not in _STORED:
            raise broken(data.path, self.name, f"codes as {', '.join(_STORED)}", data.dtype)
        if len(data.data) != (count + 1) // 2:
            raise broken(data.path, self.name, wanted, len(data.data))
        quant_map = self.part("quant_map", "F32", 16)
        values = as_array(self.name, quant_map).reshape(-1)
        if not np.array_equal(values, _QUANT_MAPS[self.codebook]):
            raise broken(
                quant_map.path,
                f"{self.name}.quant_map",
                f"the values of {self.codebook.name}",
                values.tolist(),
                "quantize the weight with bitsandbytes' own table",
            )
        blocks = -(-count // block_size)
        absmax = self.part("absmax", "U8" if self.nested else "F32", blocks)
        nested = self.read_nested(blocks) if self.nested else None
        return Weight(data, absmax, nested, shape, block_size, self.codebook, dtype)

    def read_nested(self, blocks: int) -> _Nested:
        self.choice("nested_dtype", "float32")
        block_size = self.size(
            "nested_blocksize",
            "a power of two up to 2**30",
            [2**power for power in range(31)].__contains__,
        )
        return _Nested(
            self.part("nested_quant_map", "F32", 256),
            self.part("nested_absmax", "F32", -(-blocks // block_size)),
            self.offset(),
            block_size,
        )


def outputs_of(name: str, weight: Nf4Tensor, dtype: str, storage: ElementKind) -> dict[str, Output]:
    if weight.layout is not Nf4Layout.BITSANDBYTES:
        try:
            weight = weight.to("cpu").to_layout(Nf4Layout.BITSANDBYTES)
        except InvalidProblem as error:
            raise of_tensor(name, error) from error
    quant_type = weight.codebook.name.lower()
    count = math.prod(weight.shape)
    blocks, nbytes = -(-count // weight.block_size), (count + 1) // 2
    if nbytes % storage.itemsize:
        raise InvalidProblem(
            f"quant_storage: expected a type that divides the {nbytes} bytes of {name!r}, "
            f'got {storage.dtype}; use "uint8"'
        )
    state: dict[str, Any] = {
        "quant_type": quant_type,
        "blocksize": weight.block_size,
        "dtype": dtype,
        "shape": weight.shape,
    }
    shape = (nbytes // storage.itemsize, 1)
    outputs = {
        name: Output(DTYPE_OF_NUMPY[storage.dtype], shape, partial(fetch, weight.data)),
        f"{name}.quant_map": output_of("quant_map", _QUANT_MAPS[weight.codebook]),
    }
    if nested := weight.nested:
        state |= {
            "nested_blocksize": nested.block_size,
            "nested_dtype": "float32",
            "nested_offset": nested.offset,
        }
        outputs |= {
            f"{name}.absmax": Output("U8", (blocks,), partial(fetch, weight.absmax)),
            f"{name}.nested_absmax": Output("F32", (nested.count,), partial(fetch, nested.absmax)),
            f"{name}.nested_quant_map": Output("F32", (256,), partial(fetch, nested.code)),
        }
    else:
        outputs[f"{name}.absmax"] = Output("F32", (blocks,), partial(fetch, weight.absmax))
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    outputs[f"{name}.{_STATE}{quant_type}"] = output_of("quant_state", text)
    return outputs
