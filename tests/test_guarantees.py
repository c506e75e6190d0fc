# SPDX-License-Identifier: Apache-2.0
"""What PrecisionGuarantee promises, flag by flag, and what a plan may be put through meanwhile."""

import gc
import hashlib
import sys
import threading
import weakref

import numpy as np
import problems
import pytest
from problems import (
    BACKENDS,
    CODEBOOKS,
    FLOATS,
    FORMATS,
    LAYOUTS,
    PRODUCTS,
    Backend,
    bias_of,
    bits,
    each,
    gguf_products,
    nf4_product,
    random_activations,
    random_weight,
)

import baracuda_cy as bcy

N, K = 37, 2304  # odd rows; nine units, so that the first of the eight partial sums takes two
PATHS = {"staged": problems.staged_plan, "float": problems.float_plan}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return Backend(request.param)


@pytest.fixture(params=PRODUCTS, ids=lambda product: product.name)
def product(request):
    return request.param


@pytest.fixture(params=list(PATHS))
def make(request):
    return PATHS[request.param]


def result(product, backend, m=5, n=N, k=K):
    return product.run(backend, product.weight(n, k), product.tokens(m, k))


def plans(device, name="Q4_K"):
    return [
        problems.staged_plan(device, name, N, K, 5),
        problems.float_plan(device, name, N, K, 5),
        problems.dequantize_plan(device, name, N, K),
    ]


def test_every_flag_is_set(backend):
    """The tests below prove them; a plan that cannot keep one must not set it."""
    for name in FORMATS:
        for plan in plans(backend.device, name):
            guarantee = plan.precision_guarantee
            assert guarantee.deterministic
            assert guarantee.bit_stable_on_same_hardware
            assert guarantee.batch_invariant
            assert guarantee.bit_stable_across_hardware


# ---- deterministic -------------------------------------------------------------------------------


# An emulated GPU takes its time.
RUNS = 10 if problems.EMULATED else 100


def load(product, device):
    """Work of our own and of others beside the test."""

    def work(seed):
        backend, weight = Backend(device), product.weight(256, 1024, seed=seed)
        plan, w = product.plan(device, weight, 8), weight.tensor(backend)
        x = backend.put(product.tokens(8, 1024, seed))
        y, workspace = backend.empty((8, 256), product.activation), backend.workspace(plan)
        stream = None if device == "cpu" else bcy.Stream()
        return lambda: plan.run(w, x, y, workspace=workspace, stream=stream)

    return problems.Load(work)


@pytest.mark.parametrize("m", [1, 5, 20])
@pytest.mark.parametrize("activation", list(FLOATS))
@each("product", [*gguf_products("Q4_0", "Q6_K"), *PRODUCTS])
def test_deterministic(backend, product, activation, m):
    product = product._replace(activation=activation)
    first = result(product, backend, m)
    for _ in range(RUNS):
        np.testing.assert_array_equal(result(product, backend, m), first)


def test_deterministic_beside_load(backend, product):
    if backend.device == "cuda" and problems.EMULATED:
        pytest.skip("needs a real GPU: an emulated one does one thing after the other")
    first = result(product, backend)
    with load(product, backend.device):
        for _ in range(100):
            np.testing.assert_array_equal(result(product, backend), first)


def test_dequantize_is_deterministic(backend):
    plan, weight = (
        problems.dequantize_plan(backend.device, "Q5_K", N, K),
        random_weight("Q5_K", N, K),
    )
    results = []
    with load(PRODUCTS[0], backend.device):
        for _ in range(100):
            y = backend.empty((N, K), "float32")
            plan.run(backend.put(weight), y)
            results.append(bits(backend.get(y)).tobytes())
    assert len(set(results)) == 1


# ---- bit_stable_on_same_hardware -----------------------------------------------------------------


def test_another_process(backend, product):
    index = PRODUCTS.index(product)
    call = f"t.result(t.PRODUCTS[{index}], t.Backend({backend.device!r})).tolist()"
    for threads in ("1", "3"):
        got = problems.in_another_process("test_guarantees", call, BARACUDA_THREADS=threads)
        np.testing.assert_array_equal(got, result(product, backend))


@pytest.mark.parametrize("name", FORMATS)
def test_another_alignment(backend, make, name):
    """The weight starts at every offset its format allows; activations and output are moved."""
    plan = make(backend.device, name, N, 768, 3)
    data, x = random_weight(name, N, 768), random_activations(3, 768)
    first = backend.run(plan, data, x)
    step = bcy.GgufBlockFormat[name].alignment
    for offset in range(step, 20, step):
        moved = make(backend.device, name, N, 768, 3, w_start_byte_offset=offset)
        longer = np.concatenate([np.full(offset, 0xA5, np.uint8), data, np.full(9, 0xA5, np.uint8)])
        y = backend.run(moved, longer, x, padding=(offset, offset % 7))
        np.testing.assert_array_equal(bits(y), bits(first))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 5, 33])
def test_another_stream(product, m):
    backend, weight, x = Backend("cuda"), product.weight(N, K), product.tokens(m, K)
    first = product.run(backend, weight, x)
    for stream in (bcy.Stream(), bcy.Stream(priority=-1), bcy.PER_THREAD_DEFAULT_STREAM):
        np.testing.assert_array_equal(product.run(backend, weight, x, stream=stream), first)


def torch_with_a_gpu():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no GPU")
    return torch


OVERLAPPING = nf4_product("nf4-overlap", bcy.PlanPreference(overlap=True), nested=256)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 5, 33])
@each("product", [*PRODUCTS, OVERLAPPING])
def test_graph_replay(product, m):
    torch = torch_with_a_gpu()
    backend, weight = Backend("cuda"), product.weight(N, K)
    plan, w = product.plan("cuda", weight, m), weight.tensor(backend)
    unpack, dense = weight.unpacking("cuda"), torch.zeros(N, K, device="cuda")
    dtype = getattr(torch, product.activation)
    x, y = (torch.zeros(m, columns, device="cuda", dtype=dtype) for columns in (K, N))
    workspace = torch.zeros(max(plan.workspace_size, 1), dtype=torch.uint8, device="cuda")
    alone = (
        torch.zeros_like(y) if isinstance(weight, problems.Nf4Weight) else None
    )  # without a workspace
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run(w, x, y, workspace=workspace)
        if alone is not None:
            plan.run(w, x, alone)
        unpack.run(w, dense)
    for seed in range(3):
        fresh = product.tokens(m, K, seed)
        x.copy_(torch.from_numpy(fresh))
        y.fill_(77)
        dense.fill_(77)
        graph.replay()
        want = product.run(backend, weight, fresh)
        np.testing.assert_array_equal(bits(y.cpu().numpy()), want)
        if alone is not None:
            np.testing.assert_array_equal(bits(alone.cpu().numpy()), want)
        np.testing.assert_array_equal(dense.cpu().numpy(), weight.values())


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 5, 9, 40])
def test_graph_of_linear(product, m):
    torch = torch_with_a_gpu()
    w = product.weight(N, K).tensor(Backend("cuda"))
    x = torch.from_numpy(product.tokens(m, K)).cuda()
    want = bcy.linear(x, w, preference=product.preference)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = bcy.linear(x, w, preference=product.preference)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, want)


@pytest.mark.gpu
def test_graph_on_a_stream_that_is_nothing_but_a_handle():
    torch = torch_with_a_gpu()

    class Handle:
        def __cuda_stream__(self):
            return 0, torch.cuda.current_stream().cuda_stream

    w = bcy.quantize(np.eye(256, dtype=np.float32), "Q8_0").to("cuda")
    x, y = torch.ones(4, 256, device="cuda"), torch.zeros(4, 256, device="cuda")
    plan = w.plan(m=4)
    workspace = bcy.Workspace(plan.workspace_size, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run(w, x, y, workspace=workspace, stream=Handle())
        stream = bcy.Stream.from_handle(torch.cuda.current_stream().cuda_stream)
        plan.run(w, x, y, workspace=workspace, stream=stream)
    graph.replay()
    assert torch.equal(y, bcy.linear(x, w))


def faint(product):
    """A weight and tokens whose scales and products are subnormal."""
    weight, x = product.weight(N, K), random_activations(2, K)
    if isinstance(weight, problems.Nf4Weight):
        weight.absmax *= np.float32(2.0**-118)
        return weight, x * np.float32(2.0**-10)
    weight.data.reshape(-1, 34)[:, :2] = np.array([2.0**-18], np.float16).view(np.uint8)
    return weight, x * np.float32(2.0**-118)


@each("product", [*gguf_products("Q8_0"), nf4_product()])
def test_flush_to_zero_of_the_caller_changes_nothing(product):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    backend, (weight, x) = Backend("cpu"), faint(product)
    first = product.run(backend, weight, x)
    assert ((first & 0x7F800000 == 0) & (first & 0x7FFFFF != 0)).any()  # subnormals in the result
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush to zero")
    try:
        np.testing.assert_array_equal(product.run(backend, weight, x), first)
        # And the caller still has what it had asked for.
        assert float(torch.tensor([2.0**-130]) * torch.tensor([0.5])) == 0
    finally:
        torch.set_flush_denormal(False)


# ---- batch_invariant -----------------------------------------------------------------------------

# Two of K, one of which few kernels take, and both layouts, of which one takes even rows only.
NF4_BATCHES = [
    (nf4_product(f"{name}-{activation}", preference, activation, **how, nested=256), 38, k)
    for name, preference in (("nf4", None), ("nf4-exact", problems.EXACT))
    for activation in FLOATS
    for k, how in ((2304, {}), (1003, {"block_size": 32}), (2304, {"layout": "row_pair"}))
]


@pytest.mark.parametrize(
    ("product", "n", "k"),
    [*((product, N, K) for product in gguf_products(*FORMATS)), *NF4_BATCHES],
    ids=lambda value: getattr(value, "name", None),
)
def test_batch_invariant(backend, product, n, k):
    weight, x = product.weight(n, k), product.tokens(100, k)
    w = weight.tensor(backend)

    def run(tokens):
        return product.run(backend, weight, tokens, "float32", tensor=w)

    alone = np.concatenate([run(x[i : i + 1]) for i in range(100)])
    for m in [*range(34), 64, 100]:
        np.testing.assert_array_equal(run(x[:m]), alone[:m], f"{m=}")
    np.testing.assert_array_equal(run(x[::-1].copy()), alone[::-1])


NF4_PLAIN = [nf4_product("nf4-plain"), nf4_product("nf4-plain-exact", problems.EXACT)]


@pytest.mark.parametrize("m", [1, 5, 20])
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 36])
@each("product", [*PRODUCTS, *NF4_PLAIN])
def test_a_row_does_not_depend_on_the_others(backend, product, rows, m):
    whole, x = product.weight(N, K), product.tokens(m, K)
    want = product.run(backend, whole, x)[:, :rows]
    np.testing.assert_array_equal(product.run(backend, whole.rows(0, rows), x), want)


# ---- bit_stable_across_hardware ------------------------------------------------------------------


def on_both(product, weight, *arguments):
    return [product.run(Backend(device), weight, *arguments) for device in ("cpu", "cuda")]


GGUF_SHAPES = ((1, 256), (37, 2304), (257, 4096), (64, 14336))
NF4_SHAPES = ((2, 64), (38, 2304), (258, 4096), (64, 14336), (20, 1088))
NF4_LAYOUTS = [
    nf4_product(f"nf4-{layout}", problems.EXACT, layout=layout, nested=256) for layout in LAYOUTS
]


@pytest.mark.gpu
@pytest.mark.parametrize("activation", list(FLOATS))
@each("product", [*gguf_products(*FORMATS), *NF4_LAYOUTS])
def test_gpu_and_cpu_agree(product, activation):
    nf4 = product in NF4_LAYOUTS
    for n, k in NF4_SHAPES if nf4 else GGUF_SHAPES:
        weight = product.weight(n, k)
        for m in (1, 5, 8, 17, 33):
            x = random_activations(m, k, activation)
            for output in {activation, "float32"}:
                bias = bias_of(n, output) if nf4 else None
                results = on_both(product, weight, x, output, bias)
                np.testing.assert_array_equal(*results, f"{n=} {k=} {m=} {output=}")


NF4_CODEBOOKS = [nf4_product(name, problems.EXACT, codebook=name) for name in CODEBOOKS]


@pytest.mark.gpu
@each("product", [*gguf_products(*FORMATS), *NF4_CODEBOOKS])
def test_gpu_and_cpu_agree_on_every_bit_pattern(product):
    rng, weight = np.random.default_rng(8), product.weight(64, 2304)
    weight.any_scales(rng)
    x = rng.integers(0, 2**32, (9, 2304), np.uint32).view(np.float32)
    np.testing.assert_array_equal(*on_both(product, weight, x))


def digests():
    """For each format one digest of what every kernel of the CPU gives."""
    backend, results = Backend("cpu"), {}
    for name in FORMATS:
        digest = hashlib.sha256()
        data = np.random.default_rng(9).integers(
            0, 256, problems.packed_bytes(name, 133, 2304), np.uint8
        )
        for activation in FLOATS:
            x = random_activations(9, 2304, activation)
            x[2, 100] = np.nan
            for make in PATHS.values():
                for m in (1, 4, 9):
                    plan = make("cpu", name, 133, 2304, m, activation, activation)
                    digest.update(bits(backend.run(plan, data, x[:m])).tobytes())
            y = backend.empty((133, 2304), activation)
            problems.dequantize_plan("cpu", name, 133, 2304, activation).run(data, y)
            digest.update(bits(y).tobytes())
        results[name] = digest.hexdigest()
    return results


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_of_the_cpu_agrees(isa):
    used, theirs = problems.in_another_process(
        "test_guarantees", "[_cpu.isa(), t.digests()]", BARACUDA_CPU_ISA=isa
    )
    if used != isa:
        pytest.skip(f"this CPU has no {isa}")
    assert theirs == digests()


# ---- threads, processes, lifetimes ---------------------------------------------------------------


def test_threads_share_a_plan(backend, product):
    weight = product.weight(N, K)
    plan = product.plan(backend.device, weight, 5)
    tokens = [product.tokens(5, K, seed) for seed in range(8)]
    want = [product.run(backend, weight, x, plan=plan) for x in tokens]
    barrier, wrong = threading.Barrier(8), []

    def work(i):
        barrier.wait()
        runs = (product.run(backend, weight, tokens[i], plan=plan) for _ in range(30))
        wrong.extend(i for y in runs if (y != want[i]).any())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_fork():
    """The threads of the parent are not in the child: its first call starts its own."""
    code = """
        import os, warnings
        warnings.simplefilter("ignore")
        import test_guarantees as t
        first = t.result(t.PRODUCTS[0], t.Backend("cpu"), n=512)
        children = []
        for _ in range(3):
            child = os.fork()
            if not child:
                same = (t.result(t.PRODUCTS[0], t.Backend("cpu"), n=512) == first).all()
                os._exit(0 if same else 1)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        again = t.result(t.PRODUCTS[0], t.Backend("cpu"), n=512)
        print(codes, (again == first).all())
    """
    assert problems.child(code, BARACUDA_THREADS="4") == "[0, 0, 0] True"


class Owned(np.ndarray):
    """An array that can be watched."""


def test_a_plan_keeps_no_array(make):
    plan = make("cpu", "Q8_0", 8, 64, 2)
    arrays = {
        "weight": random_weight("Q8_0", 8, 64).view(Owned),
        "activations": random_activations(2, 64).view(Owned),
        "output": np.zeros((2, 8), np.float32).view(Owned),
        "bias": np.zeros(8, np.float32).view(Owned),
        "workspace": np.zeros(plan.workspace_size + 512, np.uint8).view(Owned),
    }
    start = -arrays["workspace"].ctypes.data % 256
    arrays["workspace"] = arrays["workspace"][start:]
    watched = [weakref.ref(array) for array in arrays.values()]
    plan.run(**arrays)
    broken = {**arrays, "activations": np.zeros((3, 64), np.float32)}
    with pytest.raises(bcy.InvalidProblem):
        plan.run(**broken)
    del arrays, broken
    gc.collect()
    assert [ref() for ref in watched] == [None] * 5


@pytest.mark.parametrize("right", [True, False])
def test_calls_leak_nothing(make, right):
    plan = make("cpu", "Q8_0", 8, 64, 2)
    weight, x = random_weight("Q8_0", 8, 64), random_activations(2 if right else 3, 64)
    y, workspace = np.zeros((2, 8), np.float32), bcy.Workspace(1 << 16, device="cpu")
    objects = (weight, x, y, workspace, plan, plan.descriptor)

    def calls(count):
        for _ in range(count):
            try:
                plan.run(weight, x, y, workspace=workspace)
            except bcy.InvalidProblem:
                assert not right
        gc.collect()
        return [sys.getrefcount(item) for item in objects], len(gc.get_objects())

    before_references, before_objects = calls(100)
    references, count = calls(1000)
    assert references == before_references
    assert count - before_objects < 50


def test_a_weight_lives_as_long_as_its_tensor():
    data = random_weight("Q8_0", 8, 64).view(Owned)
    watched = weakref.ref(data)
    w = bcy.GgufTensor(data, "Q8_0", (8, 64))
    view = np.from_dlpack(w)
    del data, w
    gc.collect()
    assert watched() is not None  # the view still uses it
    assert bcy.linear(random_activations(1, 64), bcy.GgufTensor(view, "Q8_0", (8, 64))).shape
    del view
    gc.collect()
    assert watched() is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "cupy", "jax"])
def test_inputs_deleted_while_the_kernel_runs(make, name):
    """Their frameworks may recycle the memory at once; the result must not see it."""
    from test_linear import Kind

    kind = Kind(name, "cuda")
    weight, x = random_weight("Q4_K", 2048, 8192), random_activations(33, 8192)
    want = Backend("cpu").run(make("cpu", "Q4_K", 2048, 8192, 33), weight, x)
    plan = make("cuda", "Q4_K", 2048, 8192, 33)
    for stream in (None, bcy.Stream()):
        y = bcy.DeviceArray.empty((33, 2048), "float32")
        theirs, tokens = kind.put(weight), kind.put(x)
        for _ in range(20):  # so that the last one waits behind the others
            workspace = bcy.Workspace(max(plan.workspace_size, 1), device="cuda")
            plan.run(theirs, tokens, y, workspace=workspace, stream=stream)
        del theirs, tokens, workspace
        gc.collect()
        for _ in range(4):
            kind.put(np.full(weight.shape, 255, np.uint8))
            kind.put(np.full(x.shape, np.nan, np.float32))
        if stream is not None:
            stream.synchronize()
        np.testing.assert_array_equal(bits(y.to_host()), bits(want))
