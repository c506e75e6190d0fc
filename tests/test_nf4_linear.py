# SPDX-License-Identifier: Apache-2.0
"""NF4 and FP4 weights as people use them: linear, dequantize, quantize, layouts, codebooks."""

import copy
import mmap
import pickle

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import reference
from hypothesis import example, given
from problems import (
    BACKENDS,
    CODEBOOKS,
    EXACT,
    FLOATS,
    LAYOUTS,
    Backend,
    Nf4Weight,
    bits,
    random_activations,
)
from test_linear import KINDS, Kind, dtypes_of

import baracuda_cy as bcy
from baracuda_cy import InvalidProblem
from baracuda_cy.codebooks import CODEBOOKS as VALUES
from baracuda_cy.codebooks import dynamic_code

N, K = 24, 515  # no multiple of a group: on every device the bits of the CPU


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(kind))
def kind(request):
    return Kind(*request.param)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return Backend(request.param)


def weight_for(kind, **more):
    """A weight over the framework's own arrays."""
    weight = Nf4Weight(N, K, **more)
    return weight, weight.tensor(kind)


def seen(kind, array):
    """A result on the host: on the CPU `quantize` gives NumPy arrays whatever it was given."""
    return array if isinstance(array, np.ndarray) else kind.get(array)


def host(array):
    return array.to_host() if isinstance(array, bcy.DeviceArray) else np.asarray(array)


# ---- linear --------------------------------------------------------------------------------------


def test_linear_has_the_bits_of_the_plan(backend):
    """On the fast path too."""
    weight = Nf4Weight(40, 1024, nested=256)
    w = weight.tensor(backend)
    for preference in (None, EXACT):
        for dtype in FLOATS:
            x = random_activations(9, 1024, dtype)
            want = weight.product(backend, x, preference=preference)
            y = backend.empty((9, 40), dtype)
            bcy.linear(backend.put(x), w, out=y, preference=preference)
            np.testing.assert_array_equal(bits(backend.get(y)), bits(want))


def test_stacked_experts_are_rows():
    weight = Nf4Weight(12, 64)
    w = bcy.Nf4Tensor(weight.data, weight.absmax, (3, 4, 64))
    assert (w.nrows, w.ncols, w.shape) == (12, 64, (3, 4, 64))
    x = random_activations(2, 64)
    np.testing.assert_array_equal(bcy.linear(x, w), bcy.linear(x, weight.tensor()))
    np.testing.assert_array_equal(bcy.dequantize(w), weight.values().reshape(3, 4, 64))
    row = bcy.Nf4Tensor(weight.data[:32], weight.absmax[:1], (64,))
    np.testing.assert_array_equal(bcy.dequantize(row), weight.values()[0])


def test_a_weight_on_another_framework_than_its_activations():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    weight = Nf4Weight(N, 64)
    w = bcy.Nf4Tensor(torch.from_numpy(weight.data), torch.from_numpy(weight.absmax), (N, 64))
    x = random_activations(2, 64)
    np.testing.assert_array_equal(bcy.linear(x, w), bcy.linear(x, weight.tensor()))
    shared = np.from_dlpack(w)
    assert shared.ctypes.data == weight.data.ctypes.data == torch.from_dlpack(w).data_ptr()


# ---- dequantize ----------------------------------------------------------------------------------


def test_dequantize_gives_the_kind_of_the_codes(kind):
    for nested in (None, 256):
        weight, w = weight_for(kind, nested=nested)
        for dtype in (None, *dtypes_of(kind)):
            dense = bcy.dequantize(w, dtype)
            assert kind.is_mine(dense)
            want = reference.finish(weight.values(), None, dtype or "float32")
            np.testing.assert_array_equal(bits(kind.get(dense)), want)


def test_dequantize_into_an_output(kind):
    if kind.name == "jax":
        pytest.skip("JAX arrays cannot be written")
    weight, w = weight_for(kind)
    out = kind.put(np.full((N, K), 77, np.float16))
    assert bcy.dequantize(w, out=out) is out
    np.testing.assert_array_equal(
        bits(kind.get(out)), reference.finish(weight.values(), None, "float16")
    )


def test_dequantize_is_a_method_too():
    weight = Nf4Weight(4, 64)
    np.testing.assert_array_equal(weight.tensor().dequantize(), weight.values())
    assert weight.tensor().dequantize("float16").dtype == np.float16


# ---- quantize ------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_quantize_has_the_specified_bytes(kind, codebook, block_size):
    for shape in ((1,), (7, 33), (3, 5, 100), (2, 4096), (9, 1001), (0, 5), (4, 0)):
        for dtype in dtypes_of(kind):
            x = random_activations(int(np.prod(shape[:-1])), shape[-1], dtype).reshape(shape)
            w = bcy.quantize(kind.put(x), codebook.lower(), block_size=block_size)
            data, absmax = reference.nf4_quantize(x.astype(np.float32), block_size, codebook)
            assert (w.shape, w.codebook.name, w.block_size) == (shape, codebook, block_size)
            assert w.layout is bcy.Nf4Layout.BITSANDBYTES
            assert w.nested is None
            assert w.device.partition(":")[0] == kind.device
            if kind.device == "cuda":
                assert kind.is_mine(w.data)
                assert kind.is_mine(w.absmax)
            np.testing.assert_array_equal(bits(seen(kind, w.absmax)), bits(absmax))
            np.testing.assert_array_equal(seen(kind, w.data), data)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_quantize_values_at_thresholds(kind, codebook):
    """A tie takes the lower value, its neighbours are told apart."""
    values = np.sort(np.unique(reference.CODEBOOKS[codebook]))
    middles = (values[:-1] + values[1:]) / np.float32(2)
    around = [middles, np.nextafter(middles, np.float32(-2)), np.nextafter(middles, np.float32(2))]
    x = np.concatenate([*around, values, [-0.0, 1e-38, -1e-38, 1e-45]]).astype(np.float32)
    for scale in (1.0, 3.0, 2.0**-126):
        flat = np.resize(x * np.float32(scale), 256)
        flat[::32] = scale
        w = bcy.quantize(kind.put(flat), codebook, block_size=32)
        data, absmax = reference.nf4_quantize(flat, 32, codebook)
        np.testing.assert_array_equal(bits(seen(kind, w.absmax)), bits(absmax))
        np.testing.assert_array_equal(seen(kind, w.data), data)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_quantize_zeros(kind, codebook):
    w = bcy.quantize(kind.put(np.zeros(100, np.float32)), codebook, block_size=64)
    np.testing.assert_array_equal(seen(kind, w.data), [0x77 if codebook == "NF4" else 0] * 50)
    # A short block never has a scale of 0, as in bitsandbytes.
    np.testing.assert_array_equal(seen(kind, w.absmax), np.array([0, 1e-38], np.float32))
    np.testing.assert_array_equal(seen(kind, bcy.dequantize(w)), np.zeros(100))


def nest(absmax):
    """bitsandbytes' rule for 8 bits: codes, scales and offset."""
    f32 = np.float32
    offset = f32(np.mean(absmax, dtype=np.float64)) if absmax.size else f32(0)
    code = reference.NESTED_CODE
    middles = (code[:-1] + code[1:]) * f32(0.5)
    codes, scales = np.zeros(absmax.size, np.uint8), []
    for at in range(0, absmax.size, 256):
        part = absmax[at : at + 256] - offset
        largest = np.abs(part).max()
        scales.append(largest)
        if largest == 0:
            continue
        scaled = (part * (f32(1) / largest)).clip(-1, 1)
        step = reference.fma((scaled + f32(1)) * f32(0.5), f32(65535), f32(0.5)).astype(np.int64)
        value = step.astype(f32) * f32(2) / f32(65535) - f32(1)
        codes[at : at + 256] = np.searchsorted(middles, value, side="left")
    return codes, np.array(scales, f32), offset


@pytest.mark.parametrize("size", [1, 64, 100, 64 * 256, 64 * 257 + 3, 64 * 700])
def test_quantize_nested(kind, size):
    x = random_activations(1, size)[0]
    plain = bcy.quantize(x, "nf4")
    w = bcy.quantize(kind.put(x), "nf4", nested=True)
    codes, scales, offset = nest(plain.absmax)
    assert w.device.partition(":")[0] == w.nested.device.partition(":")[0] == kind.device
    assert w.nested.offset == offset
    assert w.nested.block_size == 256
    np.testing.assert_array_equal(seen(kind, w.data), plain.data)
    np.testing.assert_array_equal(seen(kind, w.nested.absmax), scales)
    np.testing.assert_array_equal(seen(kind, w.absmax), codes)
    np.testing.assert_array_equal(seen(kind, w.nested.code), reference.NESTED_CODE)
    close = np.abs(w.to("cpu").unnest().absmax - plain.absmax)
    assert (close <= 0.01 * np.abs(plain.absmax - offset).max() + 1e-7).all()


def test_quantize_more_rows_than_can_be_counted_through():
    assert bcy.quantize(np.empty((2**40, 0), np.float32), "nf4").shape == (2**40, 0)


def test_quantize_nothing_nested(kind):
    w = bcy.quantize(kind.put(np.zeros((0, 64), np.float32)), "nf4", nested=True)
    assert (w.shape, w.nested.offset, w.nested.count) == ((0, 64), 0.0, 0)


def test_quantize_names_of_formats():
    x = random_activations(2, 64)
    for name in ("nf4", "NF4", "Nf4", bcy.Codebook.NF4):
        assert bcy.quantize(x, name).codebook is bcy.Codebook.NF4
    for name in ("fp4", "FP4", bcy.Codebook.FP4):
        assert bcy.quantize(x, name).codebook is bcy.Codebook.FP4
    # Numbers are those of GGUF.
    assert bcy.quantize(x, 2).format is bcy.GgufBlockFormat.Q4_0
    with pytest.raises(InvalidProblem, match=r"format: expected .*got 0; choose from .*NF4, FP4$"):
        bcy.quantize(x, 0)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_the_bytes(threads):
    x = random_activations(64, 4096)
    plain = bcy.quantize(x, "nf4", nested=True)
    w = bcy.quantize(x, "nf4", nested=True, threads=threads)
    np.testing.assert_array_equal(w.data, plain.data)
    np.testing.assert_array_equal(w.absmax, plain.absmax)


@pytest.mark.parametrize("nested", [False, True])
def test_scales_in_a_buffer_pickle(nested):
    w = bcy.quantize(random_activations(4, 64), "nf4", nested=nested)
    tables = w.nested and bcy.NestedAbsmax(
        memoryview(w.nested.code), memoryview(w.nested.absmax), w.nested.offset
    )
    lent = bcy.Nf4Tensor(memoryview(w.data), memoryview(w.absmax), w.shape, nested=tables)
    again = pickle.loads(pickle.dumps(lent))
    np.testing.assert_array_equal(bcy.dequantize(again), bcy.dequantize(w))


def test_quantize_reads_what_is_not_aligned():
    raw = np.zeros(4 * 128 + 4, np.uint8)
    x = raw[4:].view(np.float32)
    x[:] = random_activations(1, 128)[0]
    np.testing.assert_array_equal(bcy.quantize(x, "fp4").data, bcy.quantize(x.copy(), "fp4").data)


@pytest.mark.gpu
def test_quantize_on_cuda_takes_what_it_gets():
    """Without waiting for the device, nobody can look for NaN there."""
    x = random_activations(4, 64)
    x[1, 3], x[2, 5] = np.nan, np.inf
    w = bcy.quantize(Backend("cuda").put(x), "nf4")
    dense = host(bcy.dequantize(w))
    clean = bcy.dequantize(bcy.quantize(random_activations(4, 64), "nf4"))
    np.testing.assert_array_equal(dense[[0, 3]], clean[[0, 3]])


@pytest.mark.gpu
def test_quantize_on_cuda_gives_our_own_arrays():
    x = random_activations(3, 100)
    w = bcy.quantize(Backend("cuda").put(x), "nf4", nested=True)
    assert isinstance(w.data, bcy.DeviceArray)
    assert isinstance(w.absmax, bcy.DeviceArray)
    want = bcy.quantize(x, "nf4", nested=True)
    np.testing.assert_array_equal(w.data.to_host(), want.data)
    np.testing.assert_array_equal(w.absmax.to_host(), want.absmax)
    np.testing.assert_array_equal(host(bcy.dequantize(w)), bcy.dequantize(want))


@st.composite
def arrays(draw):
    shape = draw(st.lists(st.integers(0, 40), min_size=1, max_size=3))
    block_size = draw(st.sampled_from([32, 64, 128]))
    seed = draw(st.integers(0, 2**20))
    scale = draw(st.sampled_from([1.0, 1e-30, 1e30, 1e-44]))
    dtype = draw(st.sampled_from(list(FLOATS)))
    rng = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        x = (rng.standard_normal(shape) * scale).astype(np.float32).astype(FLOATS[dtype])
    return np.where(np.isfinite(x), x, FLOATS[dtype](1)), block_size


@given(problem=arrays(), codebook=st.sampled_from(CODEBOOKS))
@example(problem=(np.zeros((3, 33), np.float32), 32), codebook="FP4")
def test_quantize_any_array(problem, codebook):
    x, block_size = problem
    w = bcy.quantize(x, codebook, block_size=block_size)
    data, absmax = reference.nf4_quantize(x.astype(np.float32), block_size, codebook)
    np.testing.assert_array_equal(w.data, data)
    np.testing.assert_array_equal(bits(w.absmax), bits(absmax))


# ---- layouts -------------------------------------------------------------------------------------


def same_values(w, values):
    np.testing.assert_array_equal(bits(host(bcy.dequantize(w))), bits(values))


@pytest.mark.parametrize("nested", [None, 4])
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize(
    ("n", "k", "block_size", "pairs"),
    [
        (4, 128, 64, 64),
        (4, 80, 64, 16),
        (6, 192, 128, 64),
        (2, 100, 64, 4),
        (3, 128, 64, 64),
        (5, 100, 64, 4),
        (7, 33, 32, 1),
        (1, 1, 32, 1),
        (2, 4096, 4096, 4096),
        (3, 96, 4096, 96 // 3),
    ],
)
def test_there_and_back(backend, n, k, block_size, pairs, codebook, nested):
    weight = Nf4Weight(n, k, block_size, codebook, nested=nested)
    if n * k % 2:  # what fills the last byte is the code of 0, as bitsandbytes has it
        weight.data[-1] = weight.data[-1] & 0xF0 | (7 if codebook == "NF4" else 0)
    w, values = weight.tensor(backend), weight.values()
    there = w.to_layout("row_pair")
    assert there.layout is bcy.Nf4Layout.ROW_PAIR
    assert (there.shape, there.block_size, there.device) == ((n + n % 2, k), pairs, w.device)
    codes = reference.nf4_codes(host(there.to("cpu").data), n + n % 2, k, "row_pair")
    np.testing.assert_array_equal(codes[:n], reference.nf4_codes(weight.data, n, k, "bitsandbytes"))
    kept = nested is not None and (n % 2 == 0 and pairs == block_size)
    assert (there.nested is not None) == kept
    same_values(there, np.vstack([values, np.zeros((n % 2, k), np.float32)]))
    if n % 2:  # an added row is zero by its codes and by its scales
        added = host(there.to("cpu").absmax)[n * k // pairs :]
        np.testing.assert_array_equal(added, np.zeros(k // pairs))
        np.testing.assert_array_equal(codes[n], np.full(k, 7 if codebook == "NF4" else 0))
    back = there.to_layout("bitsandbytes", nrows=n, block_size=block_size)
    assert (back.shape, back.layout) == (w.shape, w.layout)
    np.testing.assert_array_equal(host(back.to("cpu").data), weight.data)
    np.testing.assert_array_equal(
        host(back.unnest().to("cpu").absmax), reference.nf4_absmax(weight.absmax, weight.nested)
    )
    same_values(back, values)


@given(
    n=st.integers(0, 9),
    k=st.integers(0, 150),
    block_size=st.sampled_from([32, 64, 128]),
    nested=st.sampled_from([None, 1, 256]),
)
def test_any_weight_there_and_back(n, k, block_size, nested):
    weight = Nf4Weight(n, k, block_size, "FP4", nested=nested)
    there = weight.tensor().to_layout("row_pair")
    same_values(there, np.vstack([weight.values(), np.zeros((n % 2, k), np.float32)]))
    same_values(there.to_layout("bitsandbytes", n, block_size), weight.values())


def test_smaller_blocks_of_one_layout():
    weight = Nf4Weight(6, 160, 128)
    w = weight.tensor()
    finer = w.to_layout("bitsandbytes", block_size=32)
    assert finer.block_size == 32
    same_values(finer, weight.values())
    again = finer.to_layout("bitsandbytes", block_size=128)
    np.testing.assert_array_equal(again.absmax, weight.absmax)
    pairs = w.to_layout("row_pair", block_size=8)
    assert pairs.block_size == 8
    same_values(pairs, weight.values())


def test_rows_are_cut_off():
    for nested in (None, 2):
        weight = Nf4Weight(8, 100, 64, nested=nested)
        w = weight.tensor()
        for rows in range(9):
            part = w.to_layout("bitsandbytes", nrows=rows)
            assert part.shape == (rows, 100)
            assert (part.nested is not None) == (nested is not None)
            same_values(part, weight.values()[:rows])
        three = w.to_layout("row_pair", nrows=3)
        assert three.shape == (4, 100)
        same_values(three, np.vstack([weight.values()[:3], np.zeros((1, 100), np.float32)]))


def test_what_does_not_change_is_itself():
    for layout in LAYOUTS:
        w = Nf4Weight(4, 128, 64, "NF4", layout, 256).tensor()
        assert w.to_layout(layout) is w
        assert w.to_layout(layout, nrows=4, block_size=64) is w
    w = Nf4Weight(4, 128).tensor()
    assert w.unnest() is w
    experts = bcy.Nf4Tensor(w.data, w.absmax, (2, 2, 128))
    assert experts.to_layout("row_pair").shape == (2, 2, 128)


def test_products_agree_across_layouts(backend):
    """The order of summation is of K alone."""
    for k in (200, 1024):
        weight = Nf4Weight(7, k, nested=256)
        w, x = weight.tensor(backend), random_activations(5, k, "float16")
        results = []
        for other in (w, w.unnest(), w.to_layout("row_pair"), w.to_layout("row_pair", None, 4)):
            y = backend.empty((5, other.nrows), "float16")
            bcy.linear(backend.put(x), other, out=y, preference=EXACT)
            results.append(bits(backend.get(y))[:, :7])
        for y in results[1:]:
            np.testing.assert_array_equal(y, results[0])


def test_stored_codes_are_converted_too():
    weight = Nf4Weight(4, 128)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        w = bcy.Nf4Tensor(weight.data.view(dtype).reshape(-1, 1), weight.absmax, (4, 128))
        pairs = w.to_layout("row_pair")
        assert pairs.data.dtype == np.uint8
        same_values(pairs, weight.values())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("rows",), "layout: expected an? Nf4Layout"),
        (("row_pair", 9), r"nrows: expected 0 to 8 \(the rows there are\), got 9"),
        (("row_pair", -1), "nrows: expected 0 to 8"),
        (("row_pair", 2.0), "nrows: expected an integer"),
        (("row_pair", None, 64), r"k: expected a multiple of 64 \(block_size\).*got 100"),
        (("row_pair", None, 5), "block_size: expected blocks of one scale each, got 5"),
        (("row_pair", None, 0), "block_size: expected 1 to"),
        (("bitsandbytes", None, 128), "block_size: expected blocks of one scale each, got 128"),
        (("bitsandbytes", None, 16), "block_size: expected a power of two from 32"),
        (("bitsandbytes", None, "x"), "block_size: expected an integer"),
    ],
)
def test_layouts_that_cannot_be(arguments, match):
    w = Nf4Weight(8, 100).tensor()
    with pytest.raises(InvalidProblem, match=match):
        w.to_layout(*arguments)


def test_blocks_that_the_other_layout_cannot_express():
    pairs = Nf4Weight(4, 80, 16, "NF4", "row_pair").tensor()
    with pytest.raises(InvalidProblem, match="block_size: expected a power of two from 32 to 4096"):
        pairs.to_layout("bitsandbytes")
    with pytest.raises(InvalidProblem, match="block_size: expected blocks of one scale each"):
        pairs.to_layout("bitsandbytes", block_size=32)


def test_unnest(backend):
    weight = Nf4Weight(5, 100, nested=2)
    plain = weight.tensor(backend).unnest()
    assert plain.nested is None
    np.testing.assert_array_equal(
        bits(host(plain.to("cpu").absmax)),
        bits(reference.nf4_absmax(weight.absmax, weight.nested)),
    )
    same_values(plain, weight.values())


# ---- a tensor ------------------------------------------------------------------------------------


def test_attributes():
    weight = Nf4Weight(7, 33, 32, "FP4", nested=4)
    nested = weight.tensor().nested
    w = bcy.Nf4Tensor(weight.data, weight.absmax, (7, 33), 32, "fp4", nested=nested)
    assert w.nested is nested
    assert w.data is weight.data
    assert w.absmax is weight.absmax
    assert (w.nrows, w.ncols, w.shape, w.block_size) == (7, 33, (7, 33), 32)
    assert w.codebook is bcy.Codebook.FP4
    assert w.layout is bcy.Nf4Layout.BITSANDBYTES
    assert w.nbytes == 116 + 8 + 4 * (256 + 2)
    assert w.device == w.nested.device == "cpu"
    assert repr(w) == (
        "Nf4Tensor(FP4, shape=(7, 33), block_size=32, bitsandbytes layout, nested absmax, "
        "1156 bytes on cpu)"
    )
    assert repr(w.nested).startswith("NestedAbsmax(2 scales, offset=0.05000000074")
    assert Nf4Weight(7, 33, 32).tensor().nbytes == 116 + 4 * 8


def test_names_and_numbers_of_what_it_is():
    weight = Nf4Weight(4, 64, 32, "FP4", "row_pair")
    for codebook in ("fp4", 1, bcy.Codebook.FP4):
        for layout in ("ROW_PAIR", 1, bcy.Nf4Layout.ROW_PAIR):
            w = bcy.Nf4Tensor(weight.data, weight.absmax, [4, np.int64(64)], 32, codebook, layout)
            same_values(w, weight.values())
            assert type(w.nrows) is int


def test_is_immutable():
    w = Nf4Weight(4, 64, nested=256).tensor()
    for thing, name in ((w, "data"), (w, "block_size"), (w.nested, "offset"), (w.nested, "code")):
        with pytest.raises(AttributeError, match=f"{name}: an? N.* is immutable"):
            setattr(thing, name, None)
        with pytest.raises(AttributeError, match=f"{name}: an? N.* is immutable"):
            delattr(thing, name)
    with pytest.raises(AttributeError):
        w.something_else = 1


@pytest.mark.parametrize("nested", [None, 4])
@pytest.mark.parametrize("how", ["pickle", "copy", "deepcopy"])
def test_copies(how, nested):
    weight = Nf4Weight(7, 33, 32, "FP4", nested=nested)
    copies = {
        "pickle": lambda w: pickle.loads(pickle.dumps(w)),
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
    }
    w = weight.tensor()
    other = copies[how](w)
    assert repr(other) == repr(w)
    assert (other is w) == (how != "pickle")
    same_values(other, weight.values())
    if nested:
        tables = copies[how](w.nested)
        assert repr(tables) == repr(w.nested)
        np.testing.assert_array_equal(tables.code, w.nested.code)


def test_a_tensor_over_a_file(tmp_path):
    weight = Nf4Weight(4, 128)
    (tmp_path / "w").write_bytes(weight.data.tobytes())
    with open(tmp_path / "w", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    w = bcy.Nf4Tensor(mapped, weight.absmax, (4, 128))
    same_values(w, weight.values())
    assert np.from_dlpack(w).shape == (256,)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(w)).dequantize(), weight.values())


def test_a_tensor_is_on_a_device():
    weight = Nf4Weight(4, 64)
    w = weight.tensor()
    assert w.to("cpu") is w
    assert w.nested is None
    assert bcy.Nf4MmvqPlan.select(w, weight.descriptor()).device == "cpu"


@pytest.mark.gpu
def test_to_cuda_and_back():
    for nested in (None, 4):
        for dtype in (np.uint8, np.float32):
            weight = Nf4Weight(8, 96, 32, "FP4", nested=nested)
            data = weight.data.view(dtype)
            outer = weight.tensor().nested
            w = bcy.Nf4Tensor(data, weight.absmax, (8, 96), 32, "FP4", nested=outer)
            there = w.to("cuda")
            assert there.device == "cuda:0"
            assert there.to("cuda") is there
            assert there.nbytes == w.nbytes
            same_values(there, weight.values())
            back = there.to("cpu")
            np.testing.assert_array_equal(back.data, weight.data)
            np.testing.assert_array_equal(back.absmax, weight.absmax)
            assert back.absmax.dtype == weight.absmax.dtype
            if nested:
                np.testing.assert_array_equal(back.nested.absmax, outer.absmax)
                np.testing.assert_array_equal(back.nested.code, outer.code)
                assert back.nested.offset == outer.offset
            same_values(pickle.loads(pickle.dumps(there)), weight.values())


@pytest.mark.gpu
def test_torch_storage_to_cuda():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    weight = Nf4Weight(8, 96, 32)
    data = torch.from_numpy(weight.data).view(torch.bfloat16).reshape(-1, 1)
    w = bcy.Nf4Tensor(data, torch.from_numpy(weight.absmax), (8, 96), 32)
    same_values(w.to("cuda"), weight.values())


@pytest.mark.gpu
def test_a_plan_of_a_tensor_is_where_the_tensor_is():
    w = Nf4Weight(8, 96, 32).tensor(Backend("cuda"))
    assert w.plan(3).device == "cuda:0"


def test_a_plan_of_a_tensor():
    weight = Nf4Weight(8, 96, 32, "FP4", nested=4)
    w = weight.tensor()
    preference = bcy.PlanPreference(threads=2)
    plan = w.plan(3, "bfloat16", "float32", preference, bias=True)
    assert plan.descriptor == weight.descriptor(
        3, activation="bfloat16", output="float32", bias=True
    )
    assert plan.preference is preference
    assert w.plan().descriptor == weight.descriptor(1, activation="float32")


# ---- codebooks -----------------------------------------------------------------------------------


def test_codebooks():
    assert VALUES[bcy.Codebook.NF4] == bcy.NF4_CODEBOOK
    for codebook, values in VALUES.items():
        assert len(values) == 16
        kept = np.array(values, np.float32)
        np.testing.assert_array_equal(kept.astype(np.float64), values)  # each is a float32
        np.testing.assert_array_equal(bits(kept), bits(reference.CODEBOOKS[codebook.name]))
        # And those of the kernels.
        data = np.arange(0, 16, dtype=np.uint8).repeat(2)
        codes = (data[0::2] << 4 | data[1::2]).reshape(-1)
        w = bcy.Nf4Tensor(codes, np.ones(1, np.float32), (1, 32), 32, codebook)
        np.testing.assert_array_equal(bits(bcy.dequantize(w)[0]), bits(kept.repeat(2)))


def test_nested_code():
    code = dynamic_code()
    assert (code.dtype, code.shape, code.flags.writeable) == (np.float32, (256,), False)
    np.testing.assert_array_equal(code, reference.NESTED_CODE)
    assert dynamic_code() is code


def specified_quantize_value(x, absmax):
    """The packer of the row-pair layout, step by step."""
    f32 = np.float32
    values = reference.CODEBOOKS["NF4"]
    if absmax == 0:
        return 7
    with np.errstate(all="ignore"):
        scaled = f32(x) / f32(absmax)
        best, distance = 0, abs(scaled - values[0])
        for code in range(1, 16):
            d = abs(scaled - values[code])
            if d < distance:
                best, distance = code, d
    return best


def specified_pack_weight(weight, n, k, block_size):
    absmax = np.zeros(n * k // block_size, np.float32)
    packed = np.zeros(n // 2 * k, np.uint8)
    for row in range(n):
        for b in range(k // block_size):
            a = np.float32(0)
            for j in range(block_size):
                v = abs(weight[row * k + b * block_size + j])
                if v > a:
                    a = v
            absmax[row * (k // block_size) + b] = a
            for j in range(block_size):
                at = b * block_size + j
                code = specified_quantize_value(weight[row * k + at], a)
                packed[row // 2 * k + at] |= code << (4 * (row & 1))
    return packed, absmax


def test_quantize_value():
    rng = np.random.default_rng(0)
    values = reference.CODEBOOKS["NF4"]
    middles = (values[:-1] + values[1:]) / np.float32(2)
    special = [0, -0.0, 1e-45, 1e38, -1e38, np.inf, -np.inf, np.nan]
    xs = [*values, *middles, *np.nextafter(middles, np.float32(1)), *special, *rng.normal(0, 1, 50)]
    for absmax in (1.0, 0.0, -0.0, 3.0, -1.0, 1e-45, np.inf, np.nan, 0.3):
        for x in xs:
            x = np.float32(x)
            assert bcy.nf4_quantize_value(x, absmax) == specified_quantize_value(
                x, np.float32(absmax)
            )
    assert bcy.nf4_quantize_value(float("nan"), 1.0) == 0
    assert bcy.nf4_quantize_value(float("inf"), 1.0) == 0
    assert type(bcy.nf4_quantize_value(1.0, 1.0)) is int
    assert bcy.nf4_quantize_value(1e300, 1.0) == 0  # beyond float32


def test_pack_weight():
    rng = np.random.default_rng(1)
    for n, k, block_size in (
        (2, 64, 64),
        (4, 96, 32),
        (6, 35, 5),
        (2, 1, 1),
        (0, 32, 32),
        (4, 0, 8),
    ):
        weight = rng.normal(0, 0.02, n * k).astype(np.float32)
        weight[::7] = 0
        if n * k > 200:
            weight[:block_size] = 0
            weight[40], weight[41], weight[100] = np.nan, np.inf, -np.inf
        packed, absmax = bcy.nf4_pack_weight(weight.reshape(n, k), n, k, block_size)
        want_packed, want_absmax = specified_pack_weight(weight, n, k, block_size)
        assert (packed.dtype, absmax.dtype) == (np.uint8, np.float32)
        np.testing.assert_array_equal(packed, want_packed)
        np.testing.assert_array_equal(absmax, want_absmax)
        w = bcy.Nf4Tensor(packed, absmax, (n, k), block_size, layout="row_pair")
        values = reference.nf4_values(packed, absmax, n, k, block_size, layout="row_pair")
        np.testing.assert_array_equal(bits(bcy.dequantize(w)), reference.finish(values))


def test_pack_weight_takes_lists_and_other_types():
    weight = random_activations(2, 32).astype(np.float64)
    want = bcy.nf4_pack_weight(weight.astype(np.float32), 2, 32, 16)
    for other in (weight, weight.tolist(), weight.reshape(-1)):
        got = bcy.nf4_pack_weight(other, 2, 32, 16)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])
    codes = np.arange(-32, 32)
    want = bcy.nf4_pack_weight(codes.astype(np.float32), 2, 32, 16)
    for kind in (np.int8, np.int64, np.float16, ml_dtypes.bfloat16, np.longdouble):
        got = bcy.nf4_pack_weight(codes.astype(kind), 2, 32, 16)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])


def test_the_bits_of_one_known_weight():
    """Written down, so that they stay what they are."""
    x = np.float32([0.5, -1, 0.25, 0, 1, -0.6, 0.1, -0.1] * 8)
    codes = [12, 0, 10, 7, 15, 2, 8, 6]
    packed, absmax = bcy.nf4_pack_weight(x, 2, 32, 32)
    assert packed.tolist() == [code | code << 4 for code in codes] * 4
    assert absmax.tolist() == [1, 1]
    w = bcy.quantize(x, "nf4", block_size=32)
    assert w.data.tobytes().hex() == "c0a7f286" * 8
    assert w.absmax.tolist() == [1, 1]
