# SPDX-License-Identifier: Apache-2.0
import enum
import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import reference
from problems import FORMATS

import baracuda_cy as bcy
from baracuda_cy import ElementKind, GgufBlockFormat, InvalidProblem, Unsupported, _cpu
from baracuda_cy.formats import OTHER_GGUF_TYPES

HEADERS = Path(__file__).parent.parent / "src" / "cuda" / "include" / "baracuda"


@pytest.mark.parametrize("name", FORMATS)
def test_table_is_that_of_the_kernels(name):
    block_format = GgufBlockFormat[name]
    assert _cpu.block_layout(block_format) == (block_format.block_size, block_format.type_size)
    header = (HEADERS / "formats" / f"{name.lower()}.cuh").read_text()
    (alignment,) = re.findall(r"kAlignment = (\d+)", header)
    assert block_format.alignment == int(alignment)


def test_table_is_complete():
    listed = re.findall(r"^BCY_FORMAT\((\w+),", (HEADERS / "formats.def").read_text(), re.MULTILINE)
    assert [f.name for f in GgufBlockFormat] == listed == FORMATS


@pytest.mark.parametrize("name", FORMATS)
def test_table_is_that_of_ggml(name):
    gguf = pytest.importorskip("gguf")
    block_format = GgufBlockFormat[name]
    theirs = gguf.GGMLQuantizationType[name]
    assert int(theirs) == block_format == reference.FORMATS[name][0]
    assert gguf.GGML_QUANT_SIZES[theirs] == (block_format.block_size, block_format.type_size)


def test_other_types_are_those_of_ggml():
    gguf = pytest.importorskip("gguf")
    theirs = {int(t): t.name for t in gguf.GGMLQuantizationType}
    for number, (name, elements, size) in OTHER_GGUF_TYPES.items():
        assert theirs.get(number, name) == name
        assert number not in set(GgufBlockFormat)
        if number in theirs and name != "Q8_1":  # gguf counts its 36 bytes as 40
            kind = gguf.GGMLQuantizationType(number)
            assert gguf.GGML_QUANT_SIZES[kind] == (elements, size)


@pytest.mark.parametrize("value", ["Q4_K", "q4_k", 12, np.int64(12), GgufBlockFormat.Q4_K])
def test_format_from_anything(value):
    assert GgufBlockFormat.of(value) is GgufBlockFormat.Q4_K


def test_format_from_another_library():
    gguf = pytest.importorskip("gguf")
    assert GgufBlockFormat.of(gguf.GGMLQuantizationType.Q6_K) is GgufBlockFormat.Q6_K
    with pytest.raises(Unsupported, match="IQ2_XS"):
        GgufBlockFormat.of(gguf.GGMLQuantizationType.IQ2_XS)


@pytest.mark.parametrize("value", [9, "q8_1", "IQ3_S", 35, np.int64(16)])
def test_known_but_unsupported_format(value):
    with pytest.raises(Unsupported, match=r"block_format: expected one of Q4_0.*; requantize"):
        GgufBlockFormat.of(value)


@pytest.mark.parametrize("value", [1000, "Q4_Z", None, 1.5, 12.0, b"Q4_K", ElementKind.I16])
def test_no_format(value):
    with pytest.raises(InvalidProblem, match="block_format: expected a GgufBlockFormat"):
        GgufBlockFormat.of(value)


@pytest.mark.parametrize(("ncols", "size"), [(0, 0), (256, 144), (4096, 2304)])
def test_row_bytes(ncols, size):
    assert GgufBlockFormat.Q4_K.row_bytes(ncols) == size


@pytest.mark.parametrize("ncols", [-256, 32, 255, 4097])
def test_row_bytes_of_broken_rows(ncols):
    with pytest.raises(InvalidProblem, match="ncols: expected a multiple of 256"):
        GgufBlockFormat.Q4_K.row_bytes(ncols)


def test_bits_per_weight():
    assert GgufBlockFormat.Q4_K.bits_per_weight == 4.5
    assert GgufBlockFormat.MXFP4.bits_per_weight == 4.25


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        ("float16", ElementKind.F16),
        ("F16", ElementKind.F16),
        ("half", ElementKind.F16),
        ("bf16", ElementKind.BF16),
        (np.float32, ElementKind.F32),
        (np.dtype("f4"), ElementKind.F32),
        (np.dtype(ml_dtypes.bfloat16), ElementKind.BF16),
        (ml_dtypes.bfloat16, ElementKind.BF16),
        (np.bool_, ElementKind.BOOL),
        (float, ElementKind.F64),
        (2, ElementKind.F16),
        (np.int64(2), ElementKind.F16),
        (ElementKind.U8, ElementKind.U8),
    ],
)
def test_element_kind_from_anything(dtype, kind):
    assert ElementKind.of(dtype) is kind


def test_element_kind_from_torch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for kind in ElementKind:
        if hasattr(torch, kind.dtype):
            assert ElementKind.of(getattr(torch, kind.dtype)) is kind


def test_element_kind_from_jax():
    jnp = pytest.importorskip("jax.numpy")
    assert ElementKind.of(jnp.bfloat16) is ElementKind.BF16
    assert ElementKind.of(jnp.zeros(1, jnp.float16).dtype) is ElementKind.F16


@pytest.mark.parametrize(
    "dtype", ["complex64", None, 99, 0, True, 1.0, object(), np.dtype(">f4"), GgufBlockFormat.Q4_0]
)
def test_no_element_kind(dtype):
    with pytest.raises(InvalidProblem, match="activation: expected"):
        ElementKind.of(dtype, "activation")


def test_names_of_another_enum_are_names():
    class Mine(enum.StrEnum):
        HALF = "float16"
        CODES = "nf4"

    assert bcy.ElementKind.of(Mine.HALF) is bcy.ElementKind.F16
    assert bcy.Nf4Descriptor(n=2, k=64, codebook=Mine.CODES).codebook is bcy.Codebook.NF4


def test_members_of_another_enum_are_refused():
    for codebook in (bcy.Nf4Layout.ROW_PAIR, True, 1.0, np.True_):
        with pytest.raises(InvalidProblem, match=r"codebook: expected a Codebook.*choose from NF4"):
            bcy.Nf4Descriptor(codebook=codebook)
    assert bcy.Nf4Descriptor(codebook=np.uint8(1)).codebook is bcy.Codebook.FP4


@pytest.mark.parametrize("kind", list(ElementKind))
def test_element_kind_names_its_dtype(kind):
    assert ElementKind.of(kind.dtype) is ElementKind.of(kind.name) is kind
    name = {"bfloat16": ml_dtypes.bfloat16}.get(kind.dtype, kind.dtype)
    assert kind.itemsize == np.dtype(name).itemsize


@pytest.mark.parametrize("member", [*GgufBlockFormat, *ElementKind])
def test_enum_repr_evaluates_back(member):
    assert eval(repr(member), vars(bcy)) is member
    assert json.loads(json.dumps(member)) == member.value


@pytest.mark.parametrize("ncols", [256.0, "256", None, True])
def test_row_bytes_of_no_integer(ncols):
    with pytest.raises(InvalidProblem, match="ncols: expected an integer"):
        bcy.GgufBlockFormat.Q4_K.row_bytes(ncols)
