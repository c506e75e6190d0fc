# SPDX-License-Identifier: Apache-2.0
"""Bad input to NF4 and FP4 gets a typed error naming what was wrong, and changes nothing."""

import numpy as np
import pytest
from problems import SHAPE, Backend, Nf4Weight, random_activations, refused

import baracuda_cy as bcy
from baracuda_cy import InvalidProblem, NotAnArray, ReadOnlyArray

N, K, M = 8, 100, 3  # 13 blocks of 64, the last one short, across the ends of rows
BLOCKS, BYTES = 13, 400


@pytest.fixture(params=["plain", "nested"])
def weight(request):
    return Nf4Weight(N, K, nested=4 if request.param == "nested" else None)


@pytest.fixture
def plan(weight):
    return weight.plan("cpu", M)


@pytest.fixture
def arguments(weight):
    """A call that is right, in parts."""
    data, absmax, nested = weight.parts(Backend("cpu"))
    return {
        "weight": data,
        "absmax": absmax,
        "nested": nested,
        "activations": random_activations(M, K),
        "output": np.full((M, N), 77, np.float32),
    }


def select(kind, descriptor, match, preference=None, error=InvalidProblem):
    with pytest.raises(error, match=match) as caught:
        kind.select("cpu", descriptor, preference)
    assert SHAPE.match(str(caught.value)), caught.value


def test_the_right_call_is_right(plan, arguments):
    plan.run(**arguments)
    assert (arguments["output"] != 77).all()


# ---- the descriptor ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"n": -1}, r"n: expected 0 to 2\*\*63 - 1, got -1"),
        ({"k": -1}, r"k: expected 0 to 2\*\*63 - 1, got -1"),
        ({"n": 2**63}, r"n: expected 0 to 2\*\*63 - 1"),
        ({"n": 2**40, "k": 2**40}, "n: expected a matrix whose bytes an int64 counts"),
        ({"block_size": 0}, "block_size: expected a power of two from 32 to 4096 .*got 0"),
        ({"block_size": -64}, "block_size: expected a power of two from 32 to 4096"),
        ({"block_size": 16}, "block_size: expected a power of two from 32 to 4096"),
        ({"block_size": 48}, "block_size: expected a power of two from 32 to 4096"),
        ({"block_size": 8192}, "block_size: expected a power of two from 32 to 4096"),
        ({"block_size": 2**70}, "block_size: expected a power of two from 32 to 4096"),
        ({"layout": "row_pair", "block_size": 0}, r"block_size: expected 1 to 2\*\*31 - 1, got 0"),
        ({"layout": "row_pair", "block_size": 2**31}, "block_size: expected 1 to"),
        ({"layout": "row_pair", "n": 7}, "n: expected an even number of rows .*got 7"),
        ({"layout": "row_pair", "k": 100}, r"k: expected a multiple of 64 \(block_size\).*got 100"),
    ],
)
def test_sizes_of_a_descriptor(fields, match):
    descriptor = bcy.Nf4Descriptor(**{"n": 8, "k": 128, **fields})
    select(bcy.Nf4MmvqPlan, descriptor, match)
    select(bcy.Nf4DequantizePlan, descriptor, match)
    select(bcy.Nf4MmvqMultiMPlan, bcy.Nf4MmvqMultiMDescriptor(base=descriptor, m=2), match)


@pytest.mark.parametrize(
    ("m", "match"),
    [
        (-1, "m: expected 0 or more, got -1"),
        (2**63, r"m: expected at most 2\*\*63 - 1"),
        (2**61, "m: expected an array whose bytes an int64 counts"),
    ],
)
def test_tokens_of_a_descriptor(m, match):
    descriptor = bcy.Nf4MmvqMultiMDescriptor(base=bcy.Nf4Descriptor(n=8, k=64), m=m)
    select(bcy.Nf4MmvqMultiMPlan, descriptor, match)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"activation": "float64"}, "activation: expected float32, float16 or bfloat16"),
        ({"activation": "int8"}, "activation: expected float32, float16 or bfloat16"),
        ({"activation": "float32", "output": "float64"}, "output: expected float32, float16 or"),
        (
            {"activation": "float32", "output": "float16"},
            r"output: expected float32 \(the activation's type\) or float32, got float16",
        ),
        (
            {"activation": "float16", "output": "bfloat16"},
            r"output: expected float16 \(the activation's type\) or float32, got bfloat16",
        ),
    ],
)
def test_types_of_a_descriptor(fields, match):
    descriptor = bcy.Nf4Descriptor(n=8, k=64, **fields)
    select(bcy.Nf4MmvqPlan, descriptor, match)
    select(bcy.Nf4MmvqMultiMPlan, bcy.Nf4MmvqMultiMDescriptor(base=descriptor), match)


def test_types_of_dequantize():
    descriptor = bcy.Nf4Descriptor(n=8, k=64, output="float64")
    select(bcy.Nf4DequantizePlan, descriptor, "output: expected float32, float16 or bfloat16")
    # What multiplies nothing has no activations to agree with.
    descriptor = bcy.Nf4Descriptor(n=8, k=64, activation="float16", output="bfloat16")
    bcy.Nf4DequantizePlan.select("cpu", descriptor)


def test_descriptors_of_another_kind():
    one = bcy.Nf4Descriptor(n=8, k=64)
    many = bcy.Nf4MmvqMultiMDescriptor(base=one)
    select(bcy.Nf4MmvqPlan, many, "desc: expected an Nf4Descriptor, got Nf4MmvqMultiMDescriptor")
    select(bcy.Nf4DequantizePlan, many, "desc: expected an Nf4Descriptor")
    select(bcy.Nf4MmvqMultiMPlan, one, "desc: expected an Nf4MmvqMultiMDescriptor")
    select(bcy.Nf4MmvqPlan, bcy.GgufMmvqDescriptor(), "desc: expected an Nf4Descriptor")
    select(bcy.Nf4MmvqPlan, None, "desc: expected an Nf4Descriptor, got NoneType")
    select(bcy.GgufMmvqPlan, one, "desc: expected a GgufMmvqDescriptor")


def test_staged_activations_are_not_to_be_had():
    descriptor = bcy.Nf4Descriptor(n=8, k=64)
    staged = bcy.PlanPreference(activations="staged")
    match = (
        'preference: expected activations="float" or None for an Nf4Mmvq.*got activations="staged"'
    )
    select(bcy.Nf4MmvqPlan, descriptor, match, staged)
    many = bcy.Nf4MmvqMultiMDescriptor(base=descriptor)
    select(bcy.Nf4MmvqMultiMPlan, many, match, staged)
    bcy.Nf4MmvqPlan.select("cpu", descriptor, bcy.PlanPreference(activations="float"))
    with pytest.raises(InvalidProblem, match=match):
        bcy.linear(random_activations(2, 64), Nf4Weight(8, 64).tensor(), preference=staged)
    select(bcy.Nf4MmvqPlan, descriptor, "preference: expected a PlanPreference", "float")


def test_devices_that_are_none():
    descriptor = bcy.Nf4Descriptor(n=8, k=64)
    for device in ("gpu", "", None, 1.5):
        with pytest.raises(InvalidProblem, match="device: expected"):
            bcy.Nf4MmvqPlan.select(device, descriptor)


# ---- codes and scales ----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, BYTES - 1, BYTES + 1, 2 * BYTES])
def test_length_of_the_codes(plan, arguments, length):
    match = rf"weight: expected exactly 400 bytes \(NF4 8x100, .*\), got {length} in uint8"
    refused(plan, arguments, InvalidProblem, match, weight=np.zeros(length, np.uint8))


def test_length_of_stored_codes(plan, arguments):
    match = "weight: expected exactly 400 bytes .*, got 404 in float32"
    refused(plan, arguments, InvalidProblem, match, weight=np.zeros(101, np.float32))


@pytest.mark.parametrize("length", [0, BLOCKS - 1, BLOCKS + 1, N * 2])
def test_length_of_the_scales(plan, arguments, length):
    dtype = arguments["absmax"].dtype
    match = rf"absmax: expected exactly 13 elements \(NF4 8x100, .*\), got {length} in {dtype}"
    refused(plan, arguments, InvalidProblem, match, absmax=np.zeros(length, dtype))


@pytest.mark.parametrize(
    ("dtype", "match"),
    [
        (np.float64, "weight: expected uint8, or bytes stored as float32, float16 or bfloat16"),
        (np.int32, "weight: expected uint8, or bytes stored as"),
        (bool, "weight: expected uint8, or bytes stored as"),
        (np.uint16, "weight: expected uint8, or bytes stored as"),
    ],
)
def test_type_of_the_codes(plan, arguments, dtype, match):
    data = np.zeros(BYTES // np.dtype(dtype).itemsize, dtype)
    refused(plan, arguments, InvalidProblem, match, weight=data)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int8, np.int32])
def test_type_of_the_scales(plan, arguments, dtype):
    kind = arguments["absmax"].dtype
    match = f"absmax: expected {kind}, got {np.dtype(dtype)}"
    refused(plan, arguments, InvalidProblem, match, absmax=np.zeros(BLOCKS, dtype))


def test_scales_of_the_other_kind(plan, arguments, weight):
    kinds = ("float32", "uint8") if weight.nested is None else ("uint8", "float32")
    match = f"absmax: expected {kinds[0]}, got {kinds[1]}.* uint8 only where it is nested"
    refused(plan, arguments, InvalidProblem, match, absmax=np.zeros(BLOCKS, kinds[1]))


def test_codes_and_scales_that_are_not_contiguous(plan, arguments):
    match = r"weight: expected one contiguous run of bytes, got strides \(2\)"
    refused(plan, arguments, InvalidProblem, match, weight=np.zeros(2 * BYTES, np.uint8)[::2])
    match = "absmax: expected one contiguous run of bytes, got strides"
    wide = np.zeros((BLOCKS, 2), arguments["absmax"].dtype)[:, 0]
    refused(plan, arguments, InvalidProblem, match, absmax=wide)
    backwards = np.zeros(BLOCKS, arguments["absmax"].dtype)[::-1]
    refused(plan, arguments, InvalidProblem, match, absmax=backwards)


def test_scales_that_are_misaligned():
    weight = Nf4Weight(N, K)
    plan, y = weight.plan("cpu", M), np.zeros((M, N), np.float32)
    raw = np.zeros(4 * BLOCKS + 1, np.uint8)
    absmax = raw[1:].view(np.float32)
    with pytest.raises(InvalidProblem, match="absmax: expected an address that is a multiple of 4"):
        plan.run(weight.data, random_activations(M, K), y, absmax=absmax)
    with pytest.raises(InvalidProblem, match="absmax: expected an address that is a multiple of 4"):
        bcy.Nf4Tensor(weight.data, absmax, (N, K))


@pytest.mark.parametrize("name", ["weight", "absmax", "activations", "output", "bias"])
def test_objects_that_are_no_arrays(arguments, weight, name):
    plan = weight.plan("cpu", M, bias=True)
    arguments["bias"] = np.zeros(N, np.float32)
    refused(plan, arguments, NotAnArray, f"{name}: expected an array", **{name: object()})


def test_scales_that_are_not_given(plan, arguments):
    match = "absmax: expected an array beside codes that are no Nf4Tensor, got None"
    refused(plan, arguments, InvalidProblem, match, absmax=None)


# ---- nesting -------------------------------------------------------------------------------------


def test_nesting_that_was_not_asked_for():
    weight, nested = Nf4Weight(N, K), Nf4Weight(N, K, nested=4)
    data, absmax, _ = weight.parts(Backend("cpu"))
    arguments = {
        "weight": data,
        "absmax": absmax,
        "nested": nested.parts(Backend("cpu"))[2],
        "activations": random_activations(M, K),
        "output": np.full((M, N), 77, np.float32),
    }
    match = "nested: expected None, as descriptor.nested is False, got NestedAbsmax"
    refused(weight.plan("cpu", M), arguments, InvalidProblem, match)


@pytest.mark.parametrize("value", [None, 3, {"code": 1}, (np.zeros(256, np.float32),)])
def test_nesting_that_is_missing(value):
    weight = Nf4Weight(N, K, nested=4)
    data, absmax, _ = weight.parts(Backend("cpu"))
    arguments = {
        "weight": data,
        "absmax": absmax,
        "activations": random_activations(M, K),
        "output": np.full((M, N), 77, np.float32),
    }
    match = "nested: expected a NestedAbsmax, as descriptor.nested is True, got"
    refused(weight.plan("cpu", M), arguments, InvalidProblem, match, nested=value)


@pytest.mark.parametrize("count", [0, 3, 5, 13])
def test_length_of_the_nested_scales(count):
    weight = Nf4Weight(N, K, nested=4)
    data, absmax, nested = weight.parts(Backend("cpu"))
    wrong = bcy.NestedAbsmax(nested.code, np.ones(count, np.float32), 0.0, 4)
    arguments = {
        "weight": data,
        "absmax": absmax,
        "activations": random_activations(M, K),
        "output": np.full((M, N), 77, np.float32),
    }
    match = rf"nested.absmax: expected exactly 4 elements, one to 4 blocks .*, got {count}"
    refused(weight.plan("cpu", M), arguments, InvalidProblem, match, nested=wrong)
    with pytest.raises(InvalidProblem, match="nested: expected 4 scales for 13 blocks, 4 to a"):
        bcy.Nf4Tensor(data, absmax, (N, K), nested=wrong)


def code(length=256, dtype=np.float32):
    return np.linspace(-1, 1, length).astype(dtype)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((code(255), np.ones(1, np.float32), 0), "code: expected exactly 256 elements, got 255"),
        ((code(257), np.ones(1, np.float32), 0), "code: expected exactly 256 elements, got 257"),
        ((code(256, np.float64), np.ones(1, np.float32), 0), "code: expected float32, got float64"),
        ((code(512)[::2], np.ones(1, np.float32), 0), "code: expected one contiguous run"),
        ((code(), np.ones(1), 0), "absmax: expected float32, got float64"),
        ((code(), np.ones(1, np.uint8), 0), "absmax: expected float32, got uint8"),
        ((code(), np.ones(4, np.float32)[::2], 0), "absmax: expected one contiguous run"),
        ((code(), np.ones(1, np.float32), "x"), "offset: expected a number, got 'x'"),
        ((code(), np.ones(1, np.float32), "0.5"), "offset: expected a number, got '0.5'"),
        ((code(), np.ones(1, np.float32), None), "offset: expected a number, got None"),
        ((code(), np.ones(1, np.float32), [1, 2]), "offset: expected a number"),
        ((code(), np.ones(1, np.float32), 0, 0), "block_size: expected a power of two"),
        ((code(), np.ones(1, np.float32), 0, -256), "block_size: expected a power of two"),
        ((code(), np.ones(1, np.float32), 0, 100), "block_size: expected a power of two"),
        ((code(), np.ones(1, np.float32), 0, 2**31), "block_size: expected a power of two"),
        ((code(), np.ones(1, np.float32), 0, 1.5), "block_size: expected an integer"),
    ],
)
def test_nested_tables(arguments, match):
    with pytest.raises(InvalidProblem, match=match) as caught:
        bcy.NestedAbsmax(*arguments)
    assert SHAPE.match(str(caught.value)), caught.value


@pytest.mark.parametrize("position", [0, 1])
def test_nested_tables_that_are_no_arrays(position):
    arguments = [code(), np.ones(1, np.float32), 0]
    arguments[position] = "table"
    with pytest.raises(NotAnArray, match=f"{['code', 'absmax'][position]}: expected an array"):
        bcy.NestedAbsmax(*arguments)


# ---- activations, output and bias ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("activations", np.zeros((M, K)), r"activations: expected float32, got float64\[3, 100\]"),
        ("activations", np.zeros((M, K), np.float16), "activations: expected float32, got float16"),
        ("output", np.zeros((M, N), np.float16), "output: expected float32, got float16"),
        (
            "activations",
            np.zeros((M, K + 1), np.float32),
            r"activations: expected shape \[3, 100\]",
        ),
        (
            "activations",
            np.zeros((M + 1, K), np.float32),
            r"activations: expected shape \[3, 100\]",
        ),
        ("activations", np.zeros(M * K, np.float32), r"activations: expected shape \[3, 100\]"),
        ("activations", np.zeros((1, M, K), np.float32), r"activations: expected shape \[3, 100\]"),
        ("output", np.zeros((M, N + 1), np.float32), r"output: expected shape \[3, 8\]"),
        ("output", np.zeros((N, M), np.float32), r"output: expected shape \[3, 8\]"),
        ("activations", np.zeros((M, 2 * K), np.float32)[:, ::2], "activations: expected stride 1"),
        ("activations", np.zeros((K, M), np.float32).T, "activations: expected stride 1"),
        ("output", np.zeros((M, 2 * N), np.float32)[:, ::2], "output: expected stride 1"),
    ],
)
def test_activations_and_output(plan, arguments, name, value, match):
    refused(plan, arguments, InvalidProblem, match, **{name: value})


def test_a_single_token():
    weight = Nf4Weight(N, K)
    plan = bcy.Nf4MmvqPlan.select("cpu", weight.descriptor(activation="float32"))
    x, y = np.zeros(K + 1, np.float32), np.zeros(N, np.float32)
    with pytest.raises(InvalidProblem, match=r"activations: expected shape \[1, 100\] or \[100\]"):
        plan.run(weight.tensor(), x, y)
    with pytest.raises(InvalidProblem, match=r"activations: expected shape \[1, 100\] or \[100\]"):
        plan.run(weight.tensor(), np.zeros((2, K), np.float32), y)


def test_bias_that_was_not_asked_for(plan, arguments):
    match = r"bias: expected None, as descriptor.bias is False, got float32\[8\] on cpu"
    refused(plan, arguments, InvalidProblem, match, bias=np.zeros(N, np.float32))


def test_bias_that_is_missing(weight, arguments):
    match = "bias: expected an array, as descriptor.bias is True, got None"
    refused(weight.plan("cpu", M, bias=True), arguments, InvalidProblem, match)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (np.zeros(N, np.float16), "bias: expected float32, got float16"),
        (np.zeros(N + 1, np.float32), r"bias: expected shape \[8\]"),
        (np.zeros((1, N), np.float32), r"bias: expected shape \[8\]"),
        (np.zeros(2 * N, np.float32)[::2], "bias: expected stride 1"),
    ],
)
def test_bias(weight, arguments, value, match):
    refused(weight.plan("cpu", M, bias=True), arguments, InvalidProblem, match, bias=value)


def test_read_only_output(plan, arguments):
    output = np.zeros((M, N), np.float32)
    output.flags.writeable = False
    refused(plan, arguments, ReadOnlyArray, "output: expected a writable array", output=output)


def test_streams_on_the_cpu(plan, arguments):
    refused(plan, arguments, InvalidProblem, "stream: expected None on the CPU", stream=object())


@pytest.mark.parametrize(
    "name", ["weight", "absmax", "nested.absmax", "nested.code", "activations"]
)
def test_an_output_that_overlaps(name):
    """Every argument that is read is apart from the one that is written."""
    weight = Nf4Weight(N, 64, nested=1)
    backend = Backend("cpu")
    data, absmax, nested = weight.parts(backend)
    memory = np.zeros(4096, np.uint8)
    memory = memory[-memory.ctypes.data % 64 :]

    def lie(array):
        part = memory[: array.nbytes].view(array.dtype).reshape(array.shape)
        part[...] = array
        return part

    x = random_activations(M, 64)
    arrays = {"weight": data, "absmax": absmax, "activations": x}
    tables = {"nested.absmax": nested.absmax, "nested.code": nested.code}
    if name in arrays:
        arrays[name] = lie(arrays[name])
    else:
        tables[name] = lie(tables[name])
    arrays["nested"] = bcy.NestedAbsmax(tables["nested.code"], tables["nested.absmax"], 0.05, 1)
    # The first byte that the other one has, and the last.
    size = arrays[name].nbytes if name in arrays else tables[name].nbytes
    for start in (0, (size - 1) // 4 * 4):
        output = memory[start : start + 4 * M * N].view(np.float32).reshape(M, N)
        match = f"output: expected memory apart from {name}, got"
        refused(weight.plan("cpu", M), arrays, InvalidProblem, match, output=output)
    beyond = -(-size // 64) * 64
    output = memory[beyond : beyond + 4 * M * N].view(np.float32).reshape(M, N)
    weight.plan("cpu", M).run(**arrays, output=output)
    # And dequantize.
    dense = memory[: 4 * N * 64].view(np.float32).reshape(N, 64)
    if name != "activations":
        plan = bcy.Nf4DequantizePlan.select("cpu", weight.descriptor(output="float32"))
        del arrays["activations"]
        refused(plan, arrays, InvalidProblem, "output: expected memory apart from", output=dense)


def test_an_output_that_overlaps_the_bias():
    weight = Nf4Weight(N, K)
    y = np.zeros((M, N), np.float32)
    with pytest.raises(InvalidProblem, match="output: expected memory apart from bias"):
        weight.plan("cpu", M, bias=True).run(
            weight.tensor(), random_activations(M, K), y, bias=y[1]
        )


# ---- weights of another kind ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        Nf4Weight(N, K, codebook="FP4"),
        Nf4Weight(N, K, block_size=32),
        Nf4Weight(N, K, block_size=50, layout="row_pair"),
        Nf4Weight(N, K, nested=256),
        Nf4Weight(N + 2, K),
        Nf4Weight(K, N),
        Nf4Weight(2 * N, K // 2),
    ],
    ids=lambda weight: repr(weight.tensor()),
)
def test_a_weight_of_another_problem(other):
    plan = Nf4Weight(N, K).plan("cpu", M)
    arguments = {
        "weight": other.tensor(),
        "activations": random_activations(M, K),
        "output": np.full((M, N), 77, np.float32),
    }
    match = r"weight: expected NF4 8x100, block size 64.*got Nf4Tensor.*weight\.plan"
    refused(plan, arguments, InvalidProblem, match)


def test_scales_beside_a_tensor():
    weight, nested = Nf4Weight(N, K), Nf4Weight(N, K, nested=256)
    arguments = {
        "weight": weight.tensor(),
        "activations": random_activations(M, K),
        "output": np.full((M, N), 77, np.float32),
    }
    match = "absmax: expected None beside an Nf4Tensor, which brings its own"
    refused(weight.plan("cpu", M), arguments, InvalidProblem, match, absmax=weight.absmax)
    tables = nested.parts(Backend("cpu"))[2]
    arguments["weight"] = nested.tensor()
    match = "nested: expected None beside an Nf4Tensor, which brings its own"
    refused(nested.plan("cpu", M), arguments, InvalidProblem, match, nested=tables)


def test_weights_of_the_other_family():
    gguf = bcy.quantize(np.ones((8, 64), np.float32), "Q4_0")
    plan = Nf4Weight(8, 64).plan("cpu", 2)
    x, y = random_activations(2, 64), np.zeros((2, 8), np.float32)
    with pytest.raises(InvalidProblem, match="weight: expected an Nf4Tensor or codes, got Gguf"):
        plan.run(gguf, x, y, absmax=np.ones(8, np.float32))
    with pytest.raises(InvalidProblem, match="weight: expected a GgufTensor or uint8, got Nf4T"):
        gguf.plan(m=2).run(Nf4Weight(8, 64).tensor(), x, y)


# ---- an Nf4Tensor --------------------------------------------------------------------------------

DATA, SCALES = np.zeros(BYTES, np.uint8), np.ones(BLOCKS, np.float32)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"data": DATA[:-1]}, "data: expected exactly 400 bytes, got 399 in uint8"),
        ({"data": np.zeros(401, np.uint8)}, "data: expected exactly 400 bytes, got 401"),
        ({"data": DATA.view(np.float64)}, "data: expected uint8, or bytes stored as float32"),
        ({"data": np.zeros(800, np.uint8)[::2]}, "data: expected one contiguous run of bytes"),
        ({"data": b"short"}, "data: expected exactly 400 bytes, got 5"),
        ({"absmax": SCALES[:-1]}, "absmax: expected exactly 13 elements, got 12"),
        ({"absmax": np.ones(14, np.float32)}, "absmax: expected exactly 13 elements, got 14"),
        ({"absmax": np.ones(BLOCKS)}, "absmax: expected float32, got float64"),
        ({"absmax": np.ones(BLOCKS, np.uint8)}, "absmax: expected float32, got uint8"),
        ({"absmax": np.ones(26, np.float32)[::2]}, "absmax: expected one contiguous run"),
        ({"shape": ()}, "shape: expected one or more sizes"),
        ({"shape": (N, -K)}, "shape: expected sizes of 0 or more"),
        ({"shape": 800}, "shape: expected a tuple of integers"),
        ({"shape": (N, K + 1)}, "data: expected exactly 404 bytes"),
        ({"shape": (2**32, 2**32)}, "shape: expected an array of fewer than"),
        ({"shape": (0, 2**62)}, "shape: expected an array of fewer than"),
        ({"block_size": 48}, "block_size: expected a power of two from 32 to 4096"),
        ({"block_size": 32}, "absmax: expected exactly 25 elements, got 13"),
        ({"block_size": 64.0}, "block_size: expected an integer, got 64.0"),
        ({"codebook": "nf3"}, "codebook: expected a Codebook, its name or its value, got 'nf3'"),
        ({"layout": "rows"}, "layout: expected an? Nf4Layout, its name or its value"),
        ({"layout": "row_pair"}, r"k: expected a multiple of 64 \(block_size\)"),
        ({"layout": "row_pair", "shape": (K + 1, N)}, "n: expected an even number of rows"),
        ({"nested": 3}, "nested: expected a NestedAbsmax or None, got int"),
        (
            {"nested": bcy.NestedAbsmax(code(), np.ones(1, np.float32), 0)},
            "absmax: expected uint8, got float32",
        ),
    ],
)
def test_tensor(changed, match):
    arguments = {"data": DATA, "absmax": SCALES, "shape": (N, K), **changed}
    with pytest.raises(InvalidProblem, match=match) as caught:
        bcy.Nf4Tensor(**arguments)
    assert SHAPE.match(str(caught.value)), caught.value


def test_tensor_of_no_arrays():
    with pytest.raises(NotAnArray, match="data: expected an array"):
        bcy.Nf4Tensor(object(), SCALES, (N, K))
    with pytest.raises(NotAnArray, match="absmax: expected an array"):
        bcy.Nf4Tensor(DATA, object(), (N, K))
    with pytest.raises(InvalidProblem, match="shape: expected at most 8 dimensions"):
        bcy.Nf4Tensor(DATA, SCALES, (1, 1, 1, 1, 1, 1, 1, N, K))


@pytest.mark.gpu
def test_parts_on_two_devices():
    weight = Nf4Weight(N, K, nested=4)
    (data, absmax, nested), there = weight.parts(Backend("cpu")), weight.parts(Backend("cuda"))
    for parts in (
        (there[0], absmax, nested),
        (data, there[1], nested),
        (data, absmax, there[2]),
    ):
        with pytest.raises(InvalidProblem, match=r"expected an array on (cpu|cuda:0), where data"):
            bcy.Nf4Tensor(parts[0], parts[1], (N, K), nested=parts[2])
    with pytest.raises(InvalidProblem, match="absmax: expected an array on cpu, where code is"):
        bcy.NestedAbsmax(nested.code, there[2].absmax, 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["weight", "absmax", "nested.absmax", "nested.code", "activations", "output", "bias"]
)
def test_an_argument_on_another_device(name):
    weight = Nf4Weight(N, K, nested=4)
    host, cuda = Backend("cpu"), Backend("cuda")

    def arguments(backend):
        data, absmax, nested = weight.parts(backend)
        return {
            "weight": data,
            "absmax": absmax,
            "nested": nested,
            "activations": backend.put(random_activations(M, K)),
            "output": backend.empty((M, N), "float32"),
            "bias": backend.put(np.zeros(N, np.float32)),
        }

    def mixed(here, there):
        if not name.startswith("nested"):
            return {**here, name: there[name]}
        # Tables on two devices are refused where they are made, so both are of the other one.
        return {**here, "nested": there["nested"]}

    for here, there in ((host, cuda), (cuda, host)):
        plan = weight.plan(here.device, M, bias=True)
        wrong = mixed(arguments(here), arguments(there))
        shown = name if not name.startswith("nested") else r"nested\.\w+"
        with pytest.raises(InvalidProblem, match=f"{shown}: expected an array on c.*move it there"):
            plan.run(**wrong)


@pytest.mark.gpu
def test_linear_on_two_devices():
    w, x = Nf4Weight(N, K).tensor(), random_activations(M, K)
    with pytest.raises(InvalidProblem, match="w: expected an array on cuda:0"):
        bcy.linear(Backend("cuda").put(x), w)
    with pytest.raises(InvalidProblem, match="w: expected an array on cpu"):
        bcy.linear(x, w.to("cuda"))


# ---- linear and dequantize -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"x": np.zeros((M, K + 1), np.float32)}, r"x: expected shape \[\.\.\., 100\]"),
        ({"x": np.zeros((), np.float32)}, r"x: expected shape \[\.\.\., 100\]"),
        ({"x": np.zeros((M, K))}, "x: expected float32, float16 or bfloat16, got float64"),
        ({"x": np.zeros((M, K), np.int32)}, "x: expected float32, float16 or bfloat16"),
        ({"out": np.zeros((M, N), np.float16)}, "out: expected float32"),
        ({"out": np.zeros((M, N + 1), np.float32)}, r"out: expected shape \[3, 8\]"),
        ({"bias": np.zeros(N + 1, np.float32)}, r"bias: expected shape \[8\]"),
        ({"bias": np.zeros(N, np.float16)}, "bias: expected float32, got float16"),
        ({"preference": "float"}, "preference: expected a PlanPreference"),
        ({"stream": 1}, "stream: expected None on the CPU"),
    ],
)
def test_linear(arguments, match):
    arguments = {"x": np.zeros((M, K), np.float32), "w": Nf4Weight(N, K).tensor(), **arguments}
    with pytest.raises(InvalidProblem, match=match) as caught:
        bcy.linear(**arguments)
    assert SHAPE.match(str(caught.value)), caught.value


def test_linear_into_its_own_weight():
    weight = Nf4Weight(64, 64, nested=1)
    memory = np.zeros(64 * 32, np.uint8)
    memory[:] = weight.data
    w = bcy.Nf4Tensor(memory, weight.absmax, (64, 64), nested=weight.tensor().nested)
    out = memory[: 4 * 64].view(np.float32).reshape(1, 64)
    with pytest.raises(InvalidProblem, match="out: expected memory apart from w, got"):
        bcy.linear(np.ones((1, 64), np.float32), w, out=out)
    scales = np.array(w.nested.absmax)
    tables = bcy.NestedAbsmax(w.nested.code, scales, 0.05, 1)
    w = bcy.Nf4Tensor(weight.data, weight.absmax, (64, 64), nested=tables)
    with pytest.raises(InvalidProblem, match=r"out: expected memory apart from w\.nested\.absmax"):
        bcy.linear(np.ones((1, 64), np.float32), w, out=scales.reshape(1, 64))


def test_dequantize():
    w = Nf4Weight(N, K).tensor()
    for arguments, match in (
        ({"dtype": "int8"}, "dtype: expected float32, float16 or bfloat16"),
        ({"out": np.zeros((N, K + 1), np.float32)}, r"out: expected shape \[8, 100\]"),
        ({"out": np.zeros((N, K))}, "out: expected float32"),
        ({"stream": 1}, "stream: expected None on the CPU"),
        ({"preference": 1}, "preference: expected a PlanPreference"),
    ):
        with pytest.raises(InvalidProblem, match=match):
            bcy.dequantize(w, **arguments)


def test_tensors_that_need_a_gradient():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    weight = Nf4Weight(N, K)
    absmax = torch.from_numpy(weight.absmax).requires_grad_()
    with pytest.raises(InvalidProblem, match="absmax: expected a tensor that needs no gradient"):
        bcy.Nf4Tensor(weight.data, absmax, (N, K))
    y = np.zeros((M, N), np.float32)
    with pytest.raises(InvalidProblem, match="absmax: expected a tensor that needs no gradient"):
        weight.plan("cpu", M).run(weight.data, random_activations(M, K), y, absmax=absmax)
    x = torch.zeros(M, K, requires_grad=True)
    with pytest.raises(InvalidProblem, match="x: expected a tensor that needs no gradient"):
        bcy.linear(x, weight.tensor())


# ---- quantize ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"array": np.zeros((4, 64))}, "array: expected float32, float16 or bfloat16"),
        ({"array": np.zeros((4, 64), np.int8)}, "array: expected float32, float16 or bfloat16"),
        ({"array": np.float32(3)}, "array: expected one dimension or more"),
        ({"array": np.zeros((4, 64), np.float32).T}, "array: expected contiguous memory"),
        ({"array": np.zeros((4, 64), np.float32)[:, :32]}, "array: expected contiguous memory"),
        ({"array": np.full((4, 64), np.nan, np.float32)}, "array: expected finite values, got NaN"),
        ({"array": np.full(7, np.inf, np.float16)}, "array: expected finite values"),
        ({"format": "nf5"}, "format: expected"),
        ({"format": None}, "format: expected"),
        ({"block_size": 16}, "block_size: expected a power of two from 32 to 4096"),
        ({"block_size": 8192}, "block_size: expected a power of two from 32 to 4096"),
        ({"block_size": "64"}, "block_size: expected an integer"),
        ({"nested": 1}, "nested: expected True or False"),
        ({"threads": 0}, "threads: expected 1 to 1024"),
        ({"format": "Q4_0", "block_size": 32}, "block_size: expected no such option for Q4_0"),
        ({"format": "Q4_0", "nested": True}, "nested: expected no such option for Q4_0"),
    ],
)
def test_quantize(arguments, match):
    arguments = {"array": np.zeros((4, 64), np.float32), "format": "nf4", **arguments}
    array = arguments.pop("array")
    with pytest.raises(InvalidProblem, match=match) as caught:
        bcy.quantize(array, arguments.pop("format"), **arguments)
    assert SHAPE.match(str(caught.value)) or "choose from" in str(caught.value), caught.value


def test_quantize_what_is_no_array():
    with pytest.raises(NotAnArray, match="array: expected an array"):
        bcy.quantize([[1.0, 2.0]], "nf4")


# ---- the helpers of the row-pair layout ----------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((np.zeros(63), 2, 32, 32), r"weight: expected 64 values \(2 rows of 32 columns\), got 63"),
        ((np.zeros(96), 3, 32, 32), "n: expected an even number of rows"),
        ((np.zeros(66), 2, 33, 32), "k: expected a multiple of 32"),
        ((np.zeros(64), 2, 32, 0), "block_size: expected 1 to"),
        ((np.zeros(64), -2, 32, 32), "n: expected 0 to"),
        ((np.zeros(64), 2.0, 32, 32), "n: expected an integer"),
        (("weight", 2, 32, 32), "weight: expected real numbers on the host .*, got str"),
        ((np.ones(64) * 1j, 2, 32, 32), "weight: expected real numbers on the host .*, got ndarr"),
        ((np.ma.masked_all(64), 2, 32, 32), "weight: expected .* without a mask, got MaskedArray"),
        ((["1"] * 64, 2, 32, 32), "weight: expected real numbers on the host .*, got list"),
        (([None] * 64, 2, 32, 32), "weight: expected real numbers on the host .*, got list"),
        ((np.zeros(64, "m8[s]"), 2, 32, 32), "weight: expected real numbers on the host"),
        ((np.zeros(64, "M8[s]"), 2, 32, 32), "weight: expected real numbers on the host"),
        (([1e300] * 64, 2, 32, 32), "weight: expected numbers that float32 can hold, got one b"),
    ],
)
def test_pack_weight(arguments, match):
    with pytest.raises(InvalidProblem, match=match) as caught:
        bcy.nf4_pack_weight(*arguments)
    assert SHAPE.match(str(caught.value)), caught.value


def test_quantize_value():
    with pytest.raises(InvalidProblem, match="x: expected a number, got 'x'"):
        bcy.nf4_quantize_value("x", 1.0)
    with pytest.raises(InvalidProblem, match="absmax: expected a number, got None"):
        bcy.nf4_quantize_value(1.0, None)
    with pytest.raises(InvalidProblem, match="x: expected a number, got 10"):
        bcy.nf4_quantize_value(10**400, 1.0)
    with pytest.raises(InvalidProblem, match="x: expected a number, got array"):
        bcy.nf4_quantize_value(np.ones(3), 1.0)
