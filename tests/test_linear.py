# SPDX-License-Identifier: Apache-2.0
"""linear, dequantize and quantize as people type them, with every kind of array."""

import mmap
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import reference
from problems import (
    EXACT,
    FLOATS,
    FORMATS,
    GgufWeight,
    Nf4Weight,
    bits,
    random_activations,
    random_weight,
)

import baracuda_cy as bcy
from baracuda_cy import InvalidProblem, gguf, nf4


class Kind:
    """One framework's arrays on one device."""

    def __init__(self, name, device):
        self.name, self.device = name, device
        if name != "numpy":
            self.module = pytest.importorskip(name, reason=f"{name} is not installed")
        if name == "jax" and device == "cuda" and self.module.default_backend() != "gpu":
            pytest.skip("this jax has no GPU")
        if name == "torch" and device == "cuda" and not self.module.cuda.is_available():
            pytest.skip("this torch has no GPU")

    def put(self, array):
        array = np.asarray(array)
        if self.name == "numpy":
            return array.copy()
        if self.name == "torch":
            torch = self.module
            if array.dtype == FLOATS["bfloat16"]:
                tensor = torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
            else:
                tensor = torch.from_numpy(array.copy())
            return tensor.to(self.device)
        if self.name == "jax":
            platform = "gpu" if self.device == "cuda" else "cpu"
            return self.module.device_put(array, self.module.devices(platform)[0])
        return self.module.asarray(array)

    def get(self, array):
        if self.name == "torch":
            array = array.cpu()
            torch = self.module
            if array.dtype == torch.bfloat16:
                return array.view(torch.int16).numpy().view(FLOATS["bfloat16"])
            return array.numpy()
        if self.name == "cupy":
            return self.module.asnumpy(array)
        return np.asarray(array)

    def is_mine(self, array):
        types = {
            "numpy": lambda: np.ndarray,
            "torch": lambda: self.module.Tensor,
            "jax": lambda: self.module.Array,
            "cupy": lambda: self.module.ndarray,
        }
        return isinstance(array, types[self.name]())


KINDS = [
    ("numpy", "cpu"),
    ("torch", "cpu"),
    ("jax", "cpu"),
    pytest.param(("torch", "cuda"), marks=pytest.mark.gpu),
    pytest.param(("cupy", "cuda"), marks=pytest.mark.gpu),
    pytest.param(("jax", "cuda"), marks=pytest.mark.gpu),
]


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(kind))
def kind(request):
    return Kind(*request.param)


def dtypes_of(kind):
    if kind.name == "cupy":
        return ("float32", "float16")
    return tuple(FLOATS)


# NF4 has the bits of the CPU everywhere where K is no multiple of a group.
WEIGHTS = {
    "GGUF": GgufWeight(24, 512),
    "NF4": Nf4Weight(24, 515),
    "NF4-nested": Nf4Weight(24, 515, nested=256),
    "FP4": Nf4Weight(24, 515, codebook="FP4"),
    "NF4-row_pair": Nf4Weight(24, 515, 103, layout="row_pair"),
    "FP4-row_pair": Nf4Weight(24, 515, 103, "FP4", "row_pair"),
}
GGUF = WEIGHTS["GGUF"]


@pytest.fixture(params=WEIGHTS)
def weight(request):
    return WEIGHTS[request.param]


def weight_for(kind):
    """In memory of our own."""
    return GGUF.tensor().to(kind.device)


def expected(weight, x, bias=None, output="float32", preference=None):
    tokens = np.ascontiguousarray(x).reshape(-1, weight.k)
    product = weight.exact_product(tokens, preference)
    return reference.finish(product, bias, output).reshape(*x.shape[:-1], weight.n)


# ---- linear --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5), (2, 1, 3), (0,), (2, 0)])
def test_linear_gives_back_its_own_kind(kind, weight, shape):
    w = weight.tensor(kind)
    for dtype in dtypes_of(kind):
        m = int(np.prod(shape))
        x = random_activations(m, weight.k, dtype).reshape(*shape, weight.k)
        y = bcy.linear(kind.put(x), w)
        assert kind.is_mine(y)
        got = kind.get(y)
        assert got.dtype == FLOATS[dtype]
        assert got.shape == (*shape, 24)
        np.testing.assert_array_equal(bits(got), expected(weight, x, output=dtype))


def test_linear_with_bias(kind, weight):
    w = weight.tensor(kind)
    for dtype in dtypes_of(kind):
        x = random_activations(3, weight.k, dtype)
        bias = np.linspace(-2, 2, 24).astype(FLOATS[dtype])
        y = kind.get(bcy.linear(kind.put(x), w, bias=kind.put(bias)))
        np.testing.assert_array_equal(bits(y), expected(weight, x, bias, dtype))


@pytest.mark.parametrize("output", ["float32", "float16"])
def test_linear_into_an_output(kind, weight, output):
    w = weight.tensor(kind)
    x = random_activations(6, weight.k, "float16").reshape(2, 3, weight.k)
    out = kind.put(np.full((2, 3, 24), 77, FLOATS[output]))
    if kind.name == "jax":
        with pytest.raises(bcy.ReadOnlyArray, match="out: expected a writable array"):
            bcy.linear(kind.put(x), w, out=out)
        assert (kind.get(out) == 77).all()
        return
    y = bcy.linear(kind.put(x), w, out=out)
    assert y is out
    np.testing.assert_array_equal(bits(kind.get(out)), expected(weight, x, output=output))


@pytest.mark.parametrize("name", FORMATS)
def test_linear_on_the_float_path(kind, name):
    weight, x = GgufWeight(24, 512, name), random_activations(3, 512)
    preference = bcy.PlanPreference(activations="float")
    y = bcy.linear(kind.put(x), weight.tensor(kind), preference=preference)
    np.testing.assert_array_equal(bits(kind.get(y)), expected(weight, x, preference=preference))


def test_linear_of_a_slice(kind, weight):
    """Rows at one stride need no copy."""
    if kind.name == "jax":
        pytest.skip("a slice of a JAX array is a copy")
    w, part = weight.tensor(kind), slice(8, 8 + weight.k)
    wide = random_activations(12, 600).reshape(3, 4, 600)
    y = bcy.linear(kind.put(wide)[:, :, part], w)
    np.testing.assert_array_equal(bits(kind.get(y)), expected(weight, wide[:, :, part]))
    y = bcy.linear(kind.put(wide)[:, 1, part], w)
    np.testing.assert_array_equal(bits(kind.get(y)), expected(weight, wide[:, 1, part]))


def test_linear_of_rows_at_no_stride(kind):
    if kind.name == "jax":
        pytest.skip("a slice of a JAX array is a copy")
    w = weight_for(kind)
    x = kind.put(random_activations(24, 512).reshape(2, 3, 4, 512))
    with pytest.raises(InvalidProblem, match=r"x: expected rows at one stride.*contiguous"):
        bcy.linear(x[:, :2, :2], w)
    y = x[:, :, 0].reshape(6, 512)
    assert bcy.linear(y, w).shape == (6, 24)


def test_linear_takes_any_plan_from_its_cache(kind, weight):
    select = (gguf if weight is GGUF else nf4).select_product
    select.cache_clear()
    w, same = weight.tensor(kind), weight.tensor(kind)
    x = kind.put(random_activations(3, weight.k))
    for _ in range(3):
        bcy.linear(x, w)
        bcy.linear(x, same)
    assert (select.cache_info().misses, select.cache_info().hits) == (1, 5)
    bcy.linear(x, w, preference=EXACT)
    assert select.cache_info().misses == 2
    bcy.linear(x, w, bias=kind.put(np.zeros(24, np.float32)))
    # A plan of NF4 knows whether there is a bias.
    assert select.cache_info().misses == (2 if weight is GGUF else 3)
    assert select.cache_info().maxsize is not None


def test_two_frameworks_share_one_weight():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    data = random_weight("Q4_K", 24, 512)
    w = bcy.GgufTensor(torch.from_numpy(data), "Q4_K", (24, 512))
    shared = np.from_dlpack(w)
    assert shared.ctypes.data == data.ctypes.data == torch.from_dlpack(w).data_ptr()
    x = random_activations(2, 512)
    y = bcy.linear(x, w)
    np.testing.assert_array_equal(y, bcy.linear(torch.from_numpy(x), w).numpy())


def test_a_weight_in_jax():
    jnp = pytest.importorskip("jax.numpy")
    data = random_weight("Q4_K", 24, 512)
    w = bcy.GgufTensor(jnp.asarray(data), "Q4_K", (24, 512))
    x = random_activations(2, 512)
    np.testing.assert_array_equal(bits(bcy.linear(x, w)), expected(GGUF, x))


@pytest.mark.gpu
@pytest.mark.parametrize("other", ["cupy", "jax"])
def test_two_frameworks_share_one_weight_on_the_gpu(other):
    torch, other = Kind("torch", "cuda"), Kind(other, "cuda")
    w = weight_for(torch)
    pointer = w.data.ptr
    assert torch.module.from_dlpack(w).data_ptr() == pointer
    x = random_activations(2, 512)
    one, two = bcy.linear(torch.put(x), w), bcy.linear(other.put(x), w)
    np.testing.assert_array_equal(torch.get(one), other.get(two))


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, "mmap"])
def test_a_weight_in_a_buffer(wrap, tmp_path):
    data = random_weight("Q4_K", 24, 512)
    if wrap == "mmap":
        path = tmp_path / "weight"
        path.write_bytes(data.tobytes())
        with path.open("rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    else:
        buffer = wrap(data.tobytes())
    x = random_activations(2, 512)
    w = bcy.GgufTensor(buffer, "Q4_K", (24, 512))
    np.testing.assert_array_equal(bits(bcy.linear(x, w)), expected(GGUF, x))


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (
            np.zeros((2, 511), np.float32),
            r"x: expected shape \[\.\.\., 512\], got float32\[2, 511\]",
        ),
        (np.zeros((), np.float32), r"x: expected shape \[\.\.\., 512\]"),
        (np.zeros((2, 512)), "x: expected float32, float16 or bfloat16, got float64"),
        (np.zeros((2, 512), np.int8), "x: expected float32, float16 or bfloat16, got int8"),
        (np.zeros((2, 1024), np.float32)[:, ::2], "x: expected stride 1"),
        ([[1.0] * 512], "^x: "),
        (None, "^x: "),
    ],
)
def test_linear_of_another_array(x, match):
    w = weight_for(Kind("numpy", "cpu"))
    with pytest.raises(InvalidProblem, match=match):
        bcy.linear(x, w)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"bias": np.zeros(23, np.float32)}, r"bias: expected shape \[24\]"),
        ({"bias": np.zeros(24)}, "bias: expected float32, got float64"),
        ({"out": np.zeros((2, 23), np.float32)}, r"out: expected shape \[2, 24\]"),
        ({"out": np.zeros((1, 2, 24), np.float32)}, r"out: expected shape \[2, 24\]"),
        ({"out": np.zeros((2, 24), np.float16)}, r"out: expected float32 \(x's type\) or float32"),
        ({"out": np.zeros((2, 48), np.float32)[:, ::2]}, "out: expected stride 1"),
        ({"preference": {}}, "preference: expected a PlanPreference"),
        ({"preference": "float"}, "preference: expected a PlanPreference"),
        ({"stream": 0}, "stream: expected None on the CPU"),
    ],
)
def test_linear_with_other_arguments(more, match):
    w = weight_for(Kind("numpy", "cpu"))
    with pytest.raises(InvalidProblem, match=match):
        bcy.linear(random_activations(2, 512), w, **more)


def test_what_cannot_be_multiplied_takes_no_memory():
    w = bcy.quantize(np.ones((64, 256), np.float32), "Q8_0")
    row = np.ones(256, np.float32)
    for x in (np.broadcast_to(row, (2**40, 256)), np.broadcast_to(row[:, None], (256, 256)).T):
        with pytest.raises(InvalidProblem, match="x: expected stride 1 along the last axis and"):
            bcy.linear(x, w)
    with pytest.raises(bcy.OutOfMemory, match=r"output: .*Unable to allocate"):
        bcy.linear(np.lib.stride_tricks.as_strided(row, (2**40, 256), (1024, 4)), w)


def test_linear_of_no_weight():
    for w in (random_weight("Q4_K", 24, 512), None, b""):
        with pytest.raises(InvalidProblem, match="w: expected a GgufTensor or an Nf4Tensor, got"):
            bcy.linear(random_activations(2, 512), w)


def test_linear_into_its_own_input():
    x = random_activations(2, 512)
    w = bcy.GgufTensor(random_weight("Q4_K", 512, 512), "Q4_K", (512, 512))
    before = x.copy()
    with pytest.raises(InvalidProblem, match="out: expected memory apart from x"):
        bcy.linear(x, w, out=x)
    np.testing.assert_array_equal(x, before)


def test_linear_of_a_tensor_that_requires_grad():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    w = weight_for(Kind("torch", "cpu"))
    x = torch.zeros(2, 512, requires_grad=True)
    with pytest.raises(InvalidProblem, match=r"x: .*grad"):
        bcy.linear(x, w)
    assert bcy.linear(x.detach(), w).shape == (2, 24)


@pytest.mark.gpu
def test_linear_on_two_devices():
    x = random_activations(2, 512)
    w = weight_for(Kind("numpy", "cpu"))
    there = bcy.DeviceArray.from_host(x)
    with pytest.raises(InvalidProblem, match="w: expected an array on cuda:0"):
        bcy.linear(there, w)
    with pytest.raises(InvalidProblem, match="w: expected an array on cpu"):
        bcy.linear(x, w.to("cuda"))


@pytest.mark.gpu
def test_linear_without_any_framework():
    x = random_activations(2, 512)
    w = weight_for(Kind("numpy", "cpu")).to("cuda")
    y = bcy.linear(bcy.DeviceArray.from_host(x), w)
    assert isinstance(y, bcy.DeviceArray)
    np.testing.assert_array_equal(bits(y.to_host()), expected(GGUF, x))


@pytest.mark.gpu
def test_linear_on_a_stream(kind):
    if kind.device == "cpu":
        pytest.skip("the CPU has no streams")
    w, x = weight_for(kind), random_activations(3, 512)
    stream = bcy.Stream()
    y = bcy.linear(kind.put(x), w, stream=stream)
    stream.synchronize()
    np.testing.assert_array_equal(bits(kind.get(y)), expected(GGUF, x))


def test_linear_in_threads():
    w, barrier = weight_for(Kind("numpy", "cpu")), threading.Barrier(8)
    problems_of = {m: random_activations(m, 512) for m in range(1, 9)}
    wrong = []

    def work(m):
        barrier.wait()
        want = expected(GGUF, problems_of[m])
        runs = (bits(bcy.linear(problems_of[m], w)) for _ in range(50))
        wrong.extend(m for y in runs if not (y == want).all())

    threads = [threading.Thread(target=work, args=(m,)) for m in problems_of]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- dequantize ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(FLOATS))
@pytest.mark.parametrize("shape", [(24, 512), (2, 12, 512), (12288,)])
def test_dequantize(dtype, shape):
    data = random_weight("Q4_K", 24, 512)
    w = bcy.GgufTensor(data, "Q4_K", shape)
    want = reference.finish(reference.decode(data, "Q4_K", 24, 512).values(), None, dtype)
    for y in (bcy.dequantize(w, dtype), w.dequantize(dtype), bcy.dequantize(w, FLOATS[dtype])):
        assert isinstance(y, np.ndarray)
        assert y.shape == shape
        np.testing.assert_array_equal(bits(y), want.reshape(shape))


def test_dequantize_gives_the_kind_of_the_bytes(kind):
    name = "Q5_0"
    data = random_weight(name, 6, 64)
    w = bcy.GgufTensor(kind.put(data), name, (6, 64))
    y = bcy.dequantize(w)
    assert kind.is_mine(y)
    want = reference.decode(data, name, 6, 64).values()
    np.testing.assert_array_equal(kind.get(y), want)


def test_dequantize_into_an_output():
    data = random_weight("Q5_0", 6, 64)
    w = bcy.GgufTensor(data, "Q5_0", (2, 3, 64))
    want = reference.decode(data, "Q5_0", 6, 64).values().reshape(2, 3, 64)
    out = np.zeros((2, 3, 80), np.float16)[:, :, 8:72]
    assert bcy.dequantize(w, out=out) is out
    np.testing.assert_array_equal(out, want.astype(np.float16))


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"dtype": "float64"}, "dtype: expected float32, float16 or bfloat16, got float64"),
        ({"dtype": "int8"}, "dtype: expected float32"),
        ({"dtype": "nothing"}, "dtype: expected an ElementKind"),
        ({"out": np.zeros((6, 63), np.float32)}, r"out: expected shape \[6, 64\]"),
        ({"out": np.zeros((6, 64), np.float64)}, "out: expected float32, got float64"),
        ({"dtype": "float16", "out": np.zeros((6, 64), np.float32)}, "out: expected float16"),
        ({"out": bytes(6 * 64 * 4)}, "out: expected"),
        ({"stream": 1}, "stream: expected None on the CPU"),
        ({"preference": 1}, "preference: expected"),
    ],
)
def test_dequantize_with_other_arguments(more, match):
    w = bcy.GgufTensor(random_weight("Q5_0", 6, 64), "Q5_0", (6, 64))
    with pytest.raises(InvalidProblem, match=match):
        bcy.dequantize(w, **more)


@pytest.mark.gpu
def test_dequantize_without_any_framework():
    data = random_weight("Q5_0", 6, 64)
    w = bcy.GgufTensor(data, "Q5_0", (6, 64)).to("cuda")
    y = bcy.dequantize(w, "float16")
    assert isinstance(y, bcy.DeviceArray)
    want = reference.finish(reference.decode(data, "Q5_0", 6, 64).values(), None, "float16")
    np.testing.assert_array_equal(bits(y.to_host()), want)


# ---- packed tensors ------------------------------------------------------------------------------


def test_a_tensor_says_what_it_is():
    data = random_weight("Q4_K", 24, 512)
    w = bcy.GgufTensor(data, "Q4_K", (2, 12, 512))
    assert (w.shape, w.nrows, w.ncols) == ((2, 12, 512), 24, 512)
    assert w.nbytes == data.nbytes
    assert w.device == "cpu"
    assert w.data is data
    assert repr(w) == f"GgufTensor(Q4_K, shape=(2, 12, 512), {data.nbytes} bytes on cpu)"
    assert w.to("cpu") is w
    longer = bcy.GgufTensor(np.concatenate([data, data]), "Q4_K", (24, 512))
    assert longer.nbytes == data.nbytes


def test_a_tensor_pickles():
    import pickle

    w = bcy.GgufTensor(random_weight("Q4_K", 24, 512), "Q4_K", (24, 512))
    other = pickle.loads(pickle.dumps(w))
    assert (other.format, other.shape) == (w.format, w.shape)
    np.testing.assert_array_equal(other.data, w.data)


@pytest.mark.gpu
def test_a_tensor_goes_to_the_device_and_back():
    data = random_weight("Q4_K", 24, 512)
    w = bcy.GgufTensor(np.concatenate([data, data]), "Q4_K", (24, 512))
    there = w.to("cuda")
    assert there.device == "cuda:0"
    assert isinstance(there.data, bcy.DeviceBuffer)
    assert there.data.nbytes == data.nbytes
    assert there.to("cuda:0") is there
    back = there.to("cpu")
    assert isinstance(back.data, np.ndarray)
    np.testing.assert_array_equal(back.data, data)


def test_plan_of_a_tensor():
    w = bcy.GgufTensor(random_weight("Q4_K", 24, 512), "Q4_K", (24, 512))
    plan = w.plan(m=8, activation=np.float16)
    assert isinstance(plan, bcy.GgufMmvqMultiMPlan)
    assert plan.descriptor == bcy.GgufMmvqMultiMDescriptor(
        nrows=24, ncols=512, m=8, block_format="Q4_K", activation="float16", output="float16"
    )
    plan = w.plan(activation="float16", preference=bcy.PlanPreference(activations="float"))
    assert isinstance(plan, bcy.GgufMmvqPlan)
    assert plan.descriptor.output is bcy.ElementKind.F16
    with pytest.raises(InvalidProblem, match="m: expected"):
        w.plan(m=-1)


# ---- quantize ------------------------------------------------------------------------------------


def test_quantize_keeps_the_shape():
    array = np.random.default_rng(0).standard_normal((2, 3, 64)).astype(np.float32)
    w = bcy.quantize(array, "Q8_0")
    assert w.shape == (2, 3, 64)
    assert w.data.shape == (2, 3, 68)
    assert np.abs(bcy.dequantize(w) - array).max() < 0.03


@pytest.mark.parametrize("dtype", list(FLOATS))
def test_quantize_of_any_float(dtype):
    array = np.random.default_rng(0).standard_normal((6, 64)).astype(FLOATS[dtype])
    plain = bcy.quantize(array.astype(np.float32), "Q4_0").data
    np.testing.assert_array_equal(bcy.quantize(array, "Q4_0").data, plain)
    wide = np.zeros((6, 80), FLOATS[dtype])
    wide[:, 8:72] = array
    np.testing.assert_array_equal(bcy.quantize(wide[:, 8:72], "Q4_0", threads=2).data, plain)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_quantize_of_any_framework(name):
    kind = Kind(name, "cpu")
    array = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    w = bcy.quantize(kind.put(array), "Q5_1")
    np.testing.assert_array_equal(w.data, bcy.quantize(array, "Q5_1").data)


@pytest.mark.parametrize("shape", [(0, 64), (4, 0)])
def test_quantize_of_nothing(shape):
    w = bcy.quantize(np.zeros(shape, np.float32), "Q8_0")
    assert w.shape == shape
    assert w.nbytes == 0


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((2, 64)), r"array: expected float32, float16 or bfloat16, got float64.*astype"),
        (np.zeros((2, 63), np.float32), "array: expected a multiple of 32 columns"),
        (np.float32(1), "array: "),
        (np.zeros((2, 128), np.float32)[:, ::2], "array: expected stride 1 along the last ax"),
        (np.zeros((64, 2), np.float32).T, "array: expected stride 1 along the last ax"),
        (np.full((2, 64), np.nan, np.float32), "array: expected finite values"),
        (np.full((2, 64), np.inf, np.float16), "array: expected finite values"),
        (np.full((2, 64), -np.inf, FLOATS["bfloat16"]), "array: expected finite values"),
        ([[1.0] * 32], "^array: "),
    ],
)
def test_quantize_of_another_array(array, match):
    with pytest.raises(InvalidProblem, match=match):
        bcy.quantize(array, "Q8_0")


def test_quantize_sees_one_broken_value():
    array = np.ones((64, 96), np.float32)
    for at in (0, 95):
        array[63, at] = np.nan
        with pytest.raises(InvalidProblem, match="array: expected finite values, got NaN"):
            bcy.quantize(array, "Q8_0")
        array[63, at] = 1
    bcy.quantize(array, "Q8_0")


def test_quantize_to_another_format():
    array = np.zeros((1, 256), np.float32)
    with pytest.raises(bcy.Unsupported, match=r"format: expected one of Q4_0.*got IQ2_XS"):
        bcy.quantize(array, "IQ2_XS")
    with pytest.raises(InvalidProblem, match="format: expected a GgufBlockFormat"):
        bcy.quantize(array, "Q4")
    with pytest.raises(InvalidProblem, match="threads: expected"):
        bcy.quantize(array, "Q8_0", threads=0)


def test_quantize_of_a_tensor_that_requires_grad():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    array = torch.zeros(1, 32, requires_grad=True)
    with pytest.raises(InvalidProblem, match=r"array: .*grad"):
        bcy.quantize(array, "Q8_0")


@pytest.mark.gpu
def test_quantize_on_the_gpu():
    with pytest.raises(InvalidProblem, match="array: expected an array on the host, got"):
        bcy.quantize(bcy.DeviceArray.from_host(np.zeros((1, 32), np.float32)), "Q8_0")


# ---- the package ---------------------------------------------------------------------------------


def test_command_line(capsys):
    from baracuda_cy import __main__

    __main__.main()
    said = capsys.readouterr().out
    assert f"baracuda-cy {bcy.__version__}" in said
    assert "CPU" in said
    assert "threads" in said
    assert "GPU" in said


def test_command_line_takes_no_arguments(capsys):
    from baracuda_cy import __main__

    for arguments, status in ((["--help"], 0), (["--verson"], 2), (["gpu"], 2)):
        with pytest.raises(SystemExit) as ended:
            __main__.main(arguments)
        assert ended.value.code == status
    assert "unrecognized arguments: --verson" in capsys.readouterr().err


def test_command_line_whose_reader_has_gone():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "baracuda_cy"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


@pytest.mark.parametrize("preference", [{}, "float"])
def test_plan_of_a_weight_with_no_preference(preference):
    with pytest.raises(InvalidProblem, match="preference: expected a PlanPreference"):
        weight_for(Kind("numpy", "cpu")).plan(preference=preference)


def test_a_shape_that_no_array_has():
    with pytest.raises(InvalidProblem, match="shape: expected an array of fewer than"):
        bcy.GgufTensor(b"", "Q4_K", (2**70, 0))
