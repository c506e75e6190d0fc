# SPDX-License-Identifier: Apache-2.0
"""What the plans of NF4 and FP4 compute, and what only they promise."""

import hashlib
import itertools
import pickle

import hypothesis.strategies as st
import numpy as np
import pytest
import reference
from hypothesis import example, given, settings
from problems import (
    BACKENDS,
    CODEBOOKS,
    EXACT,
    FLOATS,
    LAYOUTS,
    NF4_PATHS,
    Backend,
    Nf4Weight,
    bias_of,
    bits,
    gaussian,
    in_another_process,
    random_activations,
)

import baracuda_cy as bcy
from baracuda_cy import _cuda
from baracuda_cy.errors import WorkspaceTooSmall

MS = (0, 1, 3, 8, 13, 33)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Odd rows and columns; blocks across the ends of rows; a broken group; all eight partial sums and
# a second round of the first; what the fast kernels are for.
SHAPES = {
    "bitsandbytes": [
        (1, 1, 32),
        (7, 33, 32),
        (3, 100, 64),
        (5, 96, 4096),
        (19, 2461, 64),
        (37, 4096, 64),
        (33, 2304, 128),
    ],
    "row_pair": [(2, 1, 1), (6, 35, 5), (8, 96, 32), (20, 2464, 77), (38, 4096, 64)],
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return Backend(request.param)


@pytest.fixture(params=NF4_PATHS)
def path(request):
    """A backend, and the preference to select with."""
    device, preference = request.param
    return Backend(device), preference


def exact(backend):
    return None if backend.device == "cpu" else EXACT


# ---- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", list(FLOATS))
@pytest.mark.parametrize("nested", [None, 256])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_product_has_the_specified_bits(backend, codebook, layout, nested, activation):
    for n, k, block_size in SHAPES[layout]:
        weight = Nf4Weight(n, k, block_size, codebook, layout, nested)
        for m in MS:
            if m > 3 and k > 1000:
                continue
            x = random_activations(m, k, activation)
            product = weight.exact_product(x)
            for output in {activation, "float32"}:
                bias = bias_of(n, output) if m % 2 else None
                y = weight.product(backend, x, output, bias, preference=exact(backend))
                want = reference.finish(product, bias, output)
                np.testing.assert_array_equal(bits(y), want, f"{n}x{k} {block_size=} {m=} {output}")


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_product_of_every_block_size(backend, codebook, block_size):
    for n, k in ((5, 4096), (3, 4128), (2, 8191)):
        weight = Nf4Weight(n, k, block_size, codebook, nested=64)
        x = random_activations(2, k)
        want = reference.finish(weight.exact_product(x))
        got = weight.product(backend, x, preference=exact(backend))
        np.testing.assert_array_equal(bits(got), want)


@pytest.mark.parametrize("nested", [None, 1, 256])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_dequantize_has_the_specified_bits(backend, codebook, layout, nested):
    shapes = SHAPES[layout]
    if layout == "bitsandbytes":
        shapes = [*shapes, *((3, 8191, block_size) for block_size in BLOCK_SIZES)]
    for n, k, block_size in shapes:
        weight = Nf4Weight(n, k, block_size, codebook, layout, nested)
        values = weight.values()
        for output in FLOATS:
            plan = bcy.Nf4DequantizePlan.select(backend.device, weight.descriptor(output=output))
            # Rows apart come through the CUDA array interface, which knows no bfloat16.
            for padding in (0,) if (backend.device, output) == ("cuda", "bfloat16") else (0, 5):
                y = backend.empty((n, k), output, padding)
                plan.run(weight.tensor(backend), y)
                want = reference.finish(values, None, output)
                np.testing.assert_array_equal(bits(backend.get(y)), want, f"{plan} {padding=}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_scales_of_every_bit_pattern(backend, codebook, layout):
    """NaN, infinite, negative and subnormal scales are data."""
    rng = np.random.default_rng(5)
    weight = Nf4Weight(8, 192, 64, codebook, layout)
    weight.absmax = rng.integers(0, 2**32, 24, np.uint32).view(np.float32)
    weight.absmax[:6] = [np.nan, np.inf, -np.inf, 0, -0.0, 1e-44]
    with np.errstate(all="ignore"):
        values = weight.values()
        for output in FLOATS:
            y = backend.empty((8, 192), output)
            bcy.Nf4DequantizePlan.select(backend.device, weight.descriptor(output=output)).run(
                weight.tensor(backend), y
            )
            want = reference.finish(values, None, output)
            np.testing.assert_array_equal(bits(backend.get(y)), want)
        x = random_activations(3, 192)
        y = weight.product(backend, x, preference=exact(backend))
        want = reference.finish(weight.exact_product(x))
    np.testing.assert_array_equal(bits(y), want)


def test_not_a_number_stays_in_its_row_and_token(path):
    backend, preference = path
    weight = Nf4Weight(9, 256)
    weight.absmax[4 * 5 + 1] = np.nan
    x = random_activations(4, 256, "float16")
    x[2, 7] = np.inf
    y = weight.product(backend, x, "float32", preference=preference)
    wrong = ~np.isfinite(y)
    assert wrong[:, 5].all()
    assert wrong[2].all()
    assert not np.delete(np.delete(wrong, 5, 1), 2, 0).any()


# ---- size of the error ---------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_error_is_within_bounds(path, codebook, nested):
    backend, preference = path
    dense, x = gaussian()
    host = bcy.quantize(dense, codebook, nested=nested)
    parts = None
    if nested:
        tables = host.nested
        parts = (np.asarray(tables.code), np.asarray(tables.absmax), tables.offset, 256)
    values = reference.nf4_values(
        host.data, host.absmax, *dense.shape, 64, codebook.upper(), nested=parts
    ).astype(np.float64)
    w = host.to(backend.device)

    def error(activation, output):
        stored = x.astype(FLOATS[activation])
        product = stored.astype(np.float64) @ values.T
        y = backend.empty((16, len(dense)), output)
        w.plan(16, activation, output, preference).run(w, backend.put(stored), y)
        return np.linalg.norm(backend.get(y) - product) / np.linalg.norm(product)

    assert error("float32", "float32") <= 5e-7
    assert error("float16", "float32") <= 5e-6
    assert error("bfloat16", "float32") <= 5e-6
    assert error("float16", "float16") <= 3.5e-4
    assert error("bfloat16", "bfloat16") <= 2.6e-3


@pytest.mark.parametrize("activation", ["float16", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_of_odd_shapes(path, layout, activation):
    """Whatever kernel takes them, the product is the product."""
    backend, preference = path
    for n, k, block_size in SHAPES[layout]:
        weight = Nf4Weight(n, k, block_size, layout=layout, nested=256)
        values = weight.values()
        for m in (1, 2, 5, 17, 40):
            x = random_activations(m, k, activation)
            product = x.astype(np.float64) @ values.astype(np.float64).T
            size = np.abs(x.astype(np.float64)) @ np.abs(values.astype(np.float64)).T
            bias = bias_of(n, "float32")
            y = weight.product(backend, x, "float32", bias, preference=preference)
            assert (np.abs(y - (product + bias)) <= 2e-6 * (size + np.abs(bias)) + 1e-30).all()


# ---- where values are ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding", [(5, 0), (0, 3), (32, 64)])
@pytest.mark.parametrize("m", [1, 2, 9])
def test_padded_rows(path, padding, m, layout):
    backend, preference = path
    for k in (96, 512):
        weight, x = Nf4Weight(12, k, 32, layout=layout), random_activations(m, k, "float16")
        plain = weight.product(backend, x, preference=preference)
        moved = weight.product(backend, x, preference=preference, padding=padding)
        np.testing.assert_array_equal(bits(moved), bits(plain))


def test_padding_of_an_output_is_left_alone():
    weight, x = Nf4Weight(16, 64), random_activations(4, 64)
    wide = np.full((4, 20), 9, np.float32)
    weight.plan("cpu", 4).run(weight.tensor(), x, wide[:, 2:18])
    assert (wide[:, :2] == 9).all()
    assert (wide[:, 18:] == 9).all()
    np.testing.assert_array_equal(wide[:, 2:18], weight.product(Backend("cpu"), x))
    dense = np.full((16, 70), 9, np.float32)
    bcy.Nf4DequantizePlan.select("cpu", weight.descriptor(output="float32")).run(
        weight.tensor(), dense[:, 3:67]
    )
    assert (dense[:, :3] == 9).all()
    assert (dense[:, 67:] == 9).all()
    np.testing.assert_array_equal(dense[:, 3:67], weight.values())


@pytest.mark.parametrize("activation", list(FLOATS))
@pytest.mark.parametrize(
    ("layout", "block_size", "k"),
    [("bitsandbytes", 64, 192), ("bitsandbytes", 32, 1003), ("row_pair", 64, 2304)],
)
def test_a_token_may_be_a_vector(path, layout, block_size, k, activation):
    backend, preference = path
    weight = Nf4Weight(38, k, block_size, layout=layout, nested=256)
    w, x = weight.tensor(backend), random_activations(1, k, activation)
    single = bcy.Nf4MmvqPlan.select(
        backend.device, weight.descriptor(activation=activation), preference
    )
    want = weight.product(backend, x, preference=preference)
    for plan in (single, weight.plan(backend.device, 1, activation, preference=preference)):
        y = backend.empty((38,), activation)
        plan.run(w, backend.put(x[0]), y)
        np.testing.assert_array_equal(bits(backend.get(y)), bits(want[0]))
        y = backend.empty((1, 38), activation)
        plan.run(w, backend.put(x), y)
        np.testing.assert_array_equal(bits(backend.get(y)), bits(want))


def at_offset(backend, array, offset):
    """`array` on the device, `offset` bytes into memory that is aligned to 256."""
    raw = np.zeros(array.nbytes + offset + 512, np.uint8)
    raw[:] = 0xA5
    if backend.device == "cpu":
        start = -raw.ctypes.data % 256 + offset
        raw[start : start + array.nbytes] = array.view(np.uint8).reshape(-1)
        return raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    raw[offset : offset + array.nbytes] = array.view(np.uint8).reshape(-1)
    buffer = bcy.DeviceBuffer.from_host(raw, device=backend.device)
    kind = (
        "uint8"
        if array.dtype == np.uint8
        else next(name for name, dtype in FLOATS.items() if array.dtype == dtype)
    )
    return bcy.DeviceArray(array.shape, kind, buffer, offset=offset)


@pytest.mark.parametrize("nested", [None, 256])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", list(FLOATS))
def test_another_alignment(path, activation, layout, nested):
    """Codes at any byte; scales, activations, bias and output at any element."""
    backend, preference = path
    item = np.dtype(FLOATS[activation]).itemsize
    for k in (200, 512):
        weight = Nf4Weight(38, k, 8 if layout == "row_pair" else 64, "NF4", layout, nested)
        for m in (1, 5):
            x, bias = random_activations(m, k, activation), bias_of(38, activation)
            plan = weight.plan(backend.device, m, activation, bias=True, preference=preference)
            first = weight.product(backend, x, bias=bias, plan=plan)
            for step in (1, 2, 3, 7, 9, 16):
                outer = None
                if nested:
                    code, scales, offset, block = weight.nested
                    outer = bcy.NestedAbsmax(
                        at_offset(backend, code, 4 * step),
                        at_offset(backend, scales, 4 * step),
                        offset,
                        block,
                    )
                unit = 1 if nested else 4
                y = at_offset(backend, np.full((m, 38), 77, FLOATS[activation]), step * item)
                plan.run(
                    at_offset(backend, weight.data, step),
                    at_offset(backend, x, step * item),
                    y,
                    absmax=at_offset(backend, weight.absmax, step * unit),
                    nested=outer,
                    bias=at_offset(backend, bias, step * item),
                )
                np.testing.assert_array_equal(bits(backend.get(y)), bits(first), f"{step=}")


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [None, 64, 256])
@pytest.mark.parametrize("activation", ["float16", "bfloat16"])
def test_scales_wherever_they_lie(activation, nested):
    """Scales at multiples of 16 bytes come with the codes, others do not: the bits are the same."""
    backend = Backend("cuda")
    # Part of a round of eight units; rounds, and part of one; whole rounds.
    for n, k in ((37, 1024), (150, 5120), (21, 4096)):
        weight = Nf4Weight(n, k, nested=nested)
        codes, _, outer = weight.parts(backend)
        for m in (1, 7, 16, 40):
            x = random_activations(m, k, activation)
            plan = weight.plan("cuda", m, activation, "float32")
            together = weight.product(backend, x, "float32", plan=plan)
            y = backend.empty((m, n), "float32")
            apart = at_offset(backend, weight.absmax, weight.absmax.itemsize)
            plan.run(codes, backend.put(x), y, absmax=apart, nested=outer)
            np.testing.assert_array_equal(bits(together), bits(backend.get(y)))


@pytest.mark.parametrize("shape", [(1, -1), (-1, 1), (2, 2, -1), (-1,)])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "float16", "bfloat16", "float32"])
def test_codes_of_any_rank_and_storage(backend, shape, dtype):
    weight, x = Nf4Weight(8, 64, 32), random_activations(2, 64)
    plain = weight.product(backend, x)
    data = weight.data.view({**FLOATS, "uint8": np.uint8, "int8": np.int8}[dtype]).reshape(shape)
    plan, y = weight.plan(backend.device, 2), backend.empty((2, 8), "float32")
    codes = backend.put(data) if data.ndim < 3 else backend.put(data.reshape(1, -1))
    absmax = backend.put(weight.absmax.reshape(4, 4))
    plan.run(codes, backend.put(x), y, absmax=absmax)
    np.testing.assert_array_equal(backend.get(y), plain)
    w = bcy.Nf4Tensor(codes, absmax, (8, 64), 32)
    np.testing.assert_array_equal(weight.product(backend, x, tensor=w), plain)
    y = backend.empty((8, 64), "float32")
    bcy.Nf4DequantizePlan.select(backend.device, weight.descriptor(output="float32")).run(
        codes, y, absmax=absmax
    )
    np.testing.assert_array_equal(backend.get(y), weight.values())


def test_parts_are_as_good_as_a_tensor(path):
    backend, preference = path
    for nested in (None, 256):
        weight, x = Nf4Weight(9, 192, nested=nested), random_activations(3, 192, "float16")
        data, absmax, outer = weight.parts(backend)
        plan = weight.plan(backend.device, 3, "float16", preference=preference)
        y = backend.empty((3, 9), "float16")
        plan.run(data, backend.put(x), y, absmax=absmax, nested=outer)
        want = weight.product(backend, x, preference=preference)
        np.testing.assert_array_equal(bits(backend.get(y)), bits(want))


def test_buffers_are_weights():
    weight, x = Nf4Weight(8, 64), random_activations(2, 64)
    y = np.empty((2, 8), np.float32)
    weight.plan("cpu", 2).run(weight.data.tobytes(), x, y, absmax=weight.absmax)
    np.testing.assert_array_equal(y, weight.product(Backend("cpu"), x))
    w = bcy.Nf4Tensor(weight.data.tobytes(), weight.absmax, (8, 64))
    np.testing.assert_array_equal(bcy.linear(x, w), y)


def test_a_workspace_changes_no_bits(path):
    """None is needed. Where one is of use, a kernel runs that divides K otherwise."""
    backend, preference = path
    for n, k, m, nested in ((8, 64, 2, None), (300, 1344, 3, 256), (70, 5120, 1, None)):
        weight, x = Nf4Weight(n, k, nested=nested), random_activations(m, k)
        w = weight.tensor(backend)
        plan = weight.plan(backend.device, m, preference=preference)
        assert plan.workspace_size % 4 == 0
        y = backend.empty((m, n), "float32")
        plan.run(w, backend.put(x), y)
        want = reference.finish(weight.exact_product(x))
        np.testing.assert_array_equal(bits(backend.get(y)), want)
        lent = object() if plan.workspace_size == 0 else backend.workspace(plan)
        y = backend.empty((m, n), "float32")
        plan.run(w, backend.put(x), y, workspace=lent)
        np.testing.assert_array_equal(bits(backend.get(y)), want)
        if plan.workspace_size:
            few = bcy.Workspace(plan.workspace_size - 1, device=backend.device)
            with pytest.raises(WorkspaceTooSmall):
                plan.run(w, backend.put(x), y, workspace=few)


@pytest.mark.gpu(real="an emulated one takes minutes")
@pytest.mark.parametrize("overlap", [False, True])
def test_tokens_that_share_a_workspace_by_turns(overlap):
    """More sums than it holds: it serves some tokens after the others."""
    backend, (m, n, k) = Backend("cuda"), (33, 131077, 320)
    weight, x = Nf4Weight(n, k), random_activations(m, k, "float16")
    w, x = weight.tensor(backend), backend.put(x)
    preference = bcy.PlanPreference(overlap=overlap, bit_stable_across_hardware=True)
    plan = weight.plan("cuda", m, "float16", preference=preference)
    assert 0 < plan.workspace_size < m * n * 2 * 4
    results = []
    for workspace in (None, backend.workspace(plan)):
        y = backend.empty((m, n), "float16", 8)
        plan.run(w, x, y, workspace=workspace)
        results.append(bits(backend.get(y)))
    np.testing.assert_array_equal(*results)


def test_unpacking_asks_for_no_workspace(backend):
    weight = Nf4Weight(8, 64)
    dense = backend.empty((8, 64), "float32")
    plan = bcy.Nf4DequantizePlan.select(backend.device, weight.descriptor(output="float32"))
    assert plan.workspace_size == 0
    plan.run(weight.tensor(backend), dense, workspace=object())
    np.testing.assert_array_equal(backend.get(dense), weight.values())


# ---- nothing to compute --------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("nested", [None, 256])
@pytest.mark.parametrize("activation", ["float32", "float16"])
def test_no_columns_gives_zeros_and_bias(path, activation, nested, layout):
    backend, preference = path
    weight, x = Nf4Weight(6, 0, 64, "NF4", layout, nested), np.zeros((3, 0), FLOATS[activation])
    y = weight.product(backend, x, preference=preference)
    np.testing.assert_array_equal(bits(y), np.zeros((3, 6), bits(y).dtype))
    bias = bias_of(6, activation)
    y = weight.product(backend, x, bias=bias, preference=preference)
    np.testing.assert_array_equal(bits(y), np.tile(bits(bias), (3, 1)))


@pytest.mark.parametrize(("n", "m"), [(0, 3), (6, 0), (0, 0)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_rows_and_no_tokens(path, layout, n, m):
    backend, preference = path
    for nested in (None, 256):
        weight = Nf4Weight(n, 64, 64, "FP4", layout, nested)
        assert weight.product(
            backend, np.zeros((m, 64), np.float16), preference=preference
        ).shape == (m, n)


def test_no_elements_to_dequantize(backend):
    for n, k in ((0, 64), (4, 0)):
        weight = Nf4Weight(n, k, nested=256)
        plan = bcy.Nf4DequantizePlan.select(backend.device, weight.descriptor())
        plan.run(weight.tensor(backend), backend.empty((n, k), "float16"))


# ---- shapes of all kinds -------------------------------------------------------------------------


@st.composite
def problems(draw):
    layout = draw(st.sampled_from(LAYOUTS))
    n = draw(st.integers(0, 40))
    if layout == "row_pair":
        n += n % 2
        block_size = draw(st.integers(1, 80))
        k = block_size * draw(st.integers(0, 12))
    else:
        block_size = draw(st.sampled_from(BLOCK_SIZES))
        k = draw(st.integers(0, 700) | st.sampled_from([64, 128, 256, 512, 576, 1024]))
    nested = draw(st.sampled_from([None, 1, 64, 256]))
    codebook = draw(st.sampled_from(CODEBOOKS))
    activation = draw(st.sampled_from(list(FLOATS)))
    output = draw(st.sampled_from([activation, "float32"]))
    m = draw(st.integers(0, 6) | st.sampled_from([8, 9, 16, 17, 32, 33]))
    biased = draw(st.booleans())
    return (n, k, block_size, codebook, layout, nested), m, activation, output, biased


def check_problem(backend, problem, preference):
    arguments, m, activation, output, biased = problem
    weight = Nf4Weight(*arguments, seed=3)
    values = weight.values()
    x = random_activations(m, weight.k, activation)
    bias = bias_of(weight.n, output) if biased else None
    y = weight.product(backend, x, output, bias, preference=preference)
    plan = weight.plan(backend.device, m, activation, output, biased, preference)
    if plan.precision_guarantee.bit_stable_across_hardware:
        want = reference.finish(weight.exact_product(x), bias, output)
        np.testing.assert_array_equal(bits(y), want)
    else:
        on_cpu = weight.product(Backend("cpu"), x, "float32", None)
        size = np.abs(x.astype(np.float64)) @ np.abs(values.astype(np.float64)).T
        if biased:
            on_cpu = on_cpu + bias.astype(np.float32)
            size = size + np.abs(bias.astype(np.float64))
        unit = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}[output]
        assert (np.abs(y.astype(np.float64) - on_cpu) <= unit * size + 1e-6).all()
    dense = backend.empty((weight.n, weight.k), output)
    bcy.Nf4DequantizePlan.select(backend.device, weight.descriptor(output=output)).run(
        weight.tensor(backend), dense
    )
    want = reference.finish(values, None, output)
    np.testing.assert_array_equal(bits(backend.get(dense)), want)


@settings(max_examples=150)
@given(problem=problems())
@example(problem=((1, 1, 32, "FP4", "bitsandbytes", 1), 1, "float16", "float32", True))
def test_any_problem_on_the_cpu(problem):
    check_problem(Backend("cpu"), problem, None)


@pytest.mark.gpu
@settings(max_examples=300)
@given(problem=problems(), preference=st.sampled_from([None, EXACT]))
def test_any_problem_on_cuda(problem, preference):
    check_problem(Backend("cuda"), problem, preference)


# ---- what is promised ----------------------------------------------------------------------------

N, K = 37, 2304


def test_flags(path):
    backend, preference = path
    for activation in FLOATS:
        for k in (K, K + 3):
            guarantee = (
                Nf4Weight(N, k)
                .plan(backend.device, 5, activation, preference=preference)
                .precision_guarantee
            )
            assert guarantee.deterministic
            assert guarantee.bit_stable_on_same_hardware
            assert guarantee.batch_invariant
            assert guarantee.accumulator is bcy.ElementKind.F32
            own = not guarantee.bit_stable_across_hardware
            assert not own or (backend.device == "cuda" and preference is None)
            math = bcy.ElementKind.of(activation).name if own else "F32"
            assert guarantee.math_precision is bcy.MathPrecision[math]
    for output in FLOATS:
        plan = bcy.Nf4DequantizePlan.select(
            backend.device, Nf4Weight(N, K).descriptor(output=output), preference
        )
        assert plan.precision_guarantee.bit_stable_across_hardware
        assert plan.precision_guarantee.deterministic


def test_flags_do_not_depend_on_tokens(path):
    """Else a batch would change the bits of a token."""
    backend, preference = path
    for activation in FLOATS:
        plans = [
            Nf4Weight(N, K).plan(backend.device, m, activation, preference=preference)
            for m in (0, 1, 2, 8, 99)
        ]
        assert len({plan.precision_guarantee for plan in plans}) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 20])
def test_products_that_overlap(m):
    """A chain on one stream whose kernels start early has the bits of one whose do not."""
    backend, weight = Backend("cuda"), Nf4Weight(512, 512)
    w, x = weight.tensor(backend), random_activations(m, 512, "bfloat16")

    def chain(preference):
        plan = weight.plan("cuda", m, "bfloat16", preference=preference)
        arrays = [backend.put(x)] + [backend.empty((m, 512), "bfloat16") for _ in range(20)]
        for source, target in itertools.pairwise(arrays):
            plan.run(w, source, target)
        return [bits(backend.get(array)) for array in arrays]

    for got, want in zip(chain(bcy.PlanPreference(overlap=True)), chain(None), strict=True):
        np.testing.assert_array_equal(got, want)


# ---- kernels of their own for many weights -------------------------------------------------------


# A multiprocessor has so many weights where a kernel for many takes over, on Hopper.
MANY = 400_000


def assert_has_workspace(plan):
    """The kernel for many weights can run: it is for Hopper, and needs one."""
    assert plan.workspace_size > 0 or plan.sku.arch != 90


def expect_bits_of_few_rows(whole, activation, m, some=512):
    """All rows at once have the bits of some at a time, by a kernel that needs no workspace."""
    backend, x = Backend("cuda"), random_activations(m, whole.k, activation)
    assert_has_workspace(whole.plan("cuda", m, activation))
    got = whole.product(backend, x)
    for first in range(0, whole.n, some):
        part = whole.rows(first, min(some, whole.n - first))
        y = backend.empty((m, part.n), activation)
        part.plan("cuda", m, activation).run(part.tensor(backend), backend.put(x), y)
        want = backend.get(y)
        np.testing.assert_array_equal(bits(got[:, first : first + some]), bits(want))


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "activation"), [(8, "float16"), (13, "bfloat16"), (33, "float16")])
def test_many_rows(m, activation):
    """Tiles of rows, several to a thread block, have the bits few rows have by another kernel."""
    # Less than a unit; scales are not boxed, and are.
    for k, nested in ((192, None), (832, 256), (1024, None), (1024, 256)):
        n = max(4 * 128 * _cuda.multiprocessors() - 5, MANY * _cuda.multiprocessors() // k + 1)
        expect_bits_of_few_rows(Nf4Weight(n, k, nested=nested), activation, m)


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "activation"), [(13, "bfloat16"), (16, "float16"), (33, "float16")])
@pytest.mark.parametrize("tiles", [1, 2])
def test_warpgroups_that_divide_k(tiles, m, activation):
    """A tile of 32 rows for each multiprocessor, or two."""
    # Units for some of the warpgroups, for all, for one more; scales are not boxed, and are.
    for k, nested in ((192, None), (512, 256), (832, 256), (1024, 256), (1280, None), (6144, None)):
        n = 32 * tiles * _cuda.multiprocessors() - 5
        expect_bits_of_few_rows(Nf4Weight(n, k, nested=nested), activation, m)


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [None, 256])
@pytest.mark.parametrize("m", [9, 13, 33])
def test_tiles_of_more_tokens(m, nested):
    """Few rows have tiles of eight tokens or sixteen, more rows of 16 or 32."""
    backend, x = Backend("cuda"), random_activations(m, 1024, "float16")
    whole = Nf4Weight(48 * _cuda.multiprocessors() + 5, 1024, nested=nested)

    def product(weight):
        y = backend.empty((m, weight.n), "float16")
        weight.plan("cuda", m, "float16").run(weight.tensor(backend), backend.put(x), y)
        return bits(backend.get(y))

    want = product(whole)
    for tokens in (8, 16):
        rows = 16 * (_cuda.multiprocessors() // -(-m // tokens)) - 3
        np.testing.assert_array_equal(product(whole.rows(0, rows)), want[:, :rows])


def expect_bits_without_workspace(n, k, block_size, nested, m):
    """A product has the bits of one by the kernels that need no workspace, again and again."""
    backend = Backend("cuda")
    weight = Nf4Weight(n, k, block_size, nested=nested)
    x = random_activations(m, k, "float16")
    bias = bias_of(n, "float32")
    plan = weight.plan("cuda", m, "float16", "float32", bias=True)
    assert_has_workspace(plan)
    y = backend.empty((m, n), "float32")
    plan.run(weight.tensor(backend), backend.put(x), y, bias=backend.put(bias))
    for _ in range(3):
        got = weight.product(backend, x, "float32", bias, plan=plan)
        np.testing.assert_array_equal(bits(got), bits(backend.get(y)))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("block_size", "nested", "part"), [(64, None, 0), (64, 256, 0), (64, 256, 64), (128, None, 0)]
)
@pytest.mark.parametrize(
    ("share", "m"),
    [(0, 20), (1 / 8, 20), (1 / 8, 12), (1 / 4, 12), (3 / 8, 9)],
    ids=["two", "two of more rows", "two of few tokens", "one", "one, twice"],
)
def test_parts_that_divide_k(share, m, block_size, nested, part):
    """Rows for a share of the multiprocessors: warpgroups divide K, of one thread block or of two,
    which meet in the workspace."""
    n = 128 * max(1, int(share * _cuda.multiprocessors())) - 7
    # Whole units, four for a box of nested scales, and not.
    k = (max(MANY * _cuda.multiprocessors() // n, 12800) // 1024 + 1) * 1024 + part
    expect_bits_without_workspace(n, k, block_size, nested, m)


@pytest.mark.gpu
def test_blocks_that_meet_more_than_once():
    """More tiles than multiprocessors, which two blocks divide nonetheless."""
    expect_bits_without_workspace(40 * _cuda.multiprocessors() - 5, 26624, 64, 256, 20)


# ---- bit_stable_across_hardware ------------------------------------------------------------------


def digests():
    """One digest of what every kernel of the CPU gives, for each codebook and layout."""
    backend, results = Backend("cpu"), {}
    for codebook in CODEBOOKS:
        for layout in LAYOUTS:
            digest = hashlib.sha256()
            for n, k, block_size in SHAPES[layout]:
                for nested in (None, 256):
                    weight = Nf4Weight(n, k, block_size, codebook, layout, nested)
                    for activation in FLOATS:
                        x = random_activations(9, k, activation)
                        x[2, k // 2] = np.nan
                        for m in (1, 4, 9):
                            y = weight.product(backend, x[:m])
                            digest.update(bits(y).tobytes())
                        y = backend.empty((n, k), activation)
                        bcy.Nf4DequantizePlan.select(
                            "cpu", weight.descriptor(output=activation)
                        ).run(weight.tensor(), y)
                        digest.update(bits(y).tobytes())
            results[f"{codebook} {layout}"] = digest.hexdigest()
        x = random_activations(7, 1001)
        w = bcy.quantize(x, codebook, nested=True)
        arrays = (w.data, w.absmax, w.nested.absmax)
        results[codebook] = hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()
    return results


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_of_the_cpu_agrees(isa):
    used, theirs = in_another_process(
        "test_nf4_plans", "[_cpu.isa(), t.digests()]", BARACUDA_CPU_ISA=isa
    )
    if used != isa:
        pytest.skip(f"this CPU has no {isa}")
    assert theirs == digests()


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_do_not_change_the_bits(threads):
    backend, preference = Backend("cpu"), bcy.PlanPreference(threads=threads)
    for layout in LAYOUTS:
        weight, x = Nf4Weight(204, 1024, 64, "NF4", layout), random_activations(5, 1024)
        plain = weight.product(backend, x)
        np.testing.assert_array_equal(
            bits(weight.product(backend, x, preference=preference)), bits(plain)
        )


# ---- what a plan says ----------------------------------------------------------------------------


def test_sku_on_the_cpu():
    from baracuda_cy import _cpu

    weight = Nf4Weight(8, 64, 32, "FP4", "row_pair", 256)
    sku = weight.plan("cpu", 4, "float16", "float32", bias=True).sku
    assert sku == bcy.KernelSku(
        category="QUANTIZATION",
        op="NF4_MMVQ",
        element="float16",
        aux_element="uint8",
        output_element="float32",
        activations="float",
        layout="row_pair",
        epilogue="bias",
        arch="CPU",
        isa=_cpu.isa(),
        backend="CPU",
        precision_guarantee=bcy.PrecisionGuarantee(
            math_precision="F32",
            accumulator="float32",
            deterministic=True,
            bit_stable_on_same_hardware=True,
            batch_invariant=True,
            bit_stable_across_hardware=True,
        ),
    )
    sku = bcy.Nf4MmvqPlan.select("cpu", Nf4Weight(8, 64).descriptor()).sku
    assert (sku.layout, sku.epilogue, sku.activations) == ("bitsandbytes", None, "float")
    sku = bcy.Nf4DequantizePlan.select("cpu", weight.descriptor(output="bfloat16")).sku
    assert (sku.op, sku.layout, sku.activations) == (
        bcy.QuantizeKind.DEQUANTIZE_PER_GROUP,
        "row_pair",
        None,
    )
    assert sku.element is sku.output_element is bcy.ElementKind.BF16


@pytest.mark.gpu
def test_sku_on_cuda():
    major, minor = _cuda.compute_capability(0)
    for preference in (None, EXACT):
        sku = Nf4Weight(8, 64).plan("cuda", 4, preference=preference).sku
        assert sku.backend is bcy.BackendKind.BESPOKE
        assert sku.arch == 10 * major + minor
        assert sku.isa is None


def test_repr_of_a_plan():
    weight = Nf4Weight(8, 64, 64, "NF4", "bitsandbytes", 256)
    preference = bcy.PlanPreference(threads=2)
    text = repr(weight.plan("cpu", 4, "float16", "float32", bias=True, preference=preference))
    assert text.startswith(
        "Nf4MmvqMultiMPlan(NF4 8x64, block size 64, bitsandbytes layout, nested absmax, m=4, "
        "float16 -> float32 with bias, cpu "
    )
    assert text.endswith(", 2 threads; deterministic, batch-invariant, same bits on every backend)")
    single = bcy.Nf4MmvqPlan.select("cpu", Nf4Weight(8, 64, 32, "FP4", "row_pair").descriptor())
    assert repr(single).startswith(
        "Nf4MmvqPlan(FP4 8x64, block size 32, row_pair layout, m=1, float16 -> float16, cpu "
    )
    unpack = bcy.Nf4DequantizePlan.select("cpu", weight.descriptor(output="float32"))
    assert repr(unpack).startswith(
        "Nf4DequantizePlan(NF4 8x64, block size 64, bitsandbytes layout, nested absmax -> float32, "
    )


def test_a_plan_keeps_what_it_was_made_from():
    preference, weight = (
        bcy.PlanPreference(threads=2, bit_stable_across_hardware=True),
        Nf4Weight(8, 64),
    )
    plan = weight.plan("cpu", 2, preference=preference)
    assert plan.descriptor == weight.descriptor(2, activation="float32")
    assert plan.preference is preference
    for name in ("descriptor", "sku", "workspace_size", "device", "precision_guarantee"):
        with pytest.raises(AttributeError):
            setattr(plan, name, None)
    for kind in (bcy.Nf4MmvqPlan, bcy.Nf4MmvqMultiMPlan, bcy.Nf4DequantizePlan):
        with pytest.raises(TypeError, match=r"is made by .*select"):
            kind()


def test_a_plan_pickles_as_its_selection():
    weight = Nf4Weight(8, 64, nested=256)
    for plan in (
        weight.plan("cpu", 2, "bfloat16", bias=True, preference=bcy.PlanPreference(threads=2)),
        bcy.Nf4MmvqPlan.select("cpu", weight.descriptor()),
        bcy.Nf4DequantizePlan.select("cpu", weight.descriptor(output="float32")),
    ):
        other = pickle.loads(pickle.dumps(plan))
        assert repr(other) == repr(plan)
        assert other.descriptor == plan.descriptor
        assert other.preference == plan.preference


def test_validate_runs_nothing(path):
    backend, preference = path
    weight, x = Nf4Weight(8, 64), backend.put(random_activations(2, 64))
    plan, w = weight.plan(backend.device, 2, preference=preference), weight.tensor(backend)
    y = backend.empty((2, 8), "float32")
    plan.validate(w, x, y)
    assert plan.can_implement(w, x, y) is True
    assert plan.can_implement(w, y, x) is False
    assert (backend.get(y) == 77).all()
    unpack = bcy.Nf4DequantizePlan.select(backend.device, weight.descriptor(output="float32"))
    dense = backend.empty((8, 64), "float32")
    unpack.validate(w, dense)
    assert unpack.can_implement(w, dense) is True
    assert unpack.can_implement(w, x) is False
    assert (backend.get(dense) == 77).all()


def test_bfloat16_needs_no_ml_dtypes_in_the_plans():
    """bfloat16 is known by DLPack's code, never by NumPy's dtype."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    weight, x = Nf4Weight(8, 64), random_activations(2, 64, "bfloat16")
    tensor = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    y = torch.empty(2, 8, dtype=torch.bfloat16)
    codes = torch.from_numpy(weight.data).view(torch.bfloat16)
    weight.plan("cpu", 2, "bfloat16").run(codes, tensor, y, absmax=torch.from_numpy(weight.absmax))
    want = weight.product(Backend("cpu"), x)
    np.testing.assert_array_equal(y.view(torch.int16).numpy().view(np.uint16), bits(want))
