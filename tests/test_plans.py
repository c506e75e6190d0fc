# SPDX-License-Identifier: Apache-2.0
"""What the plans compute: bit by bit against the specification, within bounds of float64."""

import functools
import pickle

import ml_dtypes
import numpy as np
import problems
import pytest
import reference
from problems import (
    BACKENDS,
    FLOATS,
    FORMATS,
    Backend,
    bias_of,
    bits,
    random_activations,
    random_weight,
)

import baracuda_cy as bcy

MS = (0, 1, 3, 8, 13, 33)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return Backend(request.param)


@pytest.fixture(scope="module")
def ggml():
    return problems.Ggml()


def shapes(name):
    """Odd rows; K of one block, of a broken unit, beyond all eight partial sums, and long."""
    block = problems.block_size(name)
    odd = 32 * 13 if block == 32 else 256 * 3
    return [(1, block), (7, odd), (19, 2048 + odd), (3, 14336)]


@functools.lru_cache(maxsize=256)
def expected(name, nrows, ncols, m, activation, path):
    """The specification's product, before bias and rounding."""
    weight = reference.decode(random_weight(name, nrows, ncols), name, nrows, ncols)
    x = random_activations(m, ncols, activation).astype(np.float32)
    if path == "staged":
        return reference.staged_product(weight, x)
    return reference.float_product(weight, x)


# ---- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", list(FLOATS))
@pytest.mark.parametrize("name", FORMATS)
def test_staged_product_has_the_specified_bits(backend, name, activation):
    for nrows, ncols in shapes(name):
        weight = random_weight(name, nrows, ncols)
        for m in MS:
            if m > 8 and ncols > 4096:
                continue
            x = random_activations(m, ncols, activation)
            exact = expected(name, nrows, ncols, m, activation, "staged")
            for output in FLOATS:
                plan = problems.staged_plan(
                    backend.device, name, nrows, ncols, m, activation, output
                )
                bias = bias_of(nrows, output) if m % 2 else None
                y = backend.run(plan, weight, x, bias)
                want = reference.finish(exact, bias, output)
                np.testing.assert_array_equal(bits(y), want, f"{plan}")


@pytest.mark.parametrize("activation", list(FLOATS))
@pytest.mark.parametrize("name", FORMATS)
def test_float_product_has_the_specified_bits(backend, name, activation):
    for nrows, ncols in shapes(name):
        weight = random_weight(name, nrows, ncols)
        for m in MS:
            if m > 3 and ncols > 1024:
                continue
            x = random_activations(m, ncols, activation)
            exact = expected(name, nrows, ncols, m, activation, "float")
            for output in {activation, "float32"}:
                plan = problems.float_plan(
                    backend.device, name, nrows, ncols, m, activation, output
                )
                bias = bias_of(nrows, output) if m % 2 else None
                y = backend.run(plan, weight, x, bias)
                want = reference.finish(exact, bias, output)
                np.testing.assert_array_equal(bits(y), want, f"{plan}")


@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_has_the_bits_of_ggml(backend, ggml, name):
    for nrows, ncols in shapes(name):
        data = np.random.default_rng(ncols).integers(
            0, 256, problems.packed_bytes(name, nrows, ncols), np.uint8
        )
        exact = ggml.dequantize(name, data, (nrows, ncols))
        for output in FLOATS:
            plan = problems.dequantize_plan(backend.device, name, nrows, ncols, output)
            y = backend.empty((nrows, ncols), output)
            plan.run(backend.put(data), y)
            want = reference.finish(exact, None, output)
            np.testing.assert_array_equal(bits(backend.get(y)), want, f"{plan}")


@pytest.mark.parametrize("name", FORMATS)
def test_the_specification_reads_blocks_as_ggml_does(ggml, name):
    data = random_weight(name, 5, 768, seed=3)
    ours = reference.decode(data, name, 5, 768).values()
    np.testing.assert_array_equal(ours, ggml.dequantize(name, data, (5, 768)))


def test_fma_of_the_specification_rounds_once():
    from fractions import Fraction

    rng = np.random.default_rng(0)
    for _ in range(4000):
        a, b = (np.float32(rng.standard_normal() * 2.0 ** rng.integers(-70, 40)) for _ in "ab")
        c = np.float32(rng.standard_normal() * 2.0 ** rng.integers(-120, 60))
        if rng.random() < 0.5:  # nearly cancelling, or within a bit of a tie
            c = np.float32(-float(a) * float(b) * rng.choice([1, 2.0**24, 2.0**25, 2.0**-24]))
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        got = reference.fma(a, b, c)
        if exact == 0 or not np.isfinite(got):
            continue
        neighbours = [np.nextafter(got, np.float32(way)) for way in (-np.inf, np.inf)]
        error = abs(Fraction(float(got)) - exact)
        for other in neighbours:
            if np.isfinite(other):
                distance = abs(Fraction(float(other)) - exact)
                assert error < distance or (error == distance and int(bits(got)) % 2 == 0)


def test_fma_of_the_specification_is_not_two_roundings():
    a = np.float32(1 + 2.0**-12)
    assert reference.fma(a, a, np.float32(-1)) != a * a - np.float32(1)


@pytest.mark.parametrize("dtype", list(FLOATS))
@pytest.mark.parametrize("value", [1e-37, 1e-36, 3e-30, 1e-5, 1.0, 6e4, 1e30, 3.4e38])
def test_activations_of_every_magnitude(backend, value, dtype):
    """Groups below 1e-36 stage to zero; no scale overflows or is lost."""
    weight = random_weight("Q4_K", 5, 512)
    with np.errstate(all="ignore"):
        if not np.isfinite(FLOATS[dtype](value)):
            pytest.skip(f"{value} is beyond {dtype}")
        x = (random_activations(4, 512).clip(-1, 1) * np.float32(value)).astype(FLOATS[dtype])
    decoded = reference.decode(weight, "Q4_K", 5, 512)
    for path, make in (("staged", problems.staged_plan), ("float", problems.float_plan)):
        plan = make(backend.device, "Q4_K", 5, 512, 4, dtype, "float32")
        y = backend.run(plan, weight, x)
        x32 = x.astype(np.float32)
        exact = (
            reference.staged_product(decoded, x32)
            if path == "staged"
            else reference.float_product(decoded, x32)
        )
        np.testing.assert_array_equal(bits(y), reference.finish(exact))


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_of_every_bit_pattern(backend, name):
    """Scales that are subnormal, infinite or NaN give what the specification gives."""
    rng = np.random.default_rng(5)
    nrows, ncols = 9, 1280
    data = rng.integers(0, 256, problems.packed_bytes(name, nrows, ncols), np.uint8)
    with np.errstate(all="ignore"):
        decoded = reference.decode(data, name, nrows, ncols)
    for m in (1, 3, 17):
        x = random_activations(m, ncols)
        for make, product in (
            (problems.staged_plan, reference.staged_product),
            (problems.float_plan, reference.float_product),
        ):
            plan = make(backend.device, name, nrows, ncols, m)
            got = bits(backend.run(plan, data, x))
            with np.errstate(all="ignore"):
                want = reference.finish(product(decoded, x))
            np.testing.assert_array_equal(got, want, f"{plan}")


# ---- size of the error ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_error_is_within_bounds(backend, ggml, name):
    weight, x = problems.gaussian()
    data = ggml.quantize(name, weight)
    dense = ggml.dequantize(name, data, weight.shape).astype(np.float64)
    packed = bcy.GgufTensor(data, name, weight.shape)
    packed = packed.to(backend.device)

    def error(make, activation, output):
        stored = x.astype(FLOATS[activation])
        exact = stored.astype(np.float64) @ dense.T
        plan = make(backend.device, name, *weight.shape, 16, activation, output)
        y = backend.run(plan, packed, stored).astype(np.float64)
        return np.linalg.norm(y - exact) / np.linalg.norm(exact)

    for activation in FLOATS:
        assert error(problems.staged_plan, activation, "float32") <= 5.6e-3
    assert error(problems.float_plan, "float32", "float32") <= 5e-7
    assert error(problems.float_plan, "float16", "float32") <= 5e-6
    assert error(problems.float_plan, "bfloat16", "float32") <= 5e-6
    assert error(problems.float_plan, "float16", "float16") <= 3.5e-4
    assert error(problems.float_plan, "bfloat16", "bfloat16") <= 2.6e-3


@pytest.mark.parametrize(("dtype", "below"), [("float16", 12), ("bfloat16", 15), ("float32", 0)])
def test_the_float_path_takes_24_bits(backend, dtype, below):
    """Few bits are exact far below the largest of their group; the rest is to 2**-23 of it."""
    n = 64
    rng = np.random.default_rng(below)
    blocks = np.zeros((n, n // 32, 34), np.uint8)
    blocks[..., :2] = np.float16(1).reshape(1).view(np.uint8)
    blocks[np.arange(n), np.arange(n) // 32, 2 + np.arange(n) % 32] = 1  # the identity
    x = rng.choice([-1, 1], (9, n)) * np.exp2(rng.uniform(-below, 0.99, (9, n)))
    x[:, ::32] = [[1.0], [-1.5], *7 * [[2 - (2.0**-7 if below else 2.0**-23)]]]
    x = x.astype(FLOATS[dtype])
    for m in (1, 9):
        plan = problems.float_plan(backend.device, "Q8_0", n, n, m, dtype, "float32")
        y = backend.run(plan, blocks.reshape(-1), x[:m])
        if dtype == "float32":
            assert np.abs(y.astype(np.float64) - x[:m]).max() <= 2.0**-23
            assert (y != x[:m]).any()
        else:
            np.testing.assert_array_equal(y, x[:m].astype(np.float32))


@pytest.mark.parametrize("value", [3e38, 1e-40, 2.0**-100])
@pytest.mark.parametrize("name", ["Q4_1", "Q8_K", "MXFP4"])
def test_the_float_path_at_the_ends_of_float32(backend, name, value):
    """Sums beyond float32, scales below its normal numbers: as specified, whatever that loses."""
    ncols = problems.block_size(name)
    weight = random_weight(name, 5, ncols)
    x = np.full((3, ncols), value, np.float32)
    want = reference.float_product(reference.decode(weight, name, 5, ncols), x)
    for m in (1, 3):
        plan = problems.float_plan(backend.device, name, 5, ncols, m)
        np.testing.assert_array_equal(
            bits(backend.run(plan, weight, x[:m])), reference.finish(want[:m])
        )


# ---- where values are ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["staged", "float"])
@pytest.mark.parametrize("padding", [(0, 0), (5, 0), (0, 3), (32, 64)])
@pytest.mark.parametrize("m", [1, 2, 9, 70])
def test_padded_rows(backend, path, padding, m):
    make = problems.staged_plan if path == "staged" else problems.float_plan
    weight, x = random_weight("Q5_1", 11, 96), random_activations(m, 96)
    plan = make(backend.device, "Q5_1", 11, 96, m)
    plain = backend.run(plan, weight, x)
    np.testing.assert_array_equal(backend.run(plan, weight, x, padding=padding), plain)


def test_padding_of_an_output_is_left_alone():
    wide = np.full((4, 20), 9, np.float32)
    plan = problems.staged_plan("cpu", "Q8_0", 16, 64, 4)
    workspace = bcy.Workspace(plan.workspace_size, device="cpu")
    plan.run(
        random_weight("Q8_0", 16, 64), random_activations(4, 64), wide[:, 2:18], workspace=workspace
    )
    assert (wide[:, :2] == 9).all()
    assert (wide[:, 18:] == 9).all()
    assert (wide[:, 2:18] != 9).all()
    dense = np.full((16, 70), 9, np.float32)
    problems.dequantize_plan("cpu", "Q8_0", 16, 64).run(
        random_weight("Q8_0", 16, 64), dense[:, 3:67]
    )
    assert (dense[:, :3] == 9).all()
    assert (dense[:, 67:] == 9).all()
    np.testing.assert_array_equal(
        dense[:, 3:67], reference.decode(random_weight("Q8_0", 16, 64), "Q8_0", 16, 64).values()
    )


@pytest.mark.parametrize("path", ["staged", "float"])
def test_a_token_may_be_a_vector(backend, path):
    make = problems.staged_plan if path == "staged" else problems.float_plan
    weight, x = random_weight("Q4_0", 9, 64), random_activations(1, 64)
    plan = make(backend.device, "Q4_0", 9, 64, 1)
    y = backend.empty((9,), "float32")
    plan.run(backend.put(weight), backend.put(x[0]), y, workspace=backend.workspace(plan))
    np.testing.assert_array_equal(backend.get(y), backend.run(plan, weight, x)[0])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("blocks", [1, 5])
def test_byte_offset(backend, name, blocks):
    nrows, ncols = 6, 256
    whole = random_weight(name, nrows + 5, ncols)
    _, _, size = reference.FORMATS[name]
    offset = blocks * size
    if offset % bcy.GgufBlockFormat[name].alignment:
        pytest.skip("no multiple of the alignment")
    part = whole[offset : offset + problems.packed_bytes(name, nrows, ncols)].copy()
    x = random_activations(2, ncols)
    for make in (problems.staged_plan, problems.float_plan):
        at_offset = make(backend.device, name, nrows, ncols, 2, w_start_byte_offset=offset)
        plain = make(backend.device, name, nrows, ncols, 2)
        np.testing.assert_array_equal(backend.run(at_offset, whole, x), backend.run(plain, part, x))
    y = backend.empty((nrows, ncols), "float32")
    problems.dequantize_plan(backend.device, name, nrows, ncols, w_start_byte_offset=offset).run(
        backend.put(whole), y
    )
    np.testing.assert_array_equal(
        backend.get(y), reference.decode(part, name, nrows, ncols).values()
    )


@pytest.mark.parametrize("shape", [(1, -1), (-1, 18), (2, 2, -1), (-1,)])
def test_packed_bytes_of_any_rank(shape):
    weight, x = random_weight("Q4_0", 8, 64), random_activations(2, 64)
    backend, plan = Backend("cpu"), problems.staged_plan("cpu", "Q4_0", 8, 64, 2)
    plain = backend.run(plan, weight, x)
    np.testing.assert_array_equal(backend.run(plan, weight.reshape(shape), x), plain)
    np.testing.assert_array_equal(backend.run(plan, weight.view(np.int8), x), plain)
    y = np.empty((2, 8), np.float32)
    plan.run(weight.tobytes(), x, y, workspace=bcy.Workspace(plan.workspace_size, device="cpu"))
    np.testing.assert_array_equal(y, plain)


def test_any_array_of_bytes_is_a_workspace():
    weight, x = random_weight("Q4_0", 8, 64), random_activations(2, 64)
    backend, plan = Backend("cpu"), problems.staged_plan("cpu", "Q4_0", 8, 64, 2)
    plain = backend.run(plan, weight, x)
    memory = np.zeros(plan.workspace_size + 512, np.uint8)
    start = -memory.ctypes.data % 256
    lent = memory[start : start + plan.workspace_size + 256]
    np.testing.assert_array_equal(backend.run(plan, weight, x, workspace=lent), plain)
    floats = lent[: -(-plan.workspace_size // 4) * 4].view(np.float32).reshape(1, -1)
    np.testing.assert_array_equal(backend.run(plan, weight, x, workspace=floats), plain)
    assert (memory[:start] == 0).all()
    assert (lent[plan.workspace_size :] == 0).all()


# ---- nothing to compute --------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["staged", "float"])
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q6_K"])
def test_no_columns_gives_zeros_and_bias(backend, path, name):
    make = problems.staged_plan if path == "staged" else problems.float_plan
    plan = make(backend.device, name, 5, 0, 3)
    nothing, x = np.zeros(0, np.uint8), np.zeros((3, 0), np.float32)
    y = backend.run(plan, nothing, x)
    np.testing.assert_array_equal(bits(y), np.zeros((3, 5), np.uint32))
    bias = bias_of(5, "float32")
    np.testing.assert_array_equal(backend.run(plan, nothing, x, bias), np.tile(bias, (3, 1)))


@pytest.mark.parametrize("path", ["staged", "float"])
@pytest.mark.parametrize(("nrows", "m"), [(0, 3), (0, 20), (5, 0), (0, 0)])
@pytest.mark.parametrize("ncols", [64, 512])
def test_no_rows_and_no_tokens(backend, path, nrows, m, ncols):
    make = problems.staged_plan if path == "staged" else problems.float_plan
    plan = make(backend.device, "Q8_0", nrows, ncols, m)
    weight = random_weight("Q8_0", nrows, ncols)
    assert backend.run(plan, weight, np.zeros((m, ncols), np.float32)).shape == (m, nrows)


def test_no_elements_to_dequantize(backend):
    for nrows, ncols in ((0, 64), (4, 0)):
        plan = problems.dequantize_plan(backend.device, "Q8_0", nrows, ncols)
        y = backend.empty((nrows, ncols), "float32")
        plan.run(backend.put(np.zeros(0, np.uint8)), y)


@pytest.mark.parametrize("path", ["staged", "float"])
def test_arguments_are_checked_although_there_is_nothing_to_compute(path):
    make = problems.staged_plan if path == "staged" else problems.float_plan
    plan = make("cpu", "Q8_0", 0, 64, 3)
    with pytest.raises(bcy.InvalidProblem, match=r"activations: expected shape \[3, 64\]"):
        plan.run(
            np.zeros(0, np.uint8),
            np.zeros((3, 32), np.float32),
            np.zeros((3, 0), np.float32),
            workspace=np.zeros(4096, np.uint8),
        )


@pytest.mark.parametrize("path", ["staged", "float"])
def test_more_than_two_to_the_31_weights(backend, path):
    if problems.EMULATED:
        pytest.skip("needs a real GPU: an emulated one takes minutes")
    make = problems.staged_plan if path == "staged" else problems.float_plan
    nrows = 2**26 + 3
    weight = np.zeros(packed := problems.packed_bytes("Q4_0", nrows, 32), np.uint8)  # untouched
    last = random_weight("Q4_0", 5, 32)
    weight[packed - last.size :] = last
    x = np.linspace(-3, 2, 32, dtype=np.float16)[None]
    plan = make(backend.device, "Q4_0", nrows, 32, 1, "float16", "float16")
    y = backend.run(plan, weight, x)
    few = make(backend.device, "Q4_0", 5, 32, 1, "float16", "float16")
    np.testing.assert_array_equal(bits(y[:, -5:]), bits(backend.run(few, last, x)))
    assert y[:, -5:].any()
    assert not y[:, :-5].any()


# ---- NaN and infinity ----------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("path", ["staged", "float"])
def test_a_broken_token_stays_alone(backend, path, poison):
    make = problems.staged_plan if path == "staged" else problems.float_plan
    weight, x = random_weight("Q4_K", 21, 1024), random_activations(9, 1024)
    plan = make(backend.device, "Q4_K", 21, 1024, 9)
    clean = backend.run(plan, weight, x)
    x[4, 700] = poison
    y = backend.run(plan, weight, x)
    others = np.arange(9) != 4
    np.testing.assert_array_equal(bits(y[others]), bits(clean[others]))
    assert not np.isfinite(y[4]).any()
    if path == "staged" or np.isnan(poison):
        assert (bits(y[4]) == 0x7FC00000).all()


@pytest.mark.parametrize("output", list(FLOATS))
@pytest.mark.parametrize("path", ["staged", "float"])
def test_a_broken_weight_row_stays_alone(backend, path, output):
    weight, x = random_weight("Q8_0", 21, 1024), random_activations(5, 1024, output)
    make = problems.staged_plan if path == "staged" else problems.float_plan
    plan = make(backend.device, "Q8_0", 21, 1024, 5, output, output)
    clean = backend.run(plan, weight, x)
    broken = weight.copy()
    row_bytes = 1024 // 32 * 34
    broken[7 * row_bytes + 34 * 3 : 7 * row_bytes + 34 * 3 + 2] = (0x01, 0xFC)  # a NaN of its own
    y = backend.run(plan, broken, x)
    others = np.arange(21) != 7
    np.testing.assert_array_equal(bits(y[:, others]), bits(clean[:, others]))
    one_nan = {"float32": 0x7FC00000, "float16": 0x7E00, "bfloat16": 0x7FC0}[output]
    assert (bits(y[:, 7]) == one_nan).all()


# ---- what a plan says ----------------------------------------------------------------------------


def test_a_plan_prints_as_one_line():
    from baracuda_cy import _cpu

    machine = f"cpu {_cpu.isa()}"
    promises = "deterministic, batch-invariant, same bits on every backend"
    plan = problems.staged_plan("cpu", "Q4_K", 4096, 4096, 8, "float16")
    assert repr(plan) == (
        "GgufMmvqMultiMPlan(Q4_K 4096x4096, m=8, float16 -> float32, staged int8, "
        f"{machine}; {promises})"
    )
    plan = problems.float_plan("cpu", "Q8_0", 3, 64, 1, preference=bcy.PlanPreference(threads=2))
    assert repr(plan) == (
        "GgufMmvqPlan(Q8_0 3x64, m=1, float32 -> float32, float activations, "
        f"{machine}, 2 threads; {promises})"
    )
    plan = problems.dequantize_plan("cpu", "Q8_0", 3, 64, "bfloat16")
    assert repr(plan) == f"GgufDequantizePlan(Q8_0 3x64 -> bfloat16, {machine}; {promises})"


def test_sku(backend):
    plan = problems.staged_plan(backend.device, "Q4_K", 8, 256, 2, "float16")
    sku = plan.sku
    assert (sku.category, sku.op) == (
        bcy.OpCategory.QUANTIZATION,
        bcy.QuantizeKind.GGUF_MMVQ,
    )
    assert (sku.element, sku.aux_element, sku.output_element) == (
        bcy.ElementKind.F16,
        bcy.ElementKind.U8,
        bcy.ElementKind.F32,
    )
    assert (sku.activations, sku.block_format) == ("staged", bcy.GgufBlockFormat.Q4_K)
    assert sku.precision_guarantee is plan.precision_guarantee
    assert plan.precision_guarantee == bcy.PrecisionGuarantee(
        math_precision="INT8",
        accumulator="F32",
        deterministic=True,
        bit_stable_on_same_hardware=True,
        batch_invariant=True,
        bit_stable_across_hardware=True,
    )
    if backend.device == "cpu":
        assert (sku.backend, sku.arch) == (bcy.BackendKind.CPU, bcy.ArchSku.CPU)
        assert sku.isa
    else:
        assert sku.backend is bcy.BackendKind.BESPOKE
        assert sku.arch.name.startswith("SM")
        assert sku.isa is None
    floating = problems.float_plan(backend.device, "Q4_K", 8, 256, 2, "float16").sku
    assert floating.activations == "float"
    assert floating.precision_guarantee.math_precision is bcy.MathPrecision.F32
    assert floating != sku
    dequantize = problems.dequantize_plan(backend.device, "Q4_K", 8, 256).sku
    assert dequantize.op is bcy.QuantizeKind.GGUF_DEQUANTIZE
    assert dequantize.activations is None


def test_workspace_size(backend):
    staged = problems.staged_plan(backend.device, "Q4_K", 8, 4096, 24)
    assert 24 * 4096 * 36 // 32 <= staged.workspace_size <= 24 * 4096 * 2
    assert problems.float_plan(backend.device, "Q4_K", 8, 4096, 3).workspace_size == 0
    assert problems.dequantize_plan(backend.device, "Q4_K", 8, 4096).workspace_size == 0
    assert problems.staged_plan(backend.device, "Q4_K", 8, 4096, 0).workspace_size == 0


def test_validate_runs_nothing(backend):
    plan = problems.staged_plan(backend.device, "Q8_0", 4, 64, 2)
    weight, x = backend.put(random_weight("Q8_0", 4, 64)), backend.put(random_activations(2, 64))
    y = backend.empty((2, 4), "float32")
    plan.validate(weight, x, y)
    assert plan.can_implement(weight, x, y) is True
    assert plan.can_implement(weight, x, y, bias=backend.put(np.zeros(4, np.float32))) is True
    assert plan.can_implement(weight, y, x) is False
    assert plan.can_implement(weight, x, None) is False
    assert (backend.get(y) == 77).all()
    unpack = problems.dequantize_plan(backend.device, "Q8_0", 4, 64)
    dense = backend.empty((4, 64), "float32")
    unpack.validate(weight, dense)
    assert unpack.can_implement(weight, dense) is True
    assert unpack.can_implement(weight, x) is False
    assert (backend.get(dense) == 77).all()


@pytest.mark.parametrize(
    "device", ["cpu", "cpu:0", np.zeros(1), bcy.GgufTensor(b"", "Q8_0", (0, 32))]
)
def test_device_of_a_plan(device):
    assert problems.staged_plan(device, "Q8_0", 4, 64, 2).device == "cpu"


def test_device_of_torch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    assert problems.staged_plan(torch.device("cpu"), "Q8_0", 4, 64, 2).device == "cpu"
    assert problems.staged_plan(torch.zeros(1), "Q8_0", 4, 64, 2).device == "cpu"


@pytest.mark.gpu
def test_device_of_a_cuda_plan():
    stream = bcy.Stream()
    buffer = bcy.DeviceBuffer(16)
    for device in ("cuda", "cuda:0", stream, buffer):
        assert problems.staged_plan(device, "Q8_0", 4, 64, 2).device == "cuda:0"


def test_a_plan_keeps_what_it_was_made_from():
    preference = bcy.PlanPreference(threads=2)
    plan = problems.staged_plan("cpu", "Q8_0", 4, 64, 2, preference=preference)
    assert plan.descriptor == bcy.GgufMmvqMultiMDescriptor(
        nrows=4, ncols=64, m=2, block_format="Q8_0"
    )
    assert plan.preference is preference
    for name in ("descriptor", "sku", "workspace_size", "device", "precision_guarantee"):
        with pytest.raises(AttributeError):
            setattr(plan, name, None)


def test_a_plan_pickles_as_its_selection():
    for plan in (
        problems.staged_plan("cpu", "Q8_0", 4, 64, 2, preference=bcy.PlanPreference(threads=2)),
        problems.float_plan("cpu", "Q8_0", 4, 64, 2, "float16"),
        problems.dequantize_plan("cpu", "Q8_0", 4, 64),
    ):
        other = pickle.loads(pickle.dumps(plan))
        assert repr(other) == repr(plan)
        assert other.descriptor == plan.descriptor


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_do_not_change_the_bits(threads):
    weight, x = random_weight("Q4_K", 203, 1024), random_activations(5, 1024)
    backend = Backend("cpu")
    preference = bcy.PlanPreference(threads=threads)
    for make in (problems.staged_plan, problems.float_plan):
        plain = backend.run(make("cpu", "Q4_K", 203, 1024, 5), weight, x)
        plan = make("cpu", "Q4_K", 203, 1024, 5, preference=preference)
        np.testing.assert_array_equal(bits(backend.run(plan, weight, x)), bits(plain))


def test_a_weight_is_its_bytes():
    name, x = "Q6_K", random_activations(2, 512)
    data = random_weight(name, 7, 512)
    plan = problems.staged_plan("cpu", name, 7, 512, 2)
    y = Backend("cpu").run(plan, data, x)
    packed = bcy.GgufTensor(data, name, (7, 512))
    np.testing.assert_array_equal(Backend("cpu").run(plan, packed, x), y)
    experts = bcy.GgufTensor(data, name, (7, 1, 512))
    np.testing.assert_array_equal(Backend("cpu").run(plan, experts, x), y)


def test_bfloat16_needs_no_ml_dtypes_in_the_plans():
    """bfloat16 is known by DLPack's code, never by NumPy's dtype."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = torch.from_numpy(random_activations(2, 64)).to(torch.bfloat16)
    weight = random_weight("Q8_0", 4, 64)
    plan = problems.float_plan("cpu", "Q8_0", 4, 64, 2, "bfloat16")
    y = torch.empty(2, 4, dtype=torch.bfloat16)
    plan.run(weight, x, y)
    ours = Backend("cpu").run(plan, weight, x.float().numpy().astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(y.view(torch.int16).numpy().view(np.uint16), bits(ours))
