# SPDX-License-Identifier: Apache-2.0
import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest

import baracuda_cy as bcy
from baracuda_cy import ArchSku, BackendKind, ElementKind, GgufBlockFormat, InvalidProblem

GUARANTEE = bcy.PrecisionGuarantee(math_precision="INT8", accumulator="float32", deterministic=True)
SKU = bcy.KernelSku(
    category="QUANTIZATION",
    op="GGUF_MMVQ",
    element="float16",
    aux_element="uint8",
    output_element="float32",
    block_format="Q4_K",
    activations="staged",
    arch="CPU",
    isa="avx2",
    backend="CPU",
    precision_guarantee=GUARANTEE,
)
VALUES = [
    bcy.PlanPreference(),
    bcy.PlanPreference(activations="float", threads=3),
    GUARANTEE,
    SKU,
    bcy.GgufMmvqDescriptor(nrows=2, ncols=256, block_format="Q4_K", activation="bfloat16"),
    bcy.GgufMmvqMultiMDescriptor(nrows=2, ncols=256, m=8, block_format=12, output="float16"),
    bcy.GgufDequantizeDescriptor(nrows=2, ncols=256, w_start_byte_offset=144),
    bcy.PlanPreference(overlap=True, bit_stable_across_hardware=True),
    bcy.Nf4Descriptor(n=2, k=256, codebook="fp4", layout="row_pair", nested=True, bias=True),
    bcy.Nf4MmvqMultiMDescriptor(base=bcy.Nf4Descriptor(n=2, k=64, activation="bfloat16"), m=8),
]
IDS = [type(value).__name__ for value in VALUES]


@pytest.mark.parametrize("value", VALUES, ids=IDS)
def test_repr_evaluates_back(value):
    assert eval(repr(value), vars(bcy)) == value


@pytest.mark.parametrize("value", VALUES, ids=IDS)
def test_equal_values_hash_equally(value):
    other = copy.deepcopy(value)
    assert other == value
    assert hash(other) == hash(value)
    assert len({value, other}) == 1


@pytest.mark.parametrize("value", VALUES, ids=IDS)
def test_pickles(value):
    assert pickle.loads(pickle.dumps(value)) == value


@pytest.mark.parametrize("value", VALUES, ids=IDS)
def test_is_frozen(value):
    name = next(iter(value.to_dict()))
    with pytest.raises(AttributeError):
        setattr(value, name, 1)
    with pytest.raises((AttributeError, TypeError)):
        value.something_else = 1


@pytest.mark.parametrize("value", VALUES, ids=IDS)
def test_is_keyword_only(value):
    with pytest.raises(TypeError):
        type(value)(1)


@pytest.mark.parametrize("value", VALUES, ids=IDS)
def test_to_dict_is_json(value):
    assert json.loads(json.dumps(value.to_dict())) == value.to_dict()


def test_sku_to_dict():
    said = SKU.to_dict()
    assert said["block_format"] == "Q4_K"
    assert said["layout"] is None
    assert said["precision_guarantee"]["deterministic"] is True
    assert said["precision_guarantee"]["batch_invariant"] is False


def test_descriptor_defaults_are_the_documented_ones():
    d = bcy.GgufMmvqMultiMDescriptor()
    assert (d.nrows, d.ncols, d.m, d.w_start_byte_offset) == (0, 0, 1, 0)
    assert d.block_format is GgufBlockFormat.Q8_0
    assert (d.activation, d.output) == (ElementKind.F32, ElementKind.F32)
    assert bcy.GgufMmvqMultiMDescriptor(activation="float16").output is ElementKind.F32
    assert bcy.GgufMmvqDescriptor(activation="float16").output is ElementKind.F16
    assert bcy.GgufDequantizeDescriptor().output is ElementKind.F32
    assert bcy.GgufDequantizeDescriptor(output=None).output is ElementKind.F32
    assert bcy.GgufMmvqMultiMDescriptor(activation="float16", output=None).output is ElementKind.F32


def test_nf4_descriptor_defaults_are_the_documented_ones():
    d = bcy.Nf4Descriptor()
    assert (d.n, d.k, d.block_size, d.nested, d.bias) == (0, 0, 64, False, False)
    assert (d.codebook, d.layout) == (bcy.Codebook.NF4, bcy.Nf4Layout.BITSANDBYTES)
    assert (d.activation, d.output) == (ElementKind.F16, ElementKind.F16)
    assert bcy.Nf4Descriptor(activation="float32").output is ElementKind.F32
    assert bcy.Nf4Descriptor(output="float32").activation is ElementKind.F16
    many = bcy.Nf4MmvqMultiMDescriptor()
    assert (many.base, many.m) == (d, 1)


def test_nf4_descriptors_accept_names_and_numbers():
    d = bcy.Nf4Descriptor(n=np.int64(4), k=np.uint8(64), codebook=1, layout="row_pair")
    assert d == bcy.Nf4Descriptor(n=4, k=64, codebook="FP4", layout=bcy.Nf4Layout.ROW_PAIR)
    assert type(d.n) is type(d.k) is int


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"n": 1.0}, "n"),
        ({"k": "64"}, "k"),
        ({"block_size": None}, "block_size"),
        ({"codebook": "nf3"}, "codebook"),
        ({"layout": "column"}, "layout"),
        ({"nested": 1}, "nested"),
        ({"bias": None}, "bias"),
        ({"activation": "float8"}, "activation"),
        ({"output": object()}, "output"),
    ],
)
def test_nf4_fields_of_another_kind(fields, name):
    with pytest.raises(InvalidProblem, match=f"^{name}: expected"):
        bcy.Nf4Descriptor(**fields)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"base": None}, "^base: expected an Nf4Descriptor, got NoneType"),
        ({"base": bcy.GgufMmvqDescriptor()}, "^base: expected an Nf4Descriptor, got GgufMmvq"),
        ({"m": 1.5}, "^m: expected an integer"),
        ({"m": True}, "^m: expected an integer, got True"),
    ],
)
def test_fields_of_a_nested_descriptor(fields, match):
    with pytest.raises(InvalidProblem, match=match):
        bcy.Nf4MmvqMultiMDescriptor(**fields)


@pytest.mark.parametrize("m", [3, np.int64(3), np.uint8(3)])
def test_sizes_are_integers(m):
    d = bcy.GgufMmvqDescriptor(m=m)
    assert d.m == 3
    assert type(d.m) is int


@pytest.mark.parametrize("m", [3.0, "3", None])
def test_sizes_that_are_no_integers(m):
    with pytest.raises(InvalidProblem, match="m: expected an integer"):
        bcy.GgufMmvqDescriptor(m=m)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"block_format": "Q9"}, "block_format"),
        ({"activation": "float8"}, "activation"),
        ({"output": object()}, "output"),
    ],
)
def test_fields_of_another_kind(fields, name):
    with pytest.raises(InvalidProblem, match=f"^{name}: expected"):
        bcy.GgufMmvqDescriptor(**fields)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"activations": "int8"}, "activations"),
        ({"threads": 0}, "threads"),
        ({"threads": -1}, "threads"),
        ({"threads": 1.5}, "threads"),
        ({"threads": 2**40}, "threads"),
        ({"overlap": 1}, "overlap"),
        ({"bit_stable_across_hardware": 1}, "bit_stable_across_hardware"),
        ({"bit_stable_across_hardware": None}, "bit_stable_across_hardware"),
    ],
)
def test_preference_of_another_kind(fields, name):
    with pytest.raises(InvalidProblem, match=f"^{name}: expected"):
        bcy.PlanPreference(**fields)


@pytest.mark.parametrize(
    "fields", [{"math_precision": "F31"}, {"accumulator": "x"}, {"deterministic": 1}]
)
def test_guarantee_of_another_kind(fields):
    values = {"math_precision": "F32", "accumulator": "F32", **fields}
    with pytest.raises(InvalidProblem, match=f"^{next(iter(fields))}: expected"):
        bcy.PrecisionGuarantee(**values)


def test_flags_are_promised_only_when_said():
    plain = bcy.PrecisionGuarantee(math_precision="F32", accumulator="F32")
    flags = {name: value for name, value in plain.to_dict().items() if isinstance(value, bool)}
    assert flags == dict.fromkeys(flags, False)
    assert len(flags) == 4


def test_architecture_of_a_gpu_not_known_here():
    arch = ArchSku(133)
    assert arch.name == "SM133"
    assert ArchSku(133) is arch
    assert eval(repr(arch), vars(bcy)) is arch
    assert pickle.loads(pickle.dumps(arch)) is arch
    assert repr(ArchSku.SM90) == "ArchSku.SM90"
    with pytest.raises(ValueError, match="7"):
        ArchSku(7)


@pytest.mark.parametrize(
    "enum",
    [
        ArchSku,
        BackendKind,
        bcy.Codebook,
        bcy.MathPrecision,
        bcy.Nf4Layout,
        bcy.OpCategory,
        bcy.QuantizeKind,
    ],
)
def test_enums_by_name_and_value(enum):
    for member in enum.__members__.values():
        assert enum(member.name.lower()) is enum(int(member)) is member
        assert eval(repr(member), vars(bcy)) is member


def test_the_numbers_users_of_the_field_know():
    assert bcy.QuantizeKind.GGUF_MMVQ == 27
    assert bcy.QuantizeKind.GGUF_DEQUANTIZE == 26
    assert GgufBlockFormat.Q4_K == 12
    assert bcy.QuantizeKind.NF4_MMVQ == 28
    assert (bcy.Codebook.NF4, bcy.Codebook.FP4) == (0, 1)
    assert (bcy.Nf4Layout.BITSANDBYTES, bcy.Nf4Layout.ROW_PAIR) == (0, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activations", "int8"),
        ("isa", 4),
        ("layout", 1),
        ("epilogue", b"bias"),
        ("precision_guarantee", None),
    ],
)
def test_a_sku_says_only_what_it_can(field, value):
    sku = bcy.quantize(np.eye(32, dtype=np.float32), "Q8_0").plan().sku
    with pytest.raises(InvalidProblem, match=f"{field}: expected"):
        dataclasses.replace(sku, **{field: value})


@pytest.mark.parametrize("threads", [0, -1, 1025, 2**70])
def test_threads_out_of_range(threads):
    with pytest.raises(InvalidProblem, match="threads: expected 1 to 1024"):
        bcy.PlanPreference(threads=threads)


def test_dictionaries_give_the_values_back():
    w = bcy.quantize(np.eye(32, dtype=np.float32), "Q8_0")
    n = bcy.quantize(np.eye(32, dtype=np.float32), "nf4")
    for value in (
        w.plan(2).sku,
        n.plan(2).sku,
        w.plan(2).descriptor,
        n.plan(2, "float16").descriptor,
        n.plan(2).descriptor.base,
        w.plan(2).precision_guarantee,
        w.plan(2).preference,
    ):
        assert type(value)(**json.loads(json.dumps(value.to_dict()))) == value


def test_architecture_of_a_gpu_not_known_here_by_its_name():
    arch = ArchSku("sm134")
    assert arch is ArchSku(134) is ArchSku("SM134")
    assert ArchSku(arch.name) is arch
    for name in ("SM", "SM7", "SM07", "SM90a", "134"):
        with pytest.raises(ValueError, match=name):
            ArchSku(name)
