# SPDX-License-Identifier: Apache-2.0
"""GGUF files: what the gguf package writes is read back; what is broken is named."""

import contextlib
import copy
import pickle
import struct
import sys

import ml_dtypes
import numpy as np
import pytest
from problems import FORMATS, Ggml, block_size, random_activations, random_weight

import baracuda_cy as bcy
from baracuda_cy import FileFormatError, InvalidProblem, Unsupported

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file with a tensor of every format, plain tensors and metadata of every type."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "test")
    writer.add_name("a model")
    writer.add_uint32("test.layers", 12)
    writer.add_float32("test.eps", 1e-5)
    writer.add_bool("test.flag", True)
    writer.add_int64("test.big", -(1 << 40))
    writer.add_array("test.ints", [1, 2, 3])
    writer.add_array("test.floats", [0.5, 0.25])
    writer.add_array("test.words", ["a", "", "größer"])
    for name in FORMATS:
        ncols = block_size(name) * 2
        data = random_weight(name, 6, ncols).reshape(6, -1)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[name])
    experts = random_weight("Q4_0", 6, 64).reshape(2, 3, -1)
    writer.add_tensor("experts.weight", experts, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("norm.weight", np.arange(7, dtype=np.float32))
    writer.add_tensor("half.weight", np.arange(8, dtype=np.float16).reshape(2, 4))
    writer.add_tensor(
        "brain.weight",
        np.arange(8, dtype=ml_dtypes.bfloat16).view(np.uint8).reshape(2, 8),
        raw_dtype=gguf.GGMLQuantizationType.BF16,
    )
    for kind in (np.int8, np.int16, np.int32, np.int64, np.float64):
        writer.add_tensor(np.dtype(kind).name, np.arange(5, dtype=kind))
    writer.add_tensor(
        "exotic.weight",
        np.zeros((2, 66), np.uint8),
        raw_dtype=gguf.GGMLQuantizationType.IQ2_XXS,
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_packed_tensor(path, name):
    ncols = block_size(name) * 2
    with bcy.open_gguf(path) as model:
        w = model[f"{name}.weight"]
    assert isinstance(w, bcy.GgufTensor)
    assert (w.format.name, w.shape, w.device) == (name, (6, ncols), "cpu")
    np.testing.assert_array_equal(np.asarray(w.data), random_weight(name, 6, ncols))
    theirs = Ggml().dequantize(name, random_weight(name, 6, ncols), w.shape)
    np.testing.assert_array_equal(bcy.dequantize(w), theirs)
    assert bcy.linear(random_activations(2, ncols), w).shape == (2, 6)


def test_experts(path):
    w = bcy.open_gguf(path)["experts.weight"]
    assert (w.shape, w.nrows, w.ncols) == ((2, 3, 64), 6, 64)


def test_plain_tensors(path):
    model = bcy.open_gguf(str(path))
    np.testing.assert_array_equal(model["norm.weight"], np.arange(7, dtype=np.float32))
    np.testing.assert_array_equal(model["half.weight"], np.arange(8).reshape(2, 4))
    assert model["half.weight"].dtype == np.float16
    assert model["brain.weight"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
        model["brain.weight"].astype(np.float32), np.arange(8).reshape(2, 4)
    )
    for kind in (np.int8, np.int16, np.int32, np.int64, np.float64):
        array = model[np.dtype(kind).name]
        assert array.dtype == kind
        np.testing.assert_array_equal(array, np.arange(5))


def test_nothing_can_be_written(path):
    model = bcy.open_gguf(path)
    with pytest.raises(ValueError, match="read-only"):
        model["norm.weight"][0] = 1
    with pytest.raises(ValueError, match="read-only"):
        model["Q4_0.weight"].data[0] = 1


def test_it_is_a_mapping(path):
    model = bcy.open_gguf(path)
    reader = gguf.GGUFReader(path)
    assert list(model) == [tensor.name for tensor in reader.tensors]
    assert len(model) == len(reader.tensors)
    assert model.types == {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert "norm.weight" in model
    assert "exotic.weight" in model
    assert "nothing" not in model
    assert model.get("nothing") is None
    with pytest.raises(KeyError, match="nothing"):
        model["nothing"]
    assert repr(model) == f"GgufFile({str(path)!r}, {len(model)} tensors)"


def test_a_file_equals_itself_alone(path):
    model, other = bcy.open_gguf(path), bcy.open_gguf(path)
    assert model == model
    assert model != other
    assert len({model, other, model}) == 2


def test_metadata(path):
    metadata = bcy.open_gguf(path).metadata
    reader = gguf.GGUFReader(path)
    theirs = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    assert dict(metadata) == theirs
    assert metadata["general.name"] == "a model"
    assert metadata["test.words"] == ["a", "", "größer"]
    assert metadata["test.big"] == -(1 << 40)
    with pytest.raises(TypeError):
        metadata["x"] = 1


def test_metadata_that_the_reader_of_the_gguf_package_does_not_give(tmp_path):
    """Arrays of arrays stay nested; text that is no UTF-8 is read as far as it is."""
    path = tmp_path / "odd.gguf"
    inner = [struct.pack("<IQ3B", 0, 3, 1, 2, 3), struct.pack("<IQ", 8, 1) + text(b"a\xffb")]
    pairs = [
        text("nested") + struct.pack("<IIQ", 9, 9, 2) + b"".join(inner),
        text("word") + struct.pack("<I", 8) + text(b"\xe2\x82"),
        text("none") + struct.pack("<IIQ", 9, 8, 0),
        text("no numbers") + struct.pack("<IIQ", 9, 6, 0),
        text("general.alignment") + struct.pack("<II", 4, 64),
    ]
    path.write_bytes(make([], pairs))
    assert list(bcy.open_gguf(path).metadata.items()) == [
        ("nested", [[1, 2, 3], ["a\N{REPLACEMENT CHARACTER}b"]]),
        ("word", "\N{REPLACEMENT CHARACTER}"),
        ("none", []),
        ("no numbers", []),
        ("general.alignment", 64),
    ]


def test_unsupported_type_is_named_only_when_asked_for(path):
    model = bcy.open_gguf(path)
    assert model.types["exotic.weight"] == "IQ2_XXS"
    with pytest.raises(Unsupported, match=r"exotic\.weight: expected one of .* got IQ2_XXS; requ"):
        model["exotic.weight"]


def test_tensors_outlive_the_file(path):
    with bcy.open_gguf(path) as model:
        w, norm = model["Q4_K.weight"], model["norm.weight"]
    assert "closed" in repr(model)
    with pytest.raises(InvalidProblem, match="closed"):
        model["Q4_K.weight"]
    del model
    assert bcy.dequantize(w).shape == (6, 512)
    assert norm.sum() == 21


def test_real_quantizer_round_trip(tmp_path):
    weight = np.random.default_rng(0).normal(0, 0.02, (16, 256)).astype(np.float32)
    packed = bcy.quantize(weight, "Q4_K")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "test")
    writer.add_tensor("w", packed.data, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    w = bcy.open_gguf(tmp_path / "m.gguf")["w"]
    np.testing.assert_array_equal(bcy.dequantize(w), bcy.dequantize(packed))


# ---- models in several files ---------------------------------------------------------------------


@pytest.fixture
def split(tmp_path):
    """The first of three files with a tensor each."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "test", split_max_tensors=1)
    writer.add_name("a model")
    for i in range(3):
        writer.add_tensor(f"blk.{i}.weight", np.full(4, i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "m-00001-of-00003.gguf"


def test_all_files_of_a_model_are_read(split):
    model = bcy.open_gguf(split)
    assert list(model) == ["blk.0.weight", "blk.1.weight", "blk.2.weight"]
    assert (model.path, model.metadata["general.name"]) == (str(split), "a model")
    assert set(model.types.values()) == {"F32"}
    for i in range(3):
        np.testing.assert_array_equal(model[f"blk.{i}.weight"], np.full(4, i))


def test_a_file_that_is_not_the_first(split):
    second = split.with_name("m-00002-of-00003.gguf")
    with pytest.raises(FileFormatError, match=r"m-00002-of.*'split\.no': expected 0, .* got 1;"):
        bcy.open_gguf(second)
    renamed = split.rename(split.with_name("model.gguf"))
    with pytest.raises(FileFormatError, match=r"ends in -00001-of-00003\.gguf, got 0; .* rename"):
        bcy.open_gguf(renamed)


def test_a_file_that_is_missing(split):
    third = split.with_name("m-00003-of-00003.gguf")
    third.unlink()
    with pytest.raises(FileFormatError, match=rf"file 3 of 3: expected {third}, got none; the mod"):
        bcy.open_gguf(split)


def test_files_that_do_not_belong_together(split):
    second, third = (split.with_name(f"m-0000{i}-of-00003.gguf") for i in (2, 3))
    third.write_bytes(second.read_bytes())
    with pytest.raises(FileFormatError, match=r"m-00003-of-.*'split\.no': expected 2, got 1;"):
        bcy.open_gguf(split)
    third.write_bytes(make())
    with pytest.raises(FileFormatError, match=r"m-00003-of-.*'split\.count': expected 3, got None"):
        bcy.open_gguf(split)
    third.write_bytes(make([tensor("blk.0.weight")], split_of(2, 3)))
    with pytest.raises(FileFormatError, match=r"m-00003-of-.*'blk\.0\.weight': expected one t"):
        bcy.open_gguf(split)


def test_a_model_that_was_merged_again(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(make([tensor()], split_of(0, 0)))
    assert list(bcy.open_gguf(path)) == ["w"]


@pytest.mark.gpu
def test_to_the_gpu(path):
    w = bcy.open_gguf(path)["Q4_K.weight"].to("cuda")
    assert w.device == "cuda:0"
    np.testing.assert_array_equal(
        bcy.dequantize(w).to_host(), bcy.dequantize(bcy.open_gguf(path)["Q4_K.weight"])
    )


# ---- broken files --------------------------------------------------------------------------------


def text(value):
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def tensor(name="w", shape=(32, 2), type_id=2, offset=0):
    """A tensor's entry; the fastest dimension comes first."""
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", type_id, offset)


def make(tensors=(), pairs=(), data=b"\0" * 64, version=3, magic=b"GGUF", counts=None):
    counts = counts or (len(tensors), len(pairs))
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


def split_of(number, count):
    return [
        text("split.no") + struct.pack("<IH", 2, number),
        text("split.count") + struct.pack("<IH", 2, count),
    ]


def broken(tmp_path, content, match):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=match) as caught:
        bcy.open_gguf(path)
    assert "broken.gguf" in str(caught.value)


def test_the_maker_of_broken_files_makes_whole_ones(tmp_path):
    path = tmp_path / "whole.gguf"
    path.write_bytes(make([tensor()], [text("k") + struct.pack("<IB", 0, 7)]))
    model = bcy.open_gguf(path)
    assert model["w"].shape == (2, 32)
    assert model.metadata == {"k": 7}
    assert gguf.GGUFReader(path).tensors[0].name == "w"


def test_truncated_data(path, tmp_path):
    content = path.read_bytes()
    last = list(bcy.open_gguf(path))[-1]
    # Alignment padding may follow the last tensor.
    broken(tmp_path, content[: len(content) - 96], f"tensor '{last}': .* it is truncated")
    broken(tmp_path, content[: len(content) // 2], "tensor '[^']+': .* it is truncated")


def test_truncated_header(path, tmp_path):
    content = path.read_bytes()
    for size in range(1, 3000, 37):
        broken(tmp_path, content[:size], "truncated|no GGUF file")


@pytest.mark.parametrize("seed", range(300))
def test_corrupt_bytes_never_crash(path, tmp_path, seed):
    """A file with noise in its header opens with what is left of it, or is refused by name."""
    rng = np.random.default_rng(seed)
    content = bytearray(path.read_bytes())
    for at in rng.integers(0, 2500, 3):
        content[at] = rng.integers(256)
    corrupt = tmp_path / "corrupt.gguf"
    corrupt.write_bytes(content)
    try:
        model = bcy.open_gguf(corrupt)
    except FileFormatError:
        return
    for name in model:
        with contextlib.suppress(Unsupported):
            model[name]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "expected a GGUF file, got one of 0 bytes; it is truncated"),
        (b"GG", "truncated"),
        (make(magic=b"GGML"), "no GGUF file"),
        (make(version=1), "expected version 2 or 3 .* got 1"),
        (make(version=3 << 24), "expected version 2 or 3"),
        (make(counts=(2**63, 0)), "tensor '': expected one tensor of this name, got two"),
        (make(counts=(0, 2**63)), "metadata"),
        (make([text("w")[:8] + b"w"], counts=(1, 0), data=b""), "tensor 'w'"),
        (make([struct.pack("<Q", 2**62)], counts=(1, 0)), "tensor at byte 24: .* truncated"),
        (make([tensor(name=b"\xff\xfe")]), "expected a name in UTF-8"),
        (make([tensor(), tensor()]), "tensor 'w': expected one tensor of this name, got two"),
        (make([tensor(shape=(32,) * 9)]), "tensor 'w': expected at most 8 dimensions, got 9"),
        (make([tensor(shape=(33, 2))]), r"tensor 'w': expected rows of a multiple of 32 .*Q4_0"),
        (make([tensor(shape=())]), "tensor 'w': expected rows of a multiple of 32"),
        (make([tensor(shape=(32, 2**60))]), "tensor 'w': expected a shape whose bytes"),
        (make([tensor(shape=(2**63, 2**63))]), "tensor 'w': expected a shape whose bytes"),
        (make([tensor(shape=(32, 5))]), "tensor 'w': expected 90 bytes at byte 96, got .* 160"),
        (make([tensor(offset=32)]), "tensor 'w': .* it is truncated"),
        (make([tensor(offset=2**63)]), "tensor 'w': .* it is truncated"),
        (make([tensor(offset=2)]), "tensor 'w': expected an offset that is a multiple of 32"),
        (make([tensor(type_id=99, offset=96)]), "tensor 'w': .* it is truncated"),
        (make(pairs=[text("k") + struct.pack("<I", 99)]), "metadata 'k': expected a metadata type"),
        (
            make(pairs=[text("k") + struct.pack("<IIQ", 9, 4, 2**61)]),
            f"metadata 'k': expected {2**61 * 4} bytes .* truncated",
        ),
        (
            make(pairs=[text("k") + struct.pack("<IIQ", 9, 8, 2**61)]),
            f"metadata 'k': expected {2**61 * 8} bytes .* truncated",
        ),
        (
            make(pairs=[text("k") + struct.pack("<IIQ", 9, 9, 2**60)]),
            f"metadata 'k': expected {2**60 * 8} bytes .* truncated",
        ),
        (
            make(pairs=[text("k") + struct.pack("<IIQ", 9, 99, 1)]),
            "metadata 'k': expected a metadata type, got 99",
        ),
        (
            make(pairs=[text("k") + struct.pack("<IIQ", 9, 99, 0)]),
            "metadata 'k': expected a metadata type, got 99",
        ),
        (
            make(pairs=[text("k") + struct.pack("<IIQ", 9, 8, 2) + text("a") + b"\xff" * 8]),
            f"metadata 'k': expected {2**64 - 1} bytes at byte .* truncated",
        ),
        (
            make(pairs=[text("k") + struct.pack("<IIQ", 9, 8, 2) + text("a" * 9)])[:70],
            "metadata 'k': expected .* at byte 74, got a file that ends at byte 70",
        ),
        (
            make(pairs=[text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 2000]),
            "metadata 'k': expected a metadata type, got 9",
        ),
        (
            make(pairs=[text("general.alignment") + struct.pack("<II", 4, 0)]),
            "metadata 'general.alignment': expected a power of two .*, got 0;",
        ),
        (
            make(pairs=[text("general.alignment") + struct.pack("<I", 8) + text("x")]),
            "metadata 'general.alignment': expected a power of two .*, got 'x';",
        ),
        (
            make(pairs=[text("general.alignment") + struct.pack("<II", 4, 4)]),
            "metadata 'general.alignment': expected a power of two .*, got 4;",
        ),
        (
            make(pairs=[text("general.alignment") + struct.pack("<II", 4, 24)]),
            "metadata 'general.alignment': expected a power of two .*, got 24;",
        ),
        (
            make(pairs=[text("general.alignment") + struct.pack("<IQ", 10, 32)]),
            "metadata 'general.alignment': expected a power of two .* as uint32, got 32;",
        ),
        (make(pairs=[text("k") + struct.pack("<IB", 0, 7)] * 2), "metadata 'k': expected one"),
        (
            make(pairs=[text("GGUF.version") + struct.pack("<IB", 0, 7)]),
            "metadata 'GGUF.version': expected one",
        ),
        (
            make(pairs=[text("split.count") + struct.pack("<If", 6, 3)]),
            r"metadata 'split\.count': expected a number of files, got 3\.0",
        ),
        (make(pairs=[text(b"\xff") + struct.pack("<IB", 0, 7)]), "expected a name in UTF-8"),
        (make([tensor(shape=(32, 0, 1 << 62))]), "tensor 'w': expected a shape whose bytes an"),
        (make([tensor(shape=(1 << 63, 0), type_id=0)]), "tensor 'w': expected a shape whose bytes"),
        (make([tensor(shape=(2**63 + 32, 0))]), "tensor 'w': expected a shape whose bytes"),
        (make([tensor(shape=(2**61, 0))]), "tensor 'w': expected a shape whose bytes .*float32"),
        (make([tensor(), tensor("v", (32,))]), "tensor 'w': expected an offset from 18, where 'v'"),
        (
            make([tensor("v"), tensor("w", offset=32)], data=bytes(128)),
            "tensor 'w': expected an offset from 36, where 'v' ends, got 32",
        ),
    ],
    ids=lambda case: "file" if isinstance(case, bytes) else case[:40],
)
def test_broken_file(tmp_path, content, match):
    broken(tmp_path, content, match)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        bcy.open_gguf(tmp_path / "nothing.gguf")
    with pytest.raises(OSError, match="directory"):
        bcy.open_gguf(tmp_path)


@pytest.mark.parametrize(("type_id", "name"), [(42, "Q2_0"), (99, "type 99")])
def test_type_that_the_gguf_package_does_not_know(tmp_path, type_id, name):
    path = tmp_path / "strange.gguf"
    strange = tensor(shape=(64,), type_id=type_id)
    path.write_bytes(make([strange, tensor("v", offset=32, shape=(32,))]))
    model = bcy.open_gguf(path)
    assert model.types["w"] == name
    with pytest.raises(Unsupported, match=rf"w: .*got {name}"):
        model["w"]
    assert model["v"].shape == (32,)


def test_without_the_gguf_package(monkeypatch, path):
    monkeypatch.delitem(sys.modules, "baracuda_cy.files.gguf_header", raising=False)
    monkeypatch.setitem(sys.modules, "gguf", None)  # importing it now fails
    with pytest.raises(Unsupported, match=r"open_gguf: .* pip install baracuda-cy\[gguf\]"):
        bcy.open_gguf(path)


def test_empty_tensor(tmp_path):
    path = tmp_path / "empty.gguf"
    widest = tensor("u", shape=(2**61 - 32, 0))
    path.write_bytes(make([tensor(shape=(32, 0)), tensor("v", (0,), type_id=0), widest], data=b""))
    model = bcy.open_gguf(path)
    assert (model["w"].shape, model["w"].nbytes) == ((0, 32), 0)
    assert model["v"].shape == (0,)
    assert model["u"].dequantize().shape == (0, 2**61 - 32)


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_what_no_file_is_called(path):
    with pytest.raises(InvalidProblem, match="path: expected a name that a file can have, got '"):
        bcy.open_gguf(path)


@pytest.mark.parametrize("path", [None, 3, b"model.gguf"])
def test_what_is_no_path(path):
    with pytest.raises(InvalidProblem, match="path: expected a str or a path-like"):
        bcy.open_gguf(path)


def test_a_file_pickles_as_its_path(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    model = bcy.open_gguf(path.name)
    monkeypatch.chdir("/")
    pickled = pickle.dumps(model)
    for again in (pickle.loads(pickled), copy.copy(bcy.open_gguf(path))):
        assert again.path == str(path)
        assert dict(again.types) == dict(model.types)
        np.testing.assert_array_equal(again["norm.weight"], model["norm.weight"])


def test_experts_of_a_file(path):
    experts = bcy.open_gguf(path)["experts.weight"]
    np.testing.assert_array_equal(experts[1].dequantize(), experts.dequantize()[1])
    assert np.shares_memory(experts[1].data, experts.data)
