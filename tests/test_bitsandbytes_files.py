# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of bitsandbytes: what is whole is read, what is broken is named, what is written is
what the safetensors package reads.
"""

import contextlib
import copy
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import baracuda_cy as bcy
from baracuda_cy import FileFormatError, InvalidProblem, NotAnArray, Unsupported

GOLDEN = Path(__file__).parent / "golden"
LINEAR4BIT = GOLDEN / "linear4bit.safetensors"
SHARDED = GOLDEN / "llama_nf4"
INDEX = "model.safetensors.index.json"

# ---- files made by hand --------------------------------------------------------------------------

with np.load(GOLDEN / "vectors.npz") as vectors:
    NF4, FP4 = (vectors[f"{kind}/codebook"].view(np.float32) for kind in ("nf4", "fp4"))


def entry(array, dtype=None):
    """A tensor of a file: its type, shape and bytes."""
    names = {"uint8": "U8", "float32": "F32", "float16": "F16", "int64": "I64", "int8": "I8"}
    return dtype or names[array.dtype.name], list(array.shape), array.tobytes()


def header_of(entries):
    header, end = {}, 0
    for name, (dtype, shape, data) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    return header


def framed(header, data=b"", length=None):
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def make(entries, metadata=None):
    header = {} if metadata is None else {"__metadata__": metadata}
    return framed(header | header_of(entries), b"".join(data for _, _, data in entries.values()))


def weight(name="w", kind="nf4", nested=False, size=(6, 100), **state):
    """The parts of a weight in blocks of 64, and what its JSON says otherwise; ... is left out."""
    rng = np.random.default_rng(7)
    count = math.prod(size)
    blocks = -(-count // 64)
    about = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(size)}
    parts = {
        name: rng.integers(0, 256, ((count + 1) // 2, 1), np.uint8),
        f"{name}.quant_map": NF4 if kind == "nf4" else FP4,
        f"{name}.absmax": rng.uniform(0.5, 2, blocks).astype(np.float32),
    }
    if nested:
        about |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
        parts[f"{name}.absmax"] = rng.integers(0, 256, blocks, np.uint8)
        parts[f"{name}.nested_absmax"] = np.ones(-(-blocks // 256), np.float32)
        parts[f"{name}.nested_quant_map"] = np.linspace(-1, 1, 256, dtype=np.float32)
    about = {field: value for field, value in (about | state).items() if value is not ...}
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    parts[f"{name}.quant_state.bitsandbytes__{kind}"] = text
    return {part: entry(array) for part, array in parts.items()}


def values_of(parts, name="w"):
    """A weight in float64: its definition, written down again."""
    (key,) = (key for key in parts if ".quant_state." in key)
    state = json.loads(parts[key][2])
    count = math.prod(state["shape"])
    raw = np.frombuffer(parts[name][2], np.uint8)
    codes = np.stack([raw >> 4, raw & 15], axis=1).reshape(-1)[:count]
    absmax = np.frombuffer(parts[f"{name}.absmax"][2], np.uint8)
    if "nested_offset" in state:
        table = np.frombuffer(parts[f"{name}.nested_quant_map"][2], np.float32)
        scale = np.frombuffer(parts[f"{name}.nested_absmax"][2], np.float32)
        absmax = table[absmax] * np.repeat(scale, state["nested_blocksize"])[: absmax.size]
        absmax = absmax + np.float32(state["nested_offset"])
    else:
        absmax = absmax.view(np.float32)
    book = np.frombuffer(parts[f"{name}.quant_map"][2], np.float32)
    return (book[codes] * np.repeat(absmax, state["blocksize"])[:count]).reshape(state["shape"])


@pytest.fixture
def put(tmp_path):
    """Write bytes to a file."""

    def write(content, name="broken.safetensors"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def refused(path, match):
    with pytest.raises(FileFormatError, match=match) as caught:
        bcy.open_bitsandbytes(path)
    assert str(path) in str(caught.value)


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(6, 100), (5, 37), (1, 1), (2, 3, 40), (77,), (0, 64)])
def test_weight(put, kind, nested, shape):
    parts = weight(kind=kind, nested=nested, size=shape)
    model = bcy.open_bitsandbytes(put(make(parts)))
    assert list(model) == ["w"]
    w = model["w"]
    assert isinstance(w, bcy.Nf4Tensor)
    assert (w.shape, w.block_size, w.codebook.name) == (shape, 64, kind.upper())
    assert (w.layout, w.device) == (bcy.Nf4Layout.BITSANDBYTES, "cpu")
    assert (w.nested is not None) == nested
    assert model.types == {"w": kind.upper()}
    assert model.dtypes == {"w": "bfloat16"}
    np.testing.assert_array_equal(w.dequantize(), values_of(parts))


def test_nested_block_size_and_offset_are_read(put):
    parts = weight(nested=True, nested_blocksize=4, nested_offset=-3)
    parts["w.nested_absmax"] = entry(np.arange(3, dtype=np.float32))
    w = bcy.open_bitsandbytes(put(make(parts)))["w"]
    assert (w.nested.block_size, w.nested.offset) == (4, -3.0)
    np.testing.assert_array_equal(w.dequantize(), values_of(parts))


def test_nested_offset_may_be_nan(put):
    """It is data: the mean of absmax, one of which is NaN."""
    w = bcy.open_bitsandbytes(put(make(weight(nested=True, nested_offset=math.nan))))["w"]
    assert np.isnan(w.dequantize()).all()


@pytest.mark.parametrize(
    ("dtype", "size"), [("BF16", 2), ("F16", 2), ("F32", 4), ("F64", 8), ("I8", 1)]
)
def test_quant_storage(put, dtype, size):
    """Codes stored as another type are the same bytes."""
    parts = weight(size=(6, 128))
    data = parts["w"][2]
    parts["w"] = (dtype, [len(data) // size, 1], data)
    w = bcy.open_bitsandbytes(put(make(parts)))["w"]
    np.testing.assert_array_equal(w.dequantize(), values_of(parts))


def test_plain_tensors(put):
    kinds = {
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
        "BOOL": np.bool_,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
    }
    arrays = {name: np.arange(6).reshape(2, 3).astype(kind) for name, kind in kinds.items()}
    scalar = np.array(2.5, np.float32)
    entries = {name: (name, [2, 3], array.tobytes()) for name, array in arrays.items()}
    entries |= {"scalar": entry(scalar), "empty": ("F32", [0, 3], b"")}
    model = bcy.open_bitsandbytes(put(make(entries)))
    for name, array in arrays.items():
        assert model.types[name] == name
        assert model[name].dtype == array.dtype
        np.testing.assert_array_equal(model[name], array)
    np.testing.assert_array_equal(model["scalar"], scalar)
    assert model["empty"].shape == (0, 3)
    assert model.dtypes == {}


def test_type_that_is_not_known_is_named_only_when_asked_for(put):
    entries = {"a": ("F4", [3], b"\0\0"), "b": ("F16", [1], b"\0\0")}
    model = bcy.open_bitsandbytes(put(make(entries)))
    assert model.types == {"a": "F4", "b": "F16"}
    assert model["b"] == 0
    with pytest.raises(Unsupported, match=r"^a: expected one of .*BF16.* got F4; convert"):
        model["a"]


def test_without_ml_dtypes(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)  # importing it now fails
    model = bcy.open_bitsandbytes(LINEAR4BIT)
    assert "brain" in model
    assert model["bf16_storage.weight"].dequantize().shape == (32, 64)
    with pytest.raises(Unsupported, match=r"^brain: NumPy has no bfloat16; .* pip install"):
        model["brain"]


def test_unaligned_tensors_are_copied(put):
    """A header of any length is allowed, and then numbers lie anywhere."""
    parts = weight(nested=True) | {"x": entry(np.arange(5, dtype=np.float32))}
    for spaces in range(8):
        header = json.dumps(header_of(parts)).encode() + b" " * spaces
        data = b"".join(data for _, _, data in parts.values())
        model = bcy.open_bitsandbytes(put(framed(header, data), f"{spaces}.safetensors"))
        assert model["x"].flags.aligned
        assert not model["x"].flags.writeable
        np.testing.assert_array_equal(model["x"], np.arange(5))
        np.testing.assert_array_equal(model["w"].dequantize(), values_of(parts))


def test_names_that_only_look_like_parts(put):
    entries = {
        "observer.absmax": entry(np.ones(2, np.float32)),
        "nested_quant_map": entry(np.ones(3, np.float32)),
    }
    model = bcy.open_bitsandbytes(put(make(entries)))
    assert list(model) == list(entries)
    np.testing.assert_array_equal(model["observer.absmax"], [1, 1])


def test_mapped_not_read():
    """Arrays are views of the file; nothing can be written."""
    model = bcy.open_bitsandbytes(LINEAR4BIT)
    w = model["nf4_nested.weight"]
    for array in (model["steps"], w.data, w.absmax, w.nested.absmax, w.nested.code):
        assert not array.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    assert w.data.ctypes.data == model["nf4_nested.weight"].data.ctypes.data


def test_it_is_a_mapping():
    safetensors = pytest.importorskip("safetensors")
    model = bcy.open_bitsandbytes(LINEAR4BIT)
    with safetensors.safe_open(LINEAR4BIT, "np") as theirs:
        names = {name for name in theirs.keys() if ".weight." not in name}  # noqa: SIM118
        assert dict(model.metadata) == theirs.metadata()
    assert set(model) == names
    assert len(model) == len(names)
    assert "odd.weight" in model
    assert "odd.weight.absmax" not in model
    assert model.get("nothing") is None
    with pytest.raises(KeyError, match="nothing"):
        model["nothing"]
    for about in (model.metadata, model.types, model.dtypes):
        with pytest.raises(TypeError):
            about["x"] = 1
    assert repr(model) == f"BitsandbytesFile({str(LINEAR4BIT)!r}, {len(model)} tensors)"


def test_a_file_equals_itself_alone():
    model, other = bcy.open_bitsandbytes(LINEAR4BIT), bcy.open_bitsandbytes(LINEAR4BIT)
    assert model == model
    assert model != other
    assert model != dict(model)
    assert len({model, other, model}) == 2


def test_tensors_outlive_the_file():
    with bcy.open_bitsandbytes(str(LINEAR4BIT)) as model:
        w, steps = model["nf4_nested.weight"], model["steps"]
    assert "closed" in repr(model)
    with pytest.raises(InvalidProblem, match="closed"):
        model["steps"]
    del model
    assert w.dequantize().shape == (48, 64)
    assert steps.tolist() == [0, 1, 2]
    again = pickle.loads(pickle.dumps(w))
    np.testing.assert_array_equal(again.dequantize(), w.dequantize())


def test_only_numpy_is_needed(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            """if True:
            import sys
            for name in ("torch", "bitsandbytes", "safetensors", "transformers", "ml_dtypes"):
                sys.modules[name] = None
            import baracuda_cy as bcy
            assert "numpy" not in sys.modules
            model = bcy.open_bitsandbytes(sys.argv[1])
            print(model["nf4_nested.weight"].dequantize().shape, model["steps"].tolist())
            bcy.save_bitsandbytes(sys.argv[2], {"w": model["odd.weight"], "steps": model["steps"]})
            print(bcy.open_bitsandbytes(sys.argv[2])["w"])
            """,
            LINEAR4BIT,
            tmp_path / "out",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(48, 64) [0, 1, 2]\nNf4Tensor(NF4, shape=(5, 37)")


# ---- folders and shards --------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(SHARDED, folder)
    return folder


def test_shards():
    by_folder, by_index = bcy.open_bitsandbytes(SHARDED), bcy.open_bitsandbytes(SHARDED / INDEX)
    assert dict(by_folder.types) == dict(by_index.types)
    assert dict(by_folder.metadata) == {"format": "pt"}
    # transformers counts the parts of a weight one by one when it fills its files.
    places = json.loads((SHARDED / INDEX).read_text())["weight_map"]
    name = "model.layers.0.mlp.gate_proj.weight"
    assert places[name] != places[f"{name}.absmax"]
    assert by_folder[name].shape == (96, 64)
    for name in by_folder:
        if isinstance(by_folder[name], bcy.Nf4Tensor):
            ours, theirs = by_folder[name].dequantize(), by_index[name].dequantize()
            np.testing.assert_array_equal(ours, theirs)
    assert set(by_folder) == {name for name in places if ".weight." not in name}


def test_folder_with_one_file(tmp_path):
    shutil.copy(LINEAR4BIT, tmp_path / "adapter_model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert "odd.weight" in bcy.open_bitsandbytes(tmp_path)


def test_folder_prefers_what_transformers_does(shards):
    shutil.copy(LINEAR4BIT, shards / "other.safetensors")
    assert "lm_head.weight" in bcy.open_bitsandbytes(shards)
    shutil.copy(LINEAR4BIT, shards / "model.safetensors")
    assert "odd.weight" in bcy.open_bitsandbytes(shards)


def test_folder_with_several_or_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a \.safetensors file or its"):
        bcy.open_bitsandbytes(tmp_path)
    for name in ("a", "b"):
        shutil.copy(LINEAR4BIT, tmp_path / f"{name}.safetensors")
    with pytest.raises(InvalidProblem, match=r"one checkpoint .* got a\.safetensors, b\.safet"):
        bcy.open_bitsandbytes(tmp_path)


def test_folder_whose_name_is_a_pattern(tmp_path):
    folder = tmp_path / "[ab]*"
    folder.mkdir()
    shutil.copy(LINEAR4BIT, folder / "a.safetensors")
    assert "odd.weight" in bcy.open_bitsandbytes(folder)


GATE = "model.layers.0.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda it: it["weight_map"].pop(GATE), rf"{GATE}: expected 3072 bytes .*, got none"),
        (
            lambda it: it["weight_map"].pop(f"{GATE}.absmax"),
            rf"{GATE}\.absmax: expected 96 values of U8, got none; the checkpoint is incomplete",
        ),
        (
            lambda it: it["weight_map"].update({GATE: "model-00004-of-00004.safetensors"}),
            rf"tensor '{GATE}': expected it in 'model-00004-of-00004.safetensors', got no such",
        ),
        (
            lambda it: it["weight_map"].update({GATE: "gone.safetensors"}),
            rf"tensor '{GATE}': expected the file 'gone.safetensors', got none",
        ),
        (
            lambda it: it["weight_map"].update({GATE: "../model/x.safetensors"}),
            rf"tensor '{GATE}': expected the name of a file beside the index, got '\.\./model/x",
        ),
        (lambda it: it["weight_map"].update({GATE: "a\0b"}), rf"tensor '{GATE}': expected the na"),
        (lambda it: it["weight_map"].update({GATE: "\ud800"}), "the index: expected JSON in UTF-8"),
        (
            lambda it: it["weight_map"].update({GATE: "."}),
            rf"'{GATE}': expected the file '\.', got n",
        ),
        (
            lambda it: it["weight_map"].update({GATE: ".."}),
            rf"'{GATE}': expected the file '\.\.', g",
        ),
        (
            lambda it: it["weight_map"].update({GATE: "x" * 300}),
            rf"tensor '{GATE}': expected the file 'xxx.*x, got none; the checkpoint is incomplete",
        ),
        (lambda it: it["weight_map"].update({GATE: ""}), rf"tensor '{GATE}': expected the name"),
        (
            lambda it: it["weight_map"].update({GATE: 3}),
            rf"tensor '{GATE}': expected the name .* 3",
        ),
        (
            lambda it: it.pop("weight_map"),
            "weight_map: expected the index of a checkpoint .* got JSON with metadata; open a",
        ),
        (lambda it: it.update(weight_map=[]), "weight_map: expected an object, got list"),
    ],
)
def test_broken_index(shards, change, match):
    index = json.loads((shards / INDEX).read_text())
    change(index)
    (shards / INDEX).write_text(json.dumps(index))
    refused(shards / INDEX, match)


def test_index_that_is_no_json(shards):
    (shards / INDEX).write_bytes(b"\xff\xfe")
    refused(shards / INDEX, "the index: expected JSON in UTF-8")


def test_broken_shard_is_named(shards):
    shard = shards / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(FileFormatError, match=r"model-00002-of-00004\.safetensors: tensor .*trunc"):
        bcy.open_bitsandbytes(shards)


# ---- broken files --------------------------------------------------------------------------------


def test_the_maker_of_broken_files_makes_whole_ones(put):
    safetensors = pytest.importorskip("safetensors.numpy")
    parts = weight(nested=True) | {"x": entry(np.arange(5))}
    path = put(make(parts, {"format": "pt"}))
    theirs = safetensors.load_file(path)
    assert set(theirs) == set(parts)
    np.testing.assert_array_equal(bcy.open_bitsandbytes(path)["x"], theirs["x"])


def one(dtype="F32", shape=(2,), offsets=(0, 8), data=8, **more):
    described = {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}
    return framed({"x": described}, b"\0" * data)


def two(first, second, data=16):
    header = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": offsets}
        for name, offsets in (("x", first), ("y", second))
    }
    return framed(header, b"\0" * data)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "the header: expected a safetensors file, got 0 bytes; it is truncated"),
        (b"\0" * 7, "the header: .* got 7 bytes"),
        (
            framed(b"{}", length=3),
            "the header: expected a length .* file of 10, got 3; it is trunc",
        ),
        (framed(b"{}", length=2**64 - 1), f"the header: .* got {2**64 - 1}; it is truncated or no"),
        (b"GGUF" + bytes(20), "the header: .* no safetensors file"),
        (framed(b""), "the header: expected JSON in UTF-8"),
        (framed(b"{"), "the header: expected JSON in UTF-8"),
        (framed(b"\xff"), "the header: expected JSON in UTF-8"),
        (framed('{"é": 1}'.encode("latin-1")), "the header: expected JSON in UTF-8"),
        (framed('{"a": 1}'.encode("utf-16")), "the header: expected JSON in UTF-8"),
        (framed(b"[" * 100_000), "the header: expected JSON in UTF-8"),
        (framed(b'{"a":' * 100_000), "the header: expected JSON in UTF-8"),
        (framed(b"9" * 5000), "the header: expected JSON in UTF-8"),
        (framed([]), "the header: expected a JSON object, got list"),
        (framed(b'{"x": 1, "x": 2}'), "the header: expected every name once, got 'x' twice"),
        (
            framed(b'{"x": {"dtype": "F32", "dtype": "F16"}}'),
            "the header: expected every name once, got 'dtype' twice",
        ),
        (framed({"\ud800": 1}), "the header: expected JSON in UTF-8"),
        (framed({"__metadata__": {"a": "\udfff"}}), "the header: expected JSON in UTF-8"),
        (framed({"__metadata__": []}), r"__metadata__: expected an object of strings, got \[\]"),
        (framed({"__metadata__": {"a": 1}}), "__metadata__: expected an object of strings"),
        (framed({"x": 1}), "tensor 'x': expected an object with dtype, shape, data_offsets, got 1"),
        (framed({"x": {"dtype": "F32", "shape": []}}), "tensor 'x': expected an object with"),
        (one(dtype=3), "tensor 'x': expected a name as the dtype, got 3"),
        (one(dtype=["F32"]), "tensor 'x': expected a name as the dtype"),
        (one(shape=2), "tensor 'x': expected a shape of .* got 2"),
        (one(shape=[-2]), r"tensor 'x': expected a shape of .* got \[-2\]"),
        (one(shape=[2.0]), "tensor 'x': expected a shape of"),
        (one(shape=[True, 2]), "tensor 'x': expected a shape of"),
        (one(shape=["2"]), "tensor 'x': expected a shape of"),
        (one(shape=[2**63]), "tensor 'x': expected a shape of"),
        (one(shape=[1] * 33 + [2]), "tensor 'x': expected a shape of at most 32 sizes"),
        (one(shape=[0, 2**62], offsets=[0, 0]), "tensor 'x': .* whose bytes an int64 counts"),
        (one(shape=[2**62, 2**62]), "tensor 'x': .* whose bytes an int64 counts"),
        (one(shape=[3]), r"tensor 'x': expected 12 bytes of F32 for the shape \[3\], got 8"),
        (one(dtype="F16"), "tensor 'x': expected 4 bytes of F16"),
        (one(offsets=3), r"tensor 'x': expected offsets \[begin, end\], got 3"),
        (one(offsets=[0]), "tensor 'x': expected offsets"),
        (one(offsets=[0, 8, 9]), "tensor 'x': expected offsets"),
        (one(offsets=[8, 0]), r"tensor 'x': expected offsets .* got \[8, 0\]"),
        (one(offsets=[-8, 0]), "tensor 'x': expected offsets"),
        (one(offsets=[0.0, 8.0]), "tensor 'x': expected offsets"),
        (one(offsets=[0, 2**70]), "tensor 'x': expected offsets"),
        (
            one(offsets=[4, 12], data=12),
            "tensor 'x': expected to begin at byte 0, where the header",
        ),
        (one(data=7), "tensor 'x': expected 8 bytes after the header, got 7; the file is trunc"),
        (one(data=0), "tensor 'x': .* got 0; the file is truncated"),
        (one(data=9), "the end: expected 8 bytes after the header, got 9"),
        (framed({}, b"\0"), "the end: expected 0 bytes after the header, got 1"),
        (one("ODD", offsets=[0, 2**62]), "tensor 'x': .* the file is truncated"),
        (
            two([0, 8], [4, 12]),
            "tensor 'y': expected to begin at byte 8, where 'x' ends, got byte 4",
        ),
        (two([0, 8], [0, 8]), "tensor 'y': expected to begin at byte 8"),
        (two([8, 16], [0, 8], data=15), "tensor 'x': .* truncated"),
        (two([0, 8], [12, 20], data=20), "tensor 'y': expected to begin at byte 8"),
        (two([2**62, 2**62 + 8], [0, 8]), "tensor 'x': expected to begin at byte 8"),
    ],
    ids=lambda case: "file" if isinstance(case, bytes) else case[:40],
)
def test_broken_file(put, content, match):
    refused(put(content), match)


def changed(parts, **changes):
    """A file whose weight has other parts; ... takes one away. Names as arguments: w__absmax."""
    new = {}
    for part, array in changes.items():
        name = part.replace("__", ".", 1)
        new[name] = array if array is ... or isinstance(array, tuple) else entry(array)
    return make({name: it for name, it in (parts | new).items() if it is not ...})


def renamed(parts, old, new):
    return make({name.replace(old, new): it for name, it in parts.items()})


F32, U8 = np.float32, np.uint8
STATE = r"w\.quant_state\.bitsandbytes__nf4"
NEAR = NF4.copy()
NEAR[3] = np.nextafter(NEAR[3], F32(1))

PLAIN_CASES = [
    ({"w": ...}, r"w: expected 300 bytes of codes for the shape \[6, 100\], got none; the check"),
    ({"w__absmax": ...}, r"w\.absmax: expected 10 values of F32, got none; the checkpoint is inco"),
    ({"w__quant_map": ...}, r"w\.quant_map: expected 16 values of F32, got none"),
    (
        {"w__quant_state.bitsandbytes__nf4": ...},
        rf"{STATE}: expected this tensor beside w\.absmax, w\.quant_map, got none",
    ),
    ({"w": np.zeros(299, U8)}, "w: expected 300 bytes of codes .* got 299"),
    ({"w": np.zeros(301, U8)}, "w: expected 300 bytes of codes .* got 301"),
    ({"w": np.zeros((6, 100), F32)}, "w: expected 300 bytes of codes .* got 2400"),
    ({"w": ("I64", [1], bytes(8))}, "w: expected codes as U8, I8, F16, BF16, F32, F64, got I64"),
    ({"w": ("BOOL", [300], bytes(300))}, "w: expected codes as U8, .* got BOOL"),
    ({"w": ("F4", [600], bytes(300))}, "w: expected codes as U8, .* got F4"),
    ({"w": np.zeros(0, U8)}, "w: expected 300 bytes of codes .* got 0"),
    ({"w__absmax": np.zeros(9, F32)}, r"w\.absmax: expected 10 values of F32, got the shape \[9\]"),
    ({"w__absmax": np.zeros(11, F32)}, r"w\.absmax: expected 10 values of F32"),
    ({"w__absmax": np.zeros(10, np.float16)}, r"w\.absmax: expected 10 .* shape \[10\] of F16"),
    ({"w__absmax": np.zeros(10, U8)}, r"w\.absmax: expected 10 values of F32, .* of U8"),
    ({"w__quant_map": NF4[:15]}, r"w\.quant_map: expected 16 values of F32"),
    ({"w__quant_map": NF4.astype(np.float16)}, r"w\.quant_map: expected 16 values of F32"),
    ({"w__quant_map": FP4}, r"w\.quant_map: expected the values of NF4, got \[0\.0, 0\.0052"),
    ({"w__quant_map": NEAR}, r"w\.quant_map: expected the values of NF4"),
    ({"w__quant_map": NF4 * F32("nan")}, r"w\.quant_map: expected the values of NF4"),
    (
        {"w__quant_state.bitsandbytes__nf4": np.zeros(4, F32)},
        f"{STATE}: expected JSON as U8, got F",
    ),
    ({"w__quant_state.bitsandbytes__nf4": np.zeros(4, U8)}, f"{STATE}: expected JSON in UTF-8"),
    ({"w__quant_state.bitsandbytes__nf4": np.zeros(0, U8)}, f"{STATE}: expected JSON in UTF-8"),
    ({"w__quant_state.bitsandbytes__nf4": np.full(4, 255, U8)}, f"{STATE}: expected JSON in UTF-8"),
    (
        {"w__quant_state.bitsandbytes__nf4": np.frombuffer(b"[1]", U8)},
        f"{STATE}: expected a JSON object, got list",
    ),
    (
        {"w__quant_state.bitsandbytes__nf4": np.frombuffer(b'{"a": 1, "a": 1}', U8)},
        f"{STATE}: expected every name once, got 'a' twice",
    ),
    (
        {"w__quant_state.bitsandbytes__nf4": np.frombuffer(b"[" * 9**5, U8)},
        f"{STATE}: expected JSON in UTF-8",
    ),
    (
        {"w__quant_state.bitsandbytes__fp4": np.frombuffer(b"{}", U8)},
        f"{STATE}: expected one quant_state of a weight, got those of fp4 and nf4",
    ),
    (
        {"w__nested_absmax": np.ones(1, F32)},
        f"{STATE}: expected nested_blocksize in the JSON, got n",
    ),
    ({"w__nested_quant_map": np.ones(256, F32)}, f"{STATE}: expected nested_blocksize in the JSON"),
]


@pytest.mark.parametrize(("parts", "match"), PLAIN_CASES, ids=lambda it: str(it)[:40])
def test_broken_weight(put, parts, match):
    refused(put(changed(weight(), **parts)), match)


NESTED_CASES = [
    ({"w__nested_absmax": ...}, r"w\.nested_absmax: expected 1 values of F32, got none"),
    ({"w__nested_quant_map": ...}, r"w\.nested_quant_map: expected 256 values of F32, got none"),
    ({"w__absmax": ...}, r"w\.absmax: expected 10 values of U8, got none"),
    ({"w__absmax": np.zeros(10, F32)}, r"w\.absmax: expected 10 values of U8, got .* of F32"),
    ({"w__absmax": np.zeros(11, U8)}, r"w\.absmax: expected 10 values of U8"),
    ({"w__nested_absmax": np.ones(2, F32)}, r"w\.nested_absmax: expected 1 values of F32"),
    ({"w__nested_absmax": np.ones(1, np.float16)}, r"w\.nested_absmax: expected 1 values of F32"),
    ({"w__nested_quant_map": np.ones(255, F32)}, r"w\.nested_quant_map: expected 256 values"),
    ({"w__nested_quant_map": np.ones(256, U8)}, r"w\.nested_quant_map: expected 256 values"),
]


@pytest.mark.parametrize(("parts", "match"), NESTED_CASES, ids=lambda it: str(it)[:40])
def test_broken_nested_weight(put, parts, match):
    refused(put(changed(weight(nested=True), **parts)), match)


STATE_CASES = [
    ({"quant_type": "fp4"}, "expected nf4 as the quant_type, got 'fp4'"),
    ({"quant_type": 4}, "expected nf4 as the quant_type, got 4"),
    ({"quant_type": ...}, "expected quant_type in the JSON, got none beside blocksize, dtype, sh"),
    ({"blocksize": ...}, "expected blocksize in the JSON"),
    ({"dtype": ...}, "expected dtype in the JSON"),
    ({"shape": ...}, "expected shape in the JSON"),
    *(
        ({"blocksize": size}, "expected a power of two from 32 to 4096 as the blocksize, got")
        for size in (0, -64, 1, 16, 48, 8192, 2**70, 64.0, "64", True, None, [64])
    ),
    *(
        ({"dtype": dtype}, "expected float16 or bfloat16 or float32 as the dtype, got")
        for dtype in ("float64", "int8", "", None, 16, ["float16"], {"a": 1})
    ),
    *(
        ({"shape": shape}, "expected a shape of 1 to 8 sizes, got")
        for shape in (None, [], 600, "600", [-6, 100], [6.0, 100], [True, 600], [1] * 8 + [600])
    ),
    ({"shape": [2**40, 2**40]}, "expected a shape of 1 to 8 sizes"),
    ({"shape": [0, 2**62]}, "expected a shape of 1 to 8 sizes"),
    ({"more": 1}, "expected quant_type, blocksize, dtype, shape in the JSON, got 'more' too"),
    ({"absmax": 1}, "expected quant_type, .*shape in the JSON, got 'absmax' too"),
    ({"nested_offset": 1.0}, "expected nested_blocksize in the JSON"),
]
NESTED_STATE_CASES = [
    ({"nested_blocksize": ...}, "expected nested_blocksize in the JSON"),
    ({"nested_dtype": ...}, "expected nested_dtype in the JSON"),
    ({"nested_offset": ...}, "expected nested_offset in the JSON"),
    *(
        (
            {"nested_blocksize": size},
            r"expected a power of two up to 2\*\*30 as the nested_blocksize, got",
        )
        for size in (0, -1, 100, 2**31, 256.0, "256", None, True)
    ),
    *(
        ({"nested_dtype": dtype}, "expected float32 as the nested_dtype, got")
        for dtype in ("float16", None, 32)
    ),
    *(
        ({"nested_offset": offset}, "expected a float32 as the nested_offset, got")
        for offset in (None, "0.1", [0.1], True, 1e39, -1e300, 10**400)
    ),
    ({"more": 1}, "expected quant_type, .*nested_offset in the JSON, got 'more' too"),
]


@pytest.mark.parametrize(
    ("nested", "state", "match"),
    [(False, *case) for case in STATE_CASES]
    + [(True, *case) for case in STATE_CASES[:4] + NESTED_STATE_CASES],
    ids=lambda it: str(it)[:50],
)
def test_broken_quant_state(put, nested, state, match):
    refused(put(make(weight(nested=nested, **state))), f"{STATE}: {match}")


def test_shape_and_counts_disagree(put):
    key = "w.quant_state.bitsandbytes__nf4"
    wide = weight() | {key: weight(size=(6, 200))[key]}
    refused(put(make(wide)), r"w: expected 600 bytes of codes for the shape \[6, 200\], got 300")
    fine = weight() | {key: weight(blocksize=32)[key]}
    refused(put(make(fine)), r"w\.absmax: expected 19 values of F32, got the shape \[10\]")


def test_quant_states_of_other_kinds(put):
    for kind in ("af4", "NF4", ""):
        refused(
            put(renamed(weight(), "bitsandbytes__nf4", f"bitsandbytes__{kind}")),
            rf"w\.quant_state\.bitsandbytes__{kind}: expected bitsandbytes__nf4 or bitsandbytes__f",
        )
    refused(
        put(renamed(weight(), "bitsandbytes__nf4", "bitsandbytes__fp4")),
        r"w\.quant_state\.bitsandbytes__fp4: expected fp4 as the quant_type, got 'nf4'",
    )


def test_the_broken_weight_is_named_among_others(put):
    parts = weight("a") | weight("b.c") | weight("d")
    parts["b.c.absmax"] = entry(np.zeros(3, F32))
    refused(put(make(parts)), r"b\.c\.absmax: expected 10")


def test_part_that_is_a_weight_itself(put):
    parts = weight() | weight("w.absmax")
    refused(put(make(parts)), r"w\.absmax: expected a part of a weight, .* with w\.absmax\.absmax,")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        bcy.open_bitsandbytes(tmp_path / "nothing.safetensors")


class BytesPath:
    """A path-like of bytes, as some are."""

    def __init__(self, name):
        self.name = name

    def __fspath__(self):
        return os.fsencode(self.name)


def test_path_like_of_bytes(tmp_path):
    path = tmp_path / "x.safetensors"
    bcy.save_bitsandbytes(BytesPath(path), {"x": np.arange(3)})
    assert bcy.open_bitsandbytes(BytesPath(path)).path == str(path)


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_what_no_file_is_called(path):
    with pytest.raises(InvalidProblem, match="path: expected a name that a file can have, got '"):
        bcy.open_bitsandbytes(path)
    with pytest.raises(InvalidProblem, match="path: expected a name that a file can have, got '"):
        bcy.save_bitsandbytes(path, {})


@pytest.mark.parametrize("path", [None, 3, b"model.safetensors"])
def test_what_is_no_path(path):
    with pytest.raises(InvalidProblem, match="path: expected a str or a path-like"):
        bcy.open_bitsandbytes(path)
    with pytest.raises(InvalidProblem, match="path: expected a str or a path-like"):
        bcy.save_bitsandbytes(path, {})


def use_all(path):
    """Whether a file is accepted, and then all that it gives is there."""
    try:
        model = bcy.open_bitsandbytes(path)
    except FileFormatError:
        return False
    for name in model:
        with contextlib.suppress(Unsupported):
            tensor = model[name]
            if isinstance(tensor, bcy.Nf4Tensor):
                assert tensor.dequantize().shape == tensor.shape
            else:
                tensor.tobytes()
    return True


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "fuzzed.safetensors"


WHOLE = make(weight("a") | weight("b", "fp4", nested=True) | {"x": entry(np.arange(5))}, {"k": "v"})


def test_the_fuzzed_file_is_whole(scratch):
    scratch.write_bytes(WHOLE)
    assert use_all(scratch)


@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=4))
def test_corrupt_bytes_never_crash(scratch, changes):
    content = bytearray(WHOLE)
    for at, value in changes:
        content[at] = value
    scratch.write_bytes(content)
    use_all(scratch)


@given(st.integers(0, len(WHOLE) - 1))
def test_every_truncated_file_is_refused(scratch, size):
    scratch.write_bytes(WHOLE[:size])
    assert not use_all(scratch)


sizes = st.one_of(
    st.integers(-3, 700), st.integers(), st.sampled_from([2**31, 2**61, 2**63, 2**64])
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    sizes,
    st.floats(),
    st.text(max_size=3),
    st.sampled_from(["nf4", "fp4", "float32", "float16", "F32", "U8", "BF16", "F4"]),
)
json_values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(st.data())
def test_headers_that_claim_anything_never_crash(scratch, data):
    parts = weight("a", nested=data.draw(st.booleans()))
    header = header_of(parts)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(header)))
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "name", "all"]))
        if field == "all":
            header[name] = data.draw(json_values)
        elif field == "name":
            header[data.draw(st.sampled_from(["b", "a.absmax", "", "b.absmax", "a"]))] = header.pop(
                name
            )
        elif isinstance(header[name], dict):
            values = st.one_of(json_values, st.lists(sizes, max_size=3))
            header[name] = header[name] | {field: data.draw(values)}
        if not header:
            break
    scratch.write_bytes(framed(header, b"".join(it for _, _, it in parts.values())))
    use_all(scratch)


FIELDS = ["quant_type", "blocksize", "dtype", "shape"]
NESTED_FIELDS = ["nested_blocksize", "nested_dtype", "nested_offset"]


@given(
    st.booleans(),
    st.dictionaries(
        st.sampled_from([*FIELDS, *NESTED_FIELDS, "x"]),
        st.one_of(json_values, st.lists(sizes, max_size=3), st.just(...)),
        max_size=3,
    ),
)
@example(True, {"nested_offset": 10**400})
@example(True, {"nested_blocksize": 2**31 - 1})
@example(False, {"shape": [600]})
def test_quant_states_that_claim_anything_never_crash(scratch, nested, state):
    scratch.write_bytes(make(weight("a", nested=nested, **state)))
    use_all(scratch)


# ---- writing -------------------------------------------------------------------------------------


def tensor_of(parts, put):
    return bcy.open_bitsandbytes(put(make(parts), "tensor.safetensors"))["w"]


def test_golden_files_are_written_byte_for_byte(tmp_path):
    """What the safetensors package wrote of a state_dict comes out the same."""
    path = tmp_path / "again.safetensors"
    for source in (LINEAR4BIT, GOLDEN / "llama_fp4" / "model.safetensors"):
        model = bcy.open_bitsandbytes(source)
        wide = {name for name in model if "_storage" in name}
        bcy.save_bitsandbytes(path, model)
        if not wide:
            assert path.read_bytes() == source.read_bytes()
        again = bcy.open_bitsandbytes(path)
        assert dict(again.types) == dict(model.types)
        assert dict(again.dtypes) == dict(model.dtypes)
        assert dict(again.metadata) == dict(model.metadata)
        for name in model:
            if isinstance(model[name], bcy.Nf4Tensor):
                np.testing.assert_array_equal(again[name].dequantize(), model[name].dequantize())
                np.testing.assert_array_equal(again[name].data, model[name].data)
            else:
                np.testing.assert_array_equal(again[name], model[name])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_safetensors_package_reads_it(put, tmp_path, kind, nested):
    safetensors = pytest.importorskip("safetensors.numpy")
    parts = weight(kind=kind, nested=nested)
    w = tensor_of(parts, put)
    bcy.save_bitsandbytes(tmp_path / "w.safetensors", {"w": w}, dtype="bfloat16")
    theirs = safetensors.load_file(tmp_path / "w.safetensors")
    assert set(theirs) == set(parts)
    for name, (_, shape, data) in parts.items():
        if "quant_state" in name:
            assert json.loads(theirs[name].tobytes()) == json.loads(data)
        else:
            assert theirs[name].tobytes() == data
            assert list(theirs[name].shape) == shape


@pytest.mark.parametrize("storage", ["uint8", "float16", "bfloat16", "float32"])
def test_quant_storage_is_written(put, tmp_path, storage):
    path, w = tmp_path / "w.safetensors", tensor_of(weight(), put)
    bcy.save_bitsandbytes(path, {"w": w}, quant_storage=storage)
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    size = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4}[storage]
    assert header["w"]["dtype"] == {"uint8": "U8", "bfloat16": "BF16"}.get(storage, f"F{8 * size}")
    assert header["w"]["shape"] == [300 // size, 1]
    np.testing.assert_array_equal(bcy.open_bitsandbytes(path)["w"].dequantize(), w.dequantize())


def test_dtype_and_metadata(put, tmp_path):
    path, w = tmp_path / "w.safetensors", tensor_of(weight(), put)
    bcy.save_bitsandbytes(path, {"w": w})
    assert dict(bcy.open_bitsandbytes(path).dtypes) == {"w": "bfloat16"}
    assert dict(bcy.open_bitsandbytes(path).metadata) == {"format": "pt"}
    bcy.save_bitsandbytes(path, {"w": bcy.quantize(np.eye(64, dtype=F32), "nf4")})
    assert dict(bcy.open_bitsandbytes(path).dtypes) == {"w": "float32"}
    bcy.save_bitsandbytes(path, {"w": w}, {"a": "größer"}, dtype=np.float32)
    assert dict(bcy.open_bitsandbytes(path).dtypes) == {"w": "float32"}
    assert dict(bcy.open_bitsandbytes(path).metadata) == {"format": "pt", "a": "größer"}
    bcy.save_bitsandbytes(path, {"w": w, "v": w}, dtype={"w": "bf16", "v": "f16"})
    with bcy.open_bitsandbytes(path) as model:
        assert dict(model.dtypes) == {"w": "bfloat16", "v": "float16"}
        bcy.save_bitsandbytes(path, {"w": model["w"]}, dtype=model.dtypes)
    assert dict(bcy.open_bitsandbytes(path).dtypes) == {"w": "bfloat16"}


def test_what_a_file_says_of_itself_is_kept(put, tmp_path):
    parts = weight(dtype="float32") | weight("v")
    model = bcy.open_bitsandbytes(put(make(parts, {"format": "pt", "author": "me"})))
    path = tmp_path / "again.safetensors"
    bcy.save_bitsandbytes(path, model)
    assert dict(bcy.open_bitsandbytes(path).metadata) == {"format": "pt", "author": "me"}
    assert dict(bcy.open_bitsandbytes(path).dtypes) == {"w": "float32", "v": "bfloat16"}
    bcy.save_bitsandbytes(path, model, {}, dtype="float16")
    assert dict(bcy.open_bitsandbytes(path).metadata) == {"format": "pt"}
    assert dict(bcy.open_bitsandbytes(path).dtypes) == {"w": "float16", "v": "float16"}


@given(
    st.integers(1, 9),
    st.integers(1, 300),
    st.sampled_from([32, 64, 256, 4096]),
    st.sampled_from(["nf4", "fp4"]),
    st.sampled_from([None, 1, 256]),
    st.integers(0, 2**32),
)
def test_any_weight_comes_back(scratch, nrows, ncols, block_size, codebook, nested, seed):
    rng = np.random.default_rng(seed)
    count = nrows * ncols
    blocks = -(-count // block_size)
    absmax = rng.uniform(0, 2, blocks).astype(np.float32)
    tables = None
    if nested:
        scales = rng.normal(0, 1, -(-blocks // nested)).astype(np.float32)
        table = rng.normal(0, 1, 256).astype(np.float32)
        tables = bcy.NestedAbsmax(table, scales, float(rng.normal()), nested)
        absmax = rng.integers(0, 256, blocks, np.uint8)
    data = rng.integers(0, 256, (count + 1) // 2, np.uint8)
    w = bcy.Nf4Tensor(data, absmax, (nrows, ncols), block_size, codebook, nested=tables)
    bcy.save_bitsandbytes(scratch, {"w": w})
    again = bcy.open_bitsandbytes(scratch)["w"]
    assert (again.shape, again.block_size, again.codebook) == (w.shape, block_size, w.codebook)
    np.testing.assert_array_equal(again.dequantize(), w.dequantize())


def test_row_pairs_are_converted(put, tmp_path):
    w = tensor_of(weight(size=(6, 128)), put)
    pairs = w.to_layout("row_pair")
    bcy.save_bitsandbytes(tmp_path / "w.safetensors", {"w": pairs})
    again = bcy.open_bitsandbytes(tmp_path / "w.safetensors")["w"]
    assert again.layout is bcy.Nf4Layout.BITSANDBYTES
    np.testing.assert_array_equal(again.data, np.asarray(w.data).reshape(-1))
    np.testing.assert_array_equal(again.dequantize(), w.dequantize())


def test_row_pairs_in_blocks_that_bitsandbytes_has_not(tmp_path):
    pairs = bcy.Nf4Tensor(
        np.zeros(40, np.uint8), np.ones(16, F32), (4, 20), block_size=5, layout="row_pair"
    )
    with pytest.raises(InvalidProblem, match=r"^w: block_size: "):
        bcy.save_bitsandbytes(tmp_path / "w.safetensors", {"w": pairs})
    assert os.listdir(tmp_path) == []


def test_arrays_of_any_kind(tmp_path):
    arrays = {
        "strided": np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::3],
        "transposed": np.arange(6, dtype=np.int16).reshape(2, 3).T,
        "big endian": np.arange(4, dtype=">f4"),
        "scalar": np.array(3.5),
        "empty": np.zeros((0, 3), np.float16),
        "bool": np.array([True, False, True]),
        "complex": np.array([1 + 2j], np.complex64),
        "brain": np.arange(5).astype(ml_dtypes.bfloat16),
        "float8": np.arange(5).astype(ml_dtypes.float8_e4m3fn),
        "größer": np.arange(3, dtype=np.uint64),
        "view": memoryview(b"abc"),
    }
    path = tmp_path / "arrays.safetensors"
    bcy.save_bitsandbytes(path, arrays)
    model = bcy.open_bitsandbytes(path)
    assert set(model) == set(arrays)
    for name, array in arrays.items():
        assert model[name].flags.aligned
        assert not model[name].flags.owndata  # each lies at a multiple of its size
        assert model[name].dtype == np.asarray(array).dtype.newbyteorder("=")
        assert model[name].shape == np.asarray(array).shape
        np.testing.assert_array_equal(model[name], np.asarray(array))


def test_the_safetensors_package_writes_the_same_bytes(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    kinds = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8", "?"]
    arrays = {f"{name}{kind}": np.arange(3).astype(kind) for kind in kinds for name in "ab"}
    arrays["brain"] = np.arange(3).astype(ml_dtypes.bfloat16)
    safetensors.save_file(arrays, tmp_path / "theirs", {"format": "pt"})
    bcy.save_bitsandbytes(tmp_path / "ours", arrays)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_arrays_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {
        "f32": torch.arange(6.0).reshape(2, 3),
        "bf16": torch.arange(6).to(torch.bfloat16),
        "i64": torch.arange(3),
        "bool": torch.tensor([True, False]),
    }
    w = bcy.Nf4Tensor(
        torch.arange(96, dtype=torch.uint8).view(torch.bfloat16), torch.ones(3), (2, 96)
    )
    path = tmp_path / "torch.safetensors"
    bcy.save_bitsandbytes(path, {**tensors, "w": w}, dtype=torch.bfloat16)
    model = bcy.open_bitsandbytes(path)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(model[name].astype(F32), tensor.to(torch.float32).numpy())
        assert model[name].shape == tuple(tensor.shape)
    assert model["w"].data.tolist() == list(range(96))
    with pytest.raises(InvalidProblem, match=r"^t: expected a C-contiguous array, got strides"):
        bcy.save_bitsandbytes(path, {"t": torch.ones(2, 3).T})
    with pytest.raises(InvalidProblem, match=r"^t: .* got complex128\[2\] on cpu; pass a NumPy"):
        bcy.save_bitsandbytes(path, {"t": torch.ones(2, dtype=torch.complex128)})


def test_arrays_of_jax(tmp_path):
    jnp = pytest.importorskip("jax.numpy")
    path = tmp_path / "jax.safetensors"
    bcy.save_bitsandbytes(path, {"x": jnp.arange(5, dtype=jnp.bfloat16)})
    np.testing.assert_array_equal(bcy.open_bitsandbytes(path)["x"].astype(F32), np.arange(5))


@pytest.mark.gpu
def test_weights_and_arrays_on_the_gpu(put, tmp_path):
    w = tensor_of(weight(nested=True), put)
    pairs = tensor_of(weight(size=(6, 128)), put).to_layout("row_pair")
    x = bcy.DeviceArray.from_host(np.arange(6, dtype=F32).reshape(2, 3))
    path = tmp_path / "gpu.safetensors"
    bcy.save_bitsandbytes(path, {"w": w.to("cuda"), "pairs": pairs.to("cuda"), "x": x})
    model = bcy.open_bitsandbytes(path)
    np.testing.assert_array_equal(model["w"].dequantize(), w.dequantize())
    np.testing.assert_array_equal(model["pairs"].dequantize(), pairs.dequantize())
    np.testing.assert_array_equal(model["x"], np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(
        bcy.dequantize(model["w"].to("cuda")).to_host(), model["w"].dequantize()
    )


def test_over_the_file_that_is_mapped(tmp_path):
    path = tmp_path / "model.safetensors"
    shutil.copy(LINEAR4BIT, path)
    model = bcy.open_bitsandbytes(path)
    before = {name: np.asarray(model[name].data) for name in model if name.endswith(".weight")}
    bcy.save_bitsandbytes(path, {"a": model["odd.weight"], "b": model["steps"]})
    assert set(bcy.open_bitsandbytes(path)) == {"a", "b"}
    for name, data in before.items():
        np.testing.assert_array_equal(model[name].data, data)
    np.testing.assert_array_equal(
        bcy.open_bitsandbytes(path)["a"].dequantize(), model["odd.weight"].dequantize()
    )


class Failing:
    """An array that can be described but not read a second time."""

    def __init__(self):
        self.asked = 0

    def __dlpack_device__(self):
        return (1, 0)

    def __dlpack__(self, **arguments):
        self.asked += 1
        if self.asked > 1:
            raise RuntimeError("the device is gone")
        return np.arange(3).__dlpack__()


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "model.safetensors"
    bcy.save_bitsandbytes(path, {"x": np.arange(3)})
    before = path.read_bytes()
    with pytest.raises(Exception, match="the device is gone"):
        bcy.save_bitsandbytes(path, {"a": np.arange(5), "x": Failing()})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]
    with pytest.raises(OSError, match="nothing"):
        bcy.save_bitsandbytes(tmp_path / "nothing" / "x", {"x": np.arange(3)})
    with pytest.raises(IsADirectoryError):
        bcy.save_bitsandbytes(tmp_path, {"x": np.arange(3)})
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    bcy.save_bitsandbytes(tmp_path / "x", {"x": np.arange(3)})
    (tmp_path / "y").write_bytes(b"")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_permissions_of_a_file_are_kept(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"")
    for mode in (0o400, 0o640, 0o666):
        path.chmod(mode)
        bcy.save_bitsandbytes(path, {"x": np.arange(3)})
        assert path.stat().st_mode & 0o777 == mode
        assert path.stat().st_size > 0


def test_a_symbolic_link_stays(tmp_path):
    link, folder = tmp_path / "link", tmp_path / "folder"
    folder.mkdir()
    link.symlink_to("folder/model")
    for size in (3, 4):  # what it leads to is made, then replaced
        bcy.save_bitsandbytes(link, {"x": np.arange(size)})
        assert link.is_symlink()
        assert bcy.open_bitsandbytes(folder / "model")["x"].size == size
    assert os.listdir(folder) == ["model"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        with pytest.raises(FileExistsError, match=f"{path}: expected .* got a pipe or device;"):
            bcy.save_bitsandbytes(path, {"x": np.arange(3)})
    with pytest.raises(IsADirectoryError, match=f"{tmp_path}: expected .* got a folder; ch"):
        bcy.save_bitsandbytes(tmp_path, {"x": np.arange(3)})
    assert pipe.is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_nothing_to_save(tmp_path):
    bcy.save_bitsandbytes(tmp_path / "x", {})
    assert dict(bcy.open_bitsandbytes(tmp_path / "x")) == {}


ARRAY = np.arange(3, dtype=F32)


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ([ARRAY], "^tensors: expected a mapping of names, got list"),
        ({1: ARRAY}, "^tensors: expected names as str .* got 1"),
        ({"__metadata__": ARRAY}, "^tensors: expected names as str other than __metadata__"),
        ({"\ud800": ARRAY}, "^tensors: expected names as str"),
        (
            {"x": ARRAY, "x.absmax": ARRAY},
            r"^x\.absmax: expected a name that is not that of a part",
        ),
        ({"x.quant_map": ARRAY}, r"^x\.quant_map: expected a name that is not that of a part"),
        ({"x.quant_state.bitsandbytes__nf4": ARRAY}, r"^x\.quant_state\.bitsandbytes__nf4: expect"),
        ({"w": ..., "w.absmax": ARRAY}, r"^w\.absmax: expected one tensor of this name, got two"),
        ({"w.absmax": ARRAY, "w": ...}, r"^w\.absmax: expected one tensor of this name, got two"),
        ({"w": ..., "w.nested_absmax": ARRAY}, r"^w\.nested_absmax: expected a name that is not"),
        ({"x": np.array(["a"])}, "^x: expected one of .*float32.* got str32; convert"),
        ({"x": np.array([None])}, "^x: expected one of .* got object"),
        ({"x": np.arange(3, dtype=np.complex128)}, "^x: expected one of .* got complex128"),
        ({"x": [1, 2]}, "^x: expected an Nf4Tensor or an array, got list"),
        ({"x": None}, "^x: expected an Nf4Tensor or an array, got NoneType"),
        ({"x": bcy.quantize(np.eye(32, dtype=F32), "Q8_0")}, "^x: .* got a GgufTensor; dequantize"),
    ],
    ids=lambda case: str(case)[:40],
)
def test_what_cannot_be_saved(put, tmp_path, tensors, match):
    w = tensor_of(weight(), put)
    if isinstance(tensors, dict):
        tensors = {name: w if it is ... else it for name, it in tensors.items()}
    with pytest.raises(InvalidProblem, match=match):
        bcy.save_bitsandbytes(tmp_path / "out", tensors)
    assert not (tmp_path / "out").exists()


def test_arrays_of_torch_that_no_file_has_are_named(tmp_path):
    torch = pytest.importorskip("torch")
    for tensor in (torch.eye(3).to_sparse(), torch.ones(3, device="meta"), torch.ones((1,) * 9)):
        with pytest.raises(InvalidProblem, match=r"^layer\.bias: "):
            bcy.save_bitsandbytes(tmp_path / "out", {"layer.bias": tensor})
    assert os.listdir(tmp_path) == []


# What would be refused when it is read is not written.
def test_array_of_too_many_dimensions(tmp_path, monkeypatch):
    monkeypatch.setattr("baracuda_cy.files.safetensors._MOST_DIMENSIONS", 9)
    bcy.save_bitsandbytes(tmp_path / "out", {"x": np.zeros((1,) * 9)})
    assert bcy.open_bitsandbytes(tmp_path / "out")["x"].ndim == 9
    with pytest.raises(InvalidProblem, match="x: expected at most 9 dimensions, got 10; reshape"):
        bcy.save_bitsandbytes(tmp_path / "out", {"x": np.zeros((1,) * 10)})


def test_header_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr("baracuda_cy.files.safetensors._LONGEST_HEADER", 1000)
    array, path = np.arange(3), tmp_path / "out"
    bcy.save_bitsandbytes(path, {"x": array}, {"about": "a" * 800})
    assert "x" in bcy.open_bitsandbytes(path)
    before = path.read_bytes()
    with pytest.raises(InvalidProblem, match=r"^tensors: .* a header of 1000 bytes, got 1\d+; w"):
        bcy.save_bitsandbytes(path, {"x": array}, {"about": "a" * 1000})
    assert path.read_bytes() == before


def test_what_is_no_array(tmp_path):
    with pytest.raises(NotAnArray):
        bcy.save_bitsandbytes(tmp_path / "out", {"x": object()})
    with pytest.raises(
        InvalidProblem, match=r"^x: expected a C-contiguous array, got strides \(2,"
    ):
        bcy.save_bitsandbytes(tmp_path / "out", {"x": memoryview(b"abcdef")[::2]})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtype": "float64"}, "^dtype: expected float16, bfloat16, float32, got float64 for 'w'"),
        ({"dtype": "int4"}, "^dtype: expected an ElementKind"),
        ({"dtype": {}}, "^dtype: expected the type of 'w' in the mapping, got none"),
        ({"dtype": {"w": "uint8"}}, "^dtype: expected float16"),
        (
            {"quant_storage": "float64"},
            "^quant_storage: expected uint8, float16, bfloat16, float32",
        ),
        ({"quant_storage": "bits"}, "^quant_storage: expected an ElementKind"),
        ({"metadata": {"a": 1}}, "^metadata: expected a mapping of str to str"),
        ({"metadata": {1: "a"}}, "^metadata: expected a mapping of str to str"),
        ({"metadata": 5}, "^metadata: expected a mapping of str to str, got 5"),
        ({"metadata": {"a": "\ud800"}}, "^metadata: expected a mapping of str to str"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(put, tmp_path, options, match):
    with pytest.raises(InvalidProblem, match=match):
        bcy.save_bitsandbytes(tmp_path / "out", {"w": tensor_of(weight(), put)}, **options)
    assert not (tmp_path / "out").exists()


def test_quant_storage_that_does_not_divide_the_bytes(put, tmp_path):
    w = tensor_of(weight(size=(5, 37)), put)  # 93 bytes
    with pytest.raises(InvalidProblem, match=r"^quant_storage: .* the 93 bytes of 'w', got bfloat"):
        bcy.save_bitsandbytes(tmp_path / "out", {"w": w}, quant_storage="bfloat16")


def test_a_file_pickles_as_its_path():
    model = bcy.open_bitsandbytes(LINEAR4BIT)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert again.path == str(LINEAR4BIT)
        assert dict(again.types) == dict(model.types)
        np.testing.assert_array_equal(again["steps"], model["steps"])


def test_the_type_of_a_weight_outlives_the_mapping(put, tmp_path):
    parts = weight(dtype="float32") | weight("v")
    model = bcy.open_bitsandbytes(put(make(parts)))
    assert (model["w"].dtype, model["v"].dtype) == (bcy.ElementKind.F32, bcy.ElementKind.BF16)
    path = tmp_path / "again.safetensors"
    bcy.save_bitsandbytes(path, dict(model))
    assert dict(bcy.open_bitsandbytes(path).dtypes) == {"w": "float32", "v": "bfloat16"}


def test_a_json_file_that_is_no_index(put):
    path = put(b'{"architectures": [], "dtype": "bfloat16"}', "config.json")
    refused(
        path, "expected the index of a checkpoint .* got JSON with architectures, dtype; open a"
    )


def test_an_array_that_changes_while_it_is_saved(put, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = torch.ones(3)

    class Late:  # asked for its shape first, for its values later
        asked = 0

        def __dlpack_device__(self):
            return 1, 0

        def __dlpack__(self, **arguments):
            self.asked += 1
            if self.asked > 1:
                x.resize_(5)
            return x.__dlpack__(**arguments)

    path = tmp_path / "out"
    bcy.save_bitsandbytes(path, {"x": ARRAY})
    before = path.read_bytes()
    with pytest.raises(InvalidProblem, match=r"^x: expected 12 bytes, as at first, got 20; leave"):
        bcy.save_bitsandbytes(path, {"x": Late()})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["out"]


def test_values_that_memory_does_not_hold_are_not_saved(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = torch._neg_view(torch.ones(3))
    with pytest.raises(
        InvalidProblem, match=r"^x: expected a tensor whose memory holds its values"
    ):
        bcy.save_bitsandbytes(tmp_path / "out", {"x": x})
    bcy.save_bitsandbytes(tmp_path / "out", {"x": x.resolve_neg()})
    assert bcy.open_bitsandbytes(tmp_path / "out")["x"].tolist() == [-1, -1, -1]


def test_float8_of_torch_goes_the_way_that_the_message_says(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn)
    with pytest.raises(
        InvalidProblem, match=r"x: .* float8_e4m3fn\[2\] on cpu; pass a NumPy array"
    ):
        bcy.save_bitsandbytes(tmp_path / "out", {"x": x})
    array = x.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    bcy.save_bitsandbytes(tmp_path / "out", {"x": array})
    assert bcy.open_bitsandbytes(tmp_path / "out")["x"].astype(F32).tolist() == [1, -2]


def test_a_folder_that_is_not_there(tmp_path):
    path = tmp_path / "no" / "model.safetensors"
    with pytest.raises(FileNotFoundError) as caught:
        bcy.save_bitsandbytes(path, {"x": ARRAY})
    assert caught.value.filename == str(path)
    assert "baracuda" not in str(caught.value)


def test_errors_of_a_tensor_keep_their_type(tmp_path):
    lent = np.zeros(512, np.uint8)
    workspace = bcy.Workspace(buffer=lent)
    lent.flags.writeable = False
    with pytest.raises(bcy.ReadOnlyArray, match=r"^x: array: expected a writable"):
        bcy.save_bitsandbytes(tmp_path / "out", {"x": workspace})
