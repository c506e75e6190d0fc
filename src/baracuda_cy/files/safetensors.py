# SPDX-License-Identifier: Apache-2.0
"""Safetensors files: read through a memory map, every claim checked; written whole or not at all.

Eight bytes give the length of a JSON header, which gives each tensor's dtype, shape and place among
the bytes that follow.
"""

from __future__ import annotations

import contextlib
import glob
import json
import math
import mmap
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from baracuda_cy._ops import fetch, require_values
from baracuda_cy.dlpack import describe, inspect
from baracuda_cy.errors import FileFormatError, InvalidProblem, NotAnArray, Unsupported
from baracuda_cy.tensor import GgufTensor

# safetensors' name: NumPy's, or ml_dtypes' where NumPy has no such type. In this order they are
# written, as by the safetensors package: the larger come first, so that each is aligned.
_DTYPES = {
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_ORDER = {name: number for number, name in enumerate(_DTYPES)}
_ITEMSIZE = {
    name: 1 if "float8" in dtype else 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
    for name, dtype in _DTYPES.items()
}
DTYPE_OF_NUMPY = {dtype: name for name, dtype in _DTYPES.items()}
INCOMPLETE = "the checkpoint is incomplete, fetch it again"
_INDEX = ".safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors package
_MOST_DIMENSIONS = 32  # of NumPy before 2


class Entry(NamedTuple):
    path: str  # the file it is in
    dtype: str  # safetensors' name of it, which may be one that this package does not know
    shape: tuple[int, ...]
    data: NDArray[np.uint8]  # its bytes, mapped


def broken(
    path: str,
    key: str,
    expected: str,
    given: object,
    remedy: str = "the file is corrupt, fetch it again",
) -> FileFormatError:
    return FileFormatError(f"{path}: {key}: expected {expected}, got {given}; {remedy}")


def parse_object(raw: bytes, path: str, key: str) -> dict[str, Any]:
    """Return the JSON object that `raw` is; `key` is what a message calls it."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in pairs:
            if name in result:
                raise broken(path, key, "every name once", f"{name!r} twice")
            for text in (name, value):
                if isinstance(text, str):
                    text.encode()  # raises where a lone surrogate is escaped, which is no character
            result[name] = value
        return result

    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique)
    except FileFormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise broken(path, key, "JSON in UTF-8", f"what does not parse ({error})") from None
    if not isinstance(value, dict):
        raise broken(path, key, "a JSON object", type(value).__name__)
    return value


def sizes_of(value: Any) -> tuple[int, ...] | None:
    """Return `value` as a tuple if it is a list of integers from 0 to 2**63 - 1."""
    if isinstance(value, list) and all(type(it) is int and 0 <= it < 2**63 for it in value):
        return tuple(value)
    return None


def read(path: str) -> tuple[dict[str, str], dict[str, Entry]]:
    """Map a file: its metadata, and its tensors by name."""
    header = "the header"
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise broken(path, header, "a safetensors file", f"{size} bytes", "it is truncated")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    content = np.frombuffer(mapped, np.uint8)
    length = int.from_bytes(mapped[:8], "little")
    if length > min(_LONGEST_HEADER, len(content) - 8):
        raise broken(
            path,
            header,
            f"a length that is at most {_LONGEST_HEADER} bytes and fits the file of {len(content)}",
            length,
            "it is truncated or no safetensors file",
        )
    described = parse_object(mapped[8 : 8 + length], path, header)
    metadata = described.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(type(it) is not str for it in metadata.values()):
        raise broken(path, "__metadata__", "an object of strings", repr(metadata)[:100])
    data = content[8 + length :]
    places = {name: _place(path, name, value) for name, value in described.items()}
    _check_places(path, places, len(data))
    entries = {
        name: Entry(path, dtype, shape, data[begin:end])
        for name, (dtype, shape, begin, end) in places.items()
    }
    return metadata, entries


def _place(path: str, name: str, value: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Return dtype, shape, first byte and end of a tensor, which fit each other."""
    key = f"tensor {name!r}"
    keys = ("dtype", "shape", "data_offsets")
    if not isinstance(value, dict) or any(it not in value for it in keys):
        raise broken(path, key, f"an object with {', '.join(keys)}", repr(value)[:100])
    dtype, shape, offsets = value["dtype"], sizes_of(value["shape"]), sizes_of(value[keys[2]])
    if not isinstance(dtype, str):
        raise broken(path, key, "a name as the dtype", repr(dtype)[:100])
    if shape is None or len(shape) > _MOST_DIMENSIONS:
        raise broken(
            path,
            key,
            f"a shape of at most {_MOST_DIMENSIONS} sizes from 0 to 2**63 - 1",
            repr(value["shape"])[:100],
        )
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise broken(path, key, "offsets [begin, end]", repr(value["data_offsets"])[:100])
    begin, end = offsets
    if dtype in _ITEMSIZE:
        # NumPy refuses an array of no elements, too, if its other dimensions are too large.
        if math.prod(size or 1 for size in shape) * _ITEMSIZE[dtype] >= 2**63:
            raise broken(path, key, "a shape whose bytes an int64 counts", list(shape))
        nbytes = math.prod(shape) * _ITEMSIZE[dtype]
        if end - begin != nbytes:
            raise broken(
                path, key, f"{nbytes} bytes of {dtype} for the shape {list(shape)}", end - begin
            )
    return dtype, shape, begin, end


def _check_places(path: str, places: Mapping[str, tuple[Any, Any, int, int]], size: int) -> None:
    """Check that the tensors lie one behind the other and fill the file, as the format has it."""
    reached, before = 0, "the header"
    for name, (_, _, begin, end) in sorted(places.items(), key=lambda item: item[1][2:]):
        if begin != reached:
            raise broken(
                path,
                f"tensor {name!r}",
                f"to begin at byte {reached}, where {before} ends",
                f"byte {begin}",
            )
        reached, before = end, repr(name)
    if reached > size:
        raise broken(
            path,
            f"tensor {before}",
            f"{reached} bytes after the header",
            size,
            "the file is truncated, fetch it again",
        )
    if reached < size:
        raise broken(path, "the end", f"{reached} bytes after the header", size)


def as_array(name: str, entry: Entry) -> NDArray[Any]:
    """Return a tensor as a read-only array, over the mapped bytes if their address allows it."""
    if entry.dtype not in _DTYPES:
        raise Unsupported(
            f"{name}: expected one of {', '.join(_DTYPES)}, got {entry.dtype}; "
            "convert the tensor to one of them"
        )
    array: NDArray[Any] = entry.data.view(_numpy_dtype(name, _DTYPES[entry.dtype])).reshape(
        entry.shape
    )
    if not array.flags.aligned:
        array = array.copy()
        array.flags.writeable = False
    return array


def _numpy_dtype(name: str, dtype: str) -> Any:
    if not dtype.startswith(("bfloat", "float8")):
        return np.dtype(dtype)
    try:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, dtype))
    except (ImportError, AttributeError):
        raise Unsupported(
            f"{name}: NumPy has no {dtype}; install it, as in pip install -U ml_dtypes"
        ) from None


def checkpoint_in(folder: str) -> str:
    """Return the file to open in a folder that transformers or diffusers wrote."""
    for name in ("model.safetensors", f"model{_INDEX}"):
        if os.path.exists(os.path.join(folder, name)):
            return os.path.join(folder, name)
    escaped = glob.escape(folder)
    for pattern in (f"*{_INDEX}", "*.safetensors"):
        found = sorted(glob.glob(os.path.join(escaped, pattern)))
        if len(found) > 1:
            names = ", ".join(map(os.path.basename, found))
            raise InvalidProblem(
                f"path: expected one checkpoint in {folder}, got {names}; open one of them"
            )
        if found:
            return found[0]
    raise FileNotFoundError(
        f"{folder}: expected a .safetensors file or its .index.json, got neither; "
        "give the folder of the checkpoint"
    )


def read_index(path: str) -> tuple[dict[str, str], dict[str, Entry]]:
    """Read the shards that an index names: what belongs to a weight may lie in several of them."""
    with open(path, "rb") as file:
        index = parse_object(file.read(), path, "the index")
    if "weight_map" not in index:
        raise broken(
            path,
            "weight_map",
            "the index of a checkpoint in several files",
            f"JSON with {', '.join(index) or 'nothing':.100}",
            f"open a .safetensors file, its {_INDEX} or the folder of either",
        )
    places = index["weight_map"]
    if not isinstance(places, dict):
        raise broken(path, "weight_map", "an object", type(places).__name__)
    metadata: dict[str, str] = {}
    shards: dict[str, dict[str, Entry]] = {}
    entries: dict[str, Entry] = {}
    for name, shard in places.items():
        key = f"weight_map, tensor {name!r}"
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\0]+", shard):
            raise broken(path, key, "the name of a file beside the index", repr(shard)[:100])
        if shard not in shards:
            beside = os.path.join(os.path.dirname(path), shard)
            if not os.path.isfile(beside):
                raise broken(path, key, f"the file {shard!r:.100}", "none", INCOMPLETE)
            more, shards[shard] = read(beside)
            metadata = {**more, **metadata}
        if name not in shards[shard]:
            raise broken(path, key, f"it in {shard!r}", "no such tensor there", INCOMPLETE)
        entries[name] = shards[shard][name]
    return metadata, entries


# ---- writing ------------------------------------------------------------------------------------


def of_tensor(name: str, error: InvalidProblem) -> InvalidProblem:
    """Return the same error with the name of the tensor that it is about."""
    return type(error)(f"{name}: {error}")


class Output(NamedTuple):
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    data: Callable[[], NDArray[np.uint8]]  # gives the bytes when it is their turn


def output_of(name: str, array: Any) -> Output:
    if isinstance(array, GgufTensor):
        raise InvalidProblem(
            f"{name}: expected an Nf4Tensor or an array, got a GgufTensor; dequantize it first"
        )
    if isinstance(array, np.ma.MaskedArray):
        raise InvalidProblem(f"{name}: expected an array without a mask, got one; fill it")
    if isinstance(array, np.ndarray):  # of types, too, that DLPack does not know, in any order
        dtype = array.dtype.name
    else:
        seen = _inspect(name, array)
        if seen["element"] is None:
            raise InvalidProblem(
                f"{name}: expected a type that arrays of several libraries share, got "
                f"{describe(array)}; pass a NumPy array, as in .numpy(), or, where "
                "NumPy lacks the type, in .view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)"
            )
        dtype = seen["element"].dtype
    if dtype not in DTYPE_OF_NUMPY:
        raise InvalidProblem(
            f"{name}: expected one of {', '.join(DTYPE_OF_NUMPY)}, got {dtype}; convert the array"
        )
    if isinstance(array, np.ndarray):
        if array.ndim > _MOST_DIMENSIONS:
            raise InvalidProblem(
                f"{name}: expected at most {_MOST_DIMENSIONS} dimensions, got {array.ndim}; "
                "reshape the array"
            )
        return Output(DTYPE_OF_NUMPY[dtype], array.shape, partial(_bytes_of, array))
    return Output(DTYPE_OF_NUMPY[dtype], seen["shape"], partial(fetch, array))


def _bytes_of(array: NDArray[Any]) -> NDArray[np.uint8]:
    native = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    return np.ascontiguousarray(native).reshape(-1).view(np.uint8)


def _inspect(name: str, array: Any) -> Any:
    try:
        seen = inspect(array)
    except NotAnArray:
        raise NotAnArray(
            f"{name}: expected an Nf4Tensor or an array, got {type(array).__name__}; "
            "pass one of them"
        ) from None
    except InvalidProblem as error:
        raise of_tensor(name, error) from error
    require_values(array, name)
    expected = 1
    for size, stride in zip(reversed(seen["shape"]), reversed(seen["strides"]), strict=True):
        if size > 1 and stride != expected and 0 not in seen["shape"]:
            raise InvalidProblem(
                f"{name}: expected a C-contiguous array, got strides {seen['strides']} for the "
                f"shape {seen['shape']}; copy it, as in .contiguous() or .copy()"
            )
        expected *= size
    return seen


def write(path: str, tensors: Mapping[str, Output], metadata: Mapping[str, str]) -> None:
    """Write a file beside `path`, then rename it: `path` is the old file or the whole new one."""
    order = sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        dtype, shape, _ = tensors[name]
        begin, end = end, end + math.prod(shape) * _ITEMSIZE[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LONGEST_HEADER:
        raise InvalidProblem(
            f"tensors: expected names and metadata that fit a header of {_LONGEST_HEADER} bytes, "
            f"got {len(text)}; write several files"
        )
    head = len(text).to_bytes(8, "little") + text
    parts = (partial(_checked_bytes, name, header[name], tensors[name].data) for name in order)
    _replace(path, [lambda: head, *parts])


def _checked_bytes(
    name: str, place: Mapping[str, Any], data: Callable[[], NDArray[np.uint8]]
) -> NDArray[np.uint8]:
    """Return the bytes of a tensor, which are as many as the header says."""
    begin, end = place["data_offsets"]
    found = data()
    if len(found) != end - begin:
        raise InvalidProblem(
            f"{name}: expected {end - begin} bytes, as at first, got {len(found)}; "
            "leave the array as it is while it is saved"
        )
    return found


def _replace(path: str, parts: Iterable[Callable[[], Any]]) -> None:
    if os.path.exists(path) and not os.path.isfile(path):
        folder = IsADirectoryError, "folder"
        kind, given = folder if os.path.isdir(path) else (FileExistsError, "pipe or device")
        raise kind(f"{path}: expected a file or none yet, got a {given}; choose another name")
    # A link stays, and what it leads to is replaced.
    target = os.path.realpath(path) if os.path.islink(path) else path
    temporary = os.path.join(os.path.dirname(target), f".baracuda-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            with contextlib.suppress(FileNotFoundError):
                shutil.copymode(target, temporary)  # before there is anything to read
            for part in parts:
                file.write(part())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename == temporary:
            raise OSError(error.errno, error.strerror, path) from error  # the name that is known
        raise
