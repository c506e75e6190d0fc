# SPDX-License-Identifier: Apache-2.0
"""The ways a CUDA product can take: how weights arrive, how activations are staged, what overlaps.

A plan chooses by sizes and addresses. Whatever it chooses, the bits are those of the CPU backend.
"""

import numpy as np
import problems
import pytest
from problems import FLOATS, FORMATS, Backend, bits, random_activations, random_weight

import baracuda_cy as bcy
from baracuda_cy import _cuda

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cpu():
    return Backend("cpu")


@pytest.fixture
def gpu():
    return Backend("cuda")


def expect_same_bits(cpu, gpu, make, name, nrows, ncols, m, activation="float16", **more):
    weight = random_weight(name, nrows, ncols)
    x = random_activations(m, ncols, activation)
    plans = [make(b.device, name, nrows, ncols, m, activation, **more) for b in (cpu, gpu)]
    expected, got = (bits(b.run(p, weight, x)) for b, p in zip((cpu, gpu), plans, strict=True))
    np.testing.assert_array_equal(got, expected)
    return plans[1]


def widths(name):
    """K of one block, of a unit and a part, of more than one round and a part of the next."""
    block = bcy.GgufBlockFormat(name).block_size
    return [block, 256 + block, 2048 + 256 + block]


@pytest.mark.parametrize("m", [1, 2, 3, 8, 16, 17])
@pytest.mark.parametrize("name", FORMATS)
def test_many_rows(cpu, gpu, name, m):
    """Rows on 16-byte boundaries come in boxes where there are enough of them."""
    block_format = bcy.GgufBlockFormat(name)
    ncols = next(
        k
        for k in range(512, 8192, 32)
        if k % block_format.block_size == 0 and block_format.row_bytes(k) % 16 == 0
    )
    nrows = 3 * 32 * _cuda.multiprocessors() + 5  # the last box is cut
    expect_same_bits(cpu, gpu, problems.staged_plan, name, nrows, ncols, m)
    if m > 8:
        nrows = 32 * _cuda.multiprocessors() - 3  # two tiles of 16 rows for each multiprocessor
        expect_same_bits(cpu, gpu, problems.staged_plan, name, nrows, ncols, m)


@pytest.mark.parametrize("m", [17, 32, 40, 100])
@pytest.mark.parametrize(
    ("name", "ncols"), [("Q4_1", 2048 + 128), ("Q4_K", 4096), ("Q2_K", 4096), ("Q6_K", 2048)]
)
def test_many_rows_of_many_tokens(cpu, gpu, name, ncols, m):
    """Shared memory holds the activations of 32 tokens for many tiles of rows."""
    nrows = 3 * 16 * _cuda.multiprocessors() + 5
    expect_same_bits(cpu, gpu, problems.staged_plan, name, nrows, ncols, m)


# A multiprocessor has at least so many weights where Hopper's kernel for many tokens takes over, if
# rows keep most of them busy: of formats with minima or bytes and more than 16 tokens, and of all
# others that it is for.
SOME, MANY = 400_000, 2_000_000


def expect_same_bits_of_many(cpu, gpu, name, weights, m, nrows, output="float32", bias=True):
    """So many weights a multiprocessor: rows that repeat few, whose results the CPU gives."""
    block_format, some = bcy.GgufBlockFormat(name), 611
    units = (weights * _cuda.multiprocessors() - 1) // nrows // 256 + 1
    ncols = next(k for k in range(256 * units, 1 << 28, 256) if block_format.row_bytes(k) % 16 == 0)
    weight = random_weight(name, some, ncols)
    x = random_activations(m, ncols, "float16")
    added = np.random.default_rng(m).standard_normal(some).astype(FLOATS[output])
    few = problems.staged_plan("cpu", name, some, ncols, m, "float16", output)
    want = cpu.run(few, weight, x, added if bias else None)[:, np.arange(nrows) % some]
    plan = problems.staged_plan("cuda", name, nrows, ncols, m, "float16", output)
    workspace = gpu.workspace(plan)
    weight = np.resize(weight.reshape(some, -1), (nrows, len(weight) // some))
    added = np.resize(added, nrows) if bias else None
    for _ in range(2):  # what the first leaves in the workspace
        got = gpu.run(plan, weight, x, added, workspace=workspace)
        np.testing.assert_array_equal(bits(got), bits(want))
    other = problems.staged_plan("cuda", name, 16, ncols, m, "float16", output)
    return plan.sku.arch != 90 or plan.workspace_size > other.workspace_size


@pytest.mark.parametrize("m", [13, 40])
@pytest.mark.parametrize("name", FORMATS)
def test_many_weights_of_many_tokens(cpu, gpu, name, m):
    """Tiles of rows, several to a thread block, whose warpgroups divide K."""
    nrows = 2 * 128 * _cuda.multiprocessors() - 5
    more = expect_same_bits_of_many(cpu, gpu, name, MANY, m, nrows, bias=m != 13)
    # As many are staged as are multiplied at a time.
    assert more or m == 13 or name in ("Q3_K", "Q5_0", "Q6_K")


@pytest.mark.parametrize(
    "name", ["Q4_1", "Q5_1", "Q2_K", "Q5_K", "Q8_K", "IQ4_NL", "IQ4_XS", "MXFP4"]
)
def test_few_columns_of_many_rows(cpu, gpu, name):
    """A few units, of which some warpgroups have none; all but Q5_K divide them by two."""
    nrows = 1024 * _cuda.multiprocessors() - 3
    assert expect_same_bits_of_many(cpu, gpu, name, SOME, 20, nrows, "bfloat16")


@pytest.mark.parametrize("share", [0, 1 / 8, 1 / 4, 3 / 8])
@pytest.mark.parametrize(
    ("name", "weights", "m"),
    [
        ("Q4_1", MANY, 13),
        ("Q8_0", SOME, 20),
        ("Q2_K", MANY, 20),
        ("Q5_K", MANY, 40),
        ("Q8_K", SOME, 40),
    ],
)
def test_parts_that_divide_k(cpu, gpu, name, weights, m, share):
    """Rows for a share of the multiprocessors: warpgroups divide K, of a thread block or of some
    that meet in the workspace."""
    nrows = 128 * max(1, int(share * _cuda.multiprocessors())) - 7
    more = expect_same_bits_of_many(cpu, gpu, name, weights, m, nrows, "float16")
    assert more or (m == 13 and share > 1 / 4)  # no blocks that meet


@pytest.mark.parametrize(("name", "m"), [("Q4_1", 13), ("Q5_K", 20), ("Q8_0", 40)])
def test_blocks_that_meet_more_than_once(cpu, gpu, name, m):
    """More tiles than multiprocessors, which blocks divide nonetheless."""
    nrows = (144 if name == "Q8_0" else 80) * _cuda.multiprocessors() - 5
    assert expect_same_bits_of_many(cpu, gpu, name, 1_100_000, m, nrows, "float16")


@pytest.mark.parametrize("m", [9, 16, 17, 32])
@pytest.mark.parametrize("name", FORMATS)
def test_tokens_of_few_rows(cpu, gpu, name, m):
    """Tiles of 16 rows and of eight tokens or sixteen, so that more multiprocessors have one."""
    block_format = bcy.GgufBlockFormat(name)
    for tokens in (8, 16):
        nrows = 16 * (_cuda.multiprocessors() // -(-m // tokens)) - 3
        for ncols in (2048 + 256 + block_format.block_size, 4096):
            expect_same_bits(cpu, gpu, problems.staged_plan, name, nrows, ncols, m)


@pytest.mark.parametrize("m", [1, 2, 3, 16, 17])
def test_many_rows_without_columns(gpu, m):
    nrows = 3 * 32 * _cuda.multiprocessors() + 5
    weight, x = np.zeros(0, np.uint8), np.zeros((m, 0), np.float32)
    for make in problems.staged_plan, problems.float_plan:
        y = gpu.run(make("cuda", "Q4_0", nrows, 0, m), weight, x)
        np.testing.assert_array_equal(bits(y), 0)


@pytest.mark.parametrize("m", [1, 2, 3, 5, 16, 33])
@pytest.mark.parametrize("name", FORMATS)
def test_ends_of_rows(cpu, gpu, name, m):
    for ncols in widths(name):
        expect_same_bits(cpu, gpu, problems.staged_plan, name, 33, ncols, m)
        expect_same_bits(cpu, gpu, problems.float_plan, name, 33, ncols, min(m, 5))
        if m in (2, 3, 16, 33):  # not by 16 rows to a thread block, nor by eight tokens
            nrows = 16 * _cuda.multiprocessors() + 3
            expect_same_bits(cpu, gpu, problems.staged_plan, name, nrows, ncols, m)


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "MXFP4"])
def test_long_rows(cpu, gpu, name):
    """K = 2**20: many laps of the ring, and activations that shared memory does not hold."""
    for m in (1, 2, 9):
        expect_same_bits(cpu, gpu, problems.staged_plan, name, 3, 1 << 20, m)
        expect_same_bits(cpu, gpu, problems.float_plan, name, 3, 1 << 20, m)


@pytest.mark.parametrize("make", [problems.staged_plan, problems.float_plan])
@pytest.mark.parametrize("name", FORMATS)
def test_weights_at_any_address(cpu, gpu, make, name):
    """Copies widened to 16 bytes neither miss nor take anything at the matrix's ends."""
    block_format = bcy.GgufBlockFormat(name)
    nrows, ncols = 35, 512
    weight = random_weight(name, nrows, ncols)
    for m in (1, 2, 12):
        x = random_activations(m, ncols, "float32")
        expected = bits(cpu.run(make("cpu", name, nrows, ncols, m), weight, x))
        for offset in (block_format.alignment, 16 - block_format.alignment, 16):
            # The matrix alone in its memory, so that a sanitizer sees what is read beyond it.
            memory = np.concatenate([np.full(offset, 0xFF, np.uint8), weight])
            plan = make("cuda", name, nrows, ncols, m, w_start_byte_offset=offset)
            np.testing.assert_array_equal(bits(gpu.run(plan, memory, x)), expected)


@pytest.mark.parametrize("m", [1, 2, 3, 8, 16, 32])
@pytest.mark.parametrize("name", FORMATS)
def test_many_rows_at_any_address(cpu, gpu, name, m):
    """Of all tiles there are rings for rows off 16-byte boundaries."""
    block_format = bcy.GgufBlockFormat(name)
    ncols = 2048 + 256 + block_format.block_size
    for nrows in (16 * _cuda.multiprocessors() + 3, 48 * _cuda.multiprocessors() + 5):
        weight = random_weight(name, nrows, ncols)
        x = random_activations(m, ncols, "float16")
        memory = np.concatenate([np.full(block_format.alignment, 0xFF, np.uint8), weight])
        for make in (problems.staged_plan, problems.float_plan)[: 2 if m <= 2 else 1]:
            arguments = name, nrows, ncols, m, "float16"
            expected = bits(cpu.run(make("cpu", *arguments), weight, x))
            for preference in (None, bcy.PlanPreference(overlap=True))[: 2 if m == 2 else 1]:
                plan = make(
                    "cuda",
                    *arguments,
                    w_start_byte_offset=block_format.alignment,
                    preference=preference,
                )
                np.testing.assert_array_equal(bits(gpu.run(plan, memory, x)), expected)


def has_same_bits(name, nrows, ncols, m):
    expect_same_bits(Backend("cpu"), Backend("cuda"), problems.staged_plan, name, nrows, ncols, m)
    return True


@pytest.mark.skipif(not problems.EMULATED, reason="a real GPU has the shared memory that it has")
@pytest.mark.parametrize(
    ("name", "nrows", "ncols", "m"),
    [
        ("Q8_0", 200, 512, 32),
        ("Q8_K", 200, 1024, 32),
        ("Q2_K", 800, 1024, 8),
        ("Q8_0", 35, 28672, 1),
        ("Q8_0", 140, 14336, 2),
        ("Q4_0", 140, 28672, 2),
        ("Q6_K", 35, 53248, 1),
    ],
)
def test_less_shared_memory(name, nrows, ncols, m):
    """Some GPUs have 99 KB for a thread block: tiles and rings that do not fit are not chosen."""
    assert problems.in_another_process(
        "test_cuda_kernels",
        f"t.has_same_bits({name!r}, {nrows}, {ncols}, {m})",
        BARACUDA_EMULATOR_SHARED_MEMORY="100",
    )


@pytest.mark.parametrize("scale", [1e-38, 1e-36, 3e-36, 1e-33, 1e30])
@pytest.mark.parametrize("name", FORMATS)
def test_extreme_activations(cpu, gpu, name, scale):
    """Products of scales that are subnormal round alike, too."""
    nrows, ncols, m = 16, 768, 3
    weight = random_weight(name, nrows, ncols)
    x = random_activations(m, ncols, "float32") * np.float32(scale)
    for make, tokens in (
        (problems.staged_plan, m),
        (problems.float_plan, m),
        (problems.float_plan, 1),
    ):
        results = [
            bits(b.run(make(b.device, name, nrows, ncols, tokens), weight, x[:tokens]))
            for b in (cpu, gpu)
        ]
        np.testing.assert_array_equal(results[1], results[0])


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q2_K", "Q6_K", "Q8_K"])
def test_staging_inside_and_outside(cpu, gpu, name):
    """Small products stage for themselves and need no workspace; larger and Turing's do."""
    some = _cuda.compute_capability() >= (8, 0)
    two = _cuda.compute_capability() >= (9, 0) and name not in ("Q6_K", "Q8_K")
    processors = _cuda.multiprocessors()
    most = 4096 if name == "Q8_K" else 6144
    desc = bcy.GgufMmvqMultiMDescriptor(nrows=1, ncols=6400, m=1, block_format=name)
    overlapping = bcy.PlanPreference(overlap=True)
    assert bcy.GgufMmvqMultiMPlan.select(gpu.device, desc, overlapping).workspace_size > 0
    for nrows in 40, 32 * processors - 5, 3 * 32 * processors + 40:
        for ncols, m in (
            (4096, 1),
            (4096, 2),
            (4096, 3),
            (6144, 1),
            (6400, 1),
            (8192, 2),
            (14336, 3),
            (16640, 1),
            (16640, 2),
        ):
            plan = expect_same_bits(
                cpu, gpu, problems.staged_plan, name, nrows, ncols, m, "bfloat16"
            )
            assert (plan.workspace_size == 0) == (some and m == 1 and ncols <= most)
            if m == 2:
                plan = expect_same_bits(
                    cpu, gpu, problems.staged_plan, name, nrows, ncols, m, preference=overlapping
                )
                inside = two and ncols == 4096 and nrows == 32 * processors - 5
                assert (plan.workspace_size == 0) == inside


@pytest.mark.parametrize("name", FORMATS)
def test_unpacking(cpu, gpu, name):
    """Weights on 16-byte boundaries and off them, whole units and ends, rows of output anywhere.

    Scales are of every kind, so that there are infinities, and NaN in pairs and alone.
    """
    alignment = bcy.GgufBlockFormat(name).alignment
    for ncols, start, padding in (
        (1024, 0, 0),
        (1024, 0, 3),
        (1024, alignment, 4),
        *((ncols, 0, 0) for ncols in widths(name)),
        (widths(name)[2], alignment, 1),
    ):
        nrows = 67
        packed = np.random.default_rng(ncols).integers(
            0, 256, start + problems.packed_bytes(name, nrows, ncols), np.uint8
        )
        for output in problems.FLOATS:
            got = []
            for backend in cpu, gpu:
                plan = problems.dequantize_plan(
                    backend.device, name, nrows, ncols, output, w_start_byte_offset=start
                )
                y = backend.empty((nrows, ncols), output, padding if output != "bfloat16" else 0)
                plan.run(backend.put(packed), y)
                got.append(bits(backend.get(y)))
            np.testing.assert_array_equal(got[1], got[0], f"{plan}, {ncols} {start} {padding}")


@pytest.mark.parametrize(
    ("make", "m"),
    [
        *((problems.staged_plan, m) for m in (1, 2, 8, 16, 32)),
        *((problems.float_plan, m) for m in (1, 3)),
    ],
)
@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q8_0"])
def test_overlapping_calls(gpu, name, make, m):
    """A chain of overlapping calls on one workspace, each with other activations than the last."""
    nrows, ncols = (512, 256) if problems.EMULATED else (4096, 2048)
    links = 5  # five dozen products would overflow
    weight = gpu.put(random_weight(name, nrows, ncols))
    back = gpu.put(random_weight(name, ncols, nrows))
    starts = [gpu.put(random_activations(m, ncols, seed=seed)) for seed in range(5)]

    def chain(preference):
        forth = make("cuda", name, nrows, ncols, m, preference=preference)
        home = make("cuda", name, ncols, nrows, m, preference=preference)
        size = max(forth.workspace_size, home.workspace_size, 1)
        workspace = bcy.Workspace(size, device="cuda")
        stream = bcy.Stream()
        wide = gpu.empty((m, nrows), "float32")
        results = [[gpu.empty((m, ncols), "float32") for _ in range(links)] for _ in starts]
        bcy.Stream.from_handle(0, device=0).synchronize()
        for x, row in zip(starts, results, strict=True):
            for result in row:
                forth.run(weight, x, wide, workspace=workspace, stream=stream)
                home.run(back, wide, result, workspace=workspace, stream=stream)
                x = result
        stream.synchronize()
        return [gpu.get(result) for row in results for result in row]

    for got, expected in zip(chain(bcy.PlanPreference(overlap=True)), chain(None), strict=True):
        assert np.isfinite(expected).all()
        np.testing.assert_array_equal(bits(got), bits(expected))


def test_overlap_in_a_graph(gpu):
    cupy = pytest.importorskip("cupy", reason="needs CuPy")
    name, n, m = "Q4_K", 2048, 2
    preference = bcy.PlanPreference(overlap=True)
    weights = [cupy.asarray(random_weight(name, n, n, seed)) for seed in range(6)]
    plans = [problems.staged_plan("cuda", name, n, n, m, preference=p) for p in (preference, None)]
    x = cupy.asarray(random_activations(m, n))
    stream = cupy.cuda.Stream(non_blocking=True)

    def run(plan, results):
        workspace = cupy.empty(max(plan.workspace_size, 1), cupy.uint8)
        last = x
        for weight, result in zip(weights, results, strict=True):
            plan.run(weight, last, result, workspace=workspace, stream=stream)
            last = result
        return workspace

    def outputs():
        return [cupy.zeros((m, n), cupy.float32) for _ in weights]

    expected, warm, got = outputs(), outputs(), outputs()
    cupy.cuda.Device().synchronize()
    held = [run(plans[1], expected), run(plans[0], warm)]
    stream.synchronize()
    with stream:
        stream.begin_capture()
        held.append(run(plans[0], got))
        graph = stream.end_capture()
    for _ in range(3):
        for result in got:
            result.fill(0)
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(bits(cupy.asnumpy(a)), bits(cupy.asnumpy(b)))
