# SPDX-License-Identifier: Apache-2.0
"""Bad input gets a typed error naming argument, expected, given and remedy, and changes nothing."""

import pickle

import numpy as np
import problems
import pytest
from problems import SHAPE, random_activations, random_weight, refused

import baracuda_cy as bcy
from baracuda_cy import InvalidProblem, ReadOnlyArray, Unsupported, WorkspaceTooSmall

N, K, M = 8, 64, 3


@pytest.fixture(params=["staged", "float"])
def path(request):
    return request.param


@pytest.fixture
def plan(path):
    make = problems.staged_plan if path == "staged" else problems.float_plan
    return make("cpu", "Q8_0", N, K, M)


@pytest.fixture
def arguments(plan):
    """A call that is right."""
    return {
        "weight": random_weight("Q8_0", N, K),
        "activations": random_activations(M, K),
        "output": np.full((M, N), 77, np.float32),
        "workspace": bcy.Workspace(max(plan.workspace_size, 1), device="cpu"),
    }


def test_the_right_call_is_right(plan, arguments):
    plan.run(**arguments)
    assert (arguments["output"] != 77).all()


# ---- dtype, rank, shape, stride ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("activations", np.zeros((M, K)), r"activations: expected float32, got float64\[3, 64\]"),
        ("activations", np.zeros((M, K), np.int32), "activations: expected float32, got int32"),
        ("activations", np.zeros((M, K), np.complex64), "activations: expected float32"),
        ("output", np.zeros((M, N), np.float16), "output: expected float32, got float16"),
        ("weight", np.zeros(1000, np.float32), r"weight: expected uint8, got float32\[1000\]"),
        ("weight", np.zeros(1000, bool), "weight: expected uint8"),
        ("bias", np.zeros(N, np.float64), "bias: expected float32, got float64"),
    ],
)
def test_dtype(plan, arguments, name, value, match):
    refused(plan, arguments, InvalidProblem, match, **{name: value})


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("activations", (M, K + 32), r"activations: expected shape \[3, 64\], got .*\[3, 96\]"),
        ("activations", (M + 1, K), r"activations: expected shape \[3, 64\]"),
        ("activations", (K, M), r"activations: expected shape \[3, 64\]"),
        ("activations", (M * K,), r"activations: expected shape \[3, 64\]"),
        ("activations", (1, M, K), r"activations: expected shape \[3, 64\]"),
        ("activations", (), r"activations: expected shape \[3, 64\]"),
        ("output", (M, N - 1), r"output: expected shape \[3, 8\]"),
        ("output", (N, M), r"output: expected shape \[3, 8\]"),
        ("output", (M * N,), r"output: expected shape \[3, 8\]"),
        ("bias", (N + 1,), r"bias: expected shape \[8\]"),
        ("bias", (1, N), r"bias: expected shape \[8\]"),
        ("bias", (), r"bias: expected shape \[8\]"),
    ],
)
def test_shape(plan, arguments, name, shape, match):
    refused(plan, arguments, InvalidProblem, match, **{name: np.zeros(shape, np.float32)})


def test_shape_of_a_single_token(path):
    make = problems.staged_plan if path == "staged" else problems.float_plan
    plan = make("cpu", "Q8_0", N, K, 1)
    weight, y = random_weight("Q8_0", N, K), np.zeros(N, np.float32)
    with pytest.raises(InvalidProblem, match=r"activations: expected shape \[1, 64\] or \[64\]"):
        plan.validate(weight, np.zeros(K + 1, np.float32), y)


STRIDE = "stride 1 along the last axis and rows at least 64 apart"


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: np.zeros((M, 2 * K), np.float32)[:, ::2], STRIDE),
        (lambda: np.zeros((K, M), np.float32).T, STRIDE),
        (lambda: np.zeros((M, K), np.float32)[:, ::-1], STRIDE),
        (lambda: np.zeros((M, K), np.float32)[::-1], STRIDE),
        (lambda: np.broadcast_to(np.zeros(K, np.float32), (M, K)), STRIDE),
        (
            lambda: np.lib.stride_tricks.as_strided(np.zeros(256, np.float32), (M, K), (128, 4)),
            STRIDE,
        ),
    ],
    ids=["step", "transposed", "reversed columns", "reversed rows", "broadcast", "overlapping"],
)
def test_strides_of_activations(plan, arguments, make, match):
    refused(plan, arguments, InvalidProblem, f"activations: expected {match}", activations=make())


def test_strides_of_the_output(plan, arguments):
    for output in (
        np.zeros((M, 2 * N), np.float32)[:, ::2],
        np.zeros((N, M), np.float32).T,
        np.zeros((M, N), np.float32)[::-1],
        np.lib.stride_tricks.as_strided(np.zeros(64, np.float32), (M, N), (16, 4)),
    ):
        refused(plan, arguments, InvalidProblem, "output: expected stride 1", output=output)


def test_strides_of_weight_and_bias(plan, arguments):
    wide = np.zeros((N, 2 * 68), np.uint8)
    for weight in (wide[:, ::2], wide[:, :68], wide[:, ::-1]):
        refused(
            plan, arguments, InvalidProblem, "weight: expected one contiguous run", weight=weight
        )
    bias = np.zeros(2 * N, np.float32)[::2]
    refused(plan, arguments, InvalidProblem, "bias: expected stride 1", bias=bias)


@pytest.mark.parametrize("name", ["weight", "activations", "output", "bias", "workspace"])
@pytest.mark.parametrize("value", [object(), 3, "text", [[1.0]], {}])
def test_no_array(plan, arguments, name, value):
    if name == "workspace" and not plan.workspace_size:
        pytest.skip("this plan looks at no workspace")
    refused(plan, arguments, bcy.NotAnArray, f"^{name}: ", **{name: value})


@pytest.mark.parametrize("name", ["weight", "activations", "output"])
def test_missing_array(plan, arguments, name):
    refused(plan, arguments, bcy.NotAnArray, f"^{name}: ", **{name: None})


# ---- weight --------------------------------------------------------------------------------------


def test_short_weight(plan, arguments):
    weight = arguments["weight"][:-1]
    refused(
        plan,
        arguments,
        InvalidProblem,
        r"weight: expected at least 544 bytes \(Q8_0 8x64.*, got 543 in uint8\[543\]",
        weight=weight,
    )


def test_weight_that_ends_before_the_offset(path):
    make = problems.staged_plan if path == "staged" else problems.float_plan
    plan = make("cpu", "Q8_0", N, K, M, w_start_byte_offset=34)
    weight, x, y = random_weight("Q8_0", N, K), random_activations(M, K), np.zeros((M, N), "f4")
    with pytest.raises(InvalidProblem, match="weight: expected at least 578 bytes"):
        plan.validate(weight, x, y)
    assert plan.can_implement(np.zeros(578, np.uint8), x, y)


@pytest.mark.parametrize(("name", "alignment"), [("Q8_0", 2), ("Q8_K", 4), ("IQ4_XS", 2)])
def test_misaligned_weight(name, alignment):
    ncols = 256
    size = problems.packed_bytes(name, N, ncols)
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 16
    plan = problems.staged_plan("cpu", name, N, ncols, M)
    x, y = random_activations(M, ncols), np.zeros((M, N), np.float32)
    plan.validate(memory[start : start + size], x, y)
    with pytest.raises(InvalidProblem, match=f"weight: .* multiple of {alignment}, got 0x"):
        plan.validate(memory[start + alignment // 2 : start + alignment // 2 + size], x, y)


def test_mxfp4_may_start_anywhere():
    memory = np.zeros(17 * N * 2 + 1, np.uint8)
    plan = problems.staged_plan("cpu", "MXFP4", N, K, M)
    for start in (0, 1):
        weight = memory[start : start + 17 * N * 2]
        plan.validate(weight, random_activations(M, K), np.zeros((M, N), np.float32))


def test_misaligned_floats(plan, arguments):
    memory = np.zeros(4 * M * K + 4, np.uint8)
    activations = memory[1 : 1 + 4 * M * K].view(np.float32).reshape(M, K)
    refused(
        plan,
        arguments,
        InvalidProblem,
        "activations: expected an address that is a multiple of 4",
        activations=activations,
    )


def test_weight_of_another_plan(plan, arguments):
    for name, shape in (
        ("Q4_0", (N, K)),
        ("Q8_0", (N // 2, 2 * K)),
        ("Q8_0", (N - 1, K)),
        ("Q8_0", (N + 1, K)),
    ):
        packed = random_weight(name, max(N, shape[0]), shape[1])
        weight = bcy.GgufTensor(packed, name, shape)
        refused(
            plan, arguments, InvalidProblem, f"weight: expected Q8_0 {N}x{K}, m=.*", weight=weight
        )


def test_weight_that_is_no_part_of_a_tensor(path):
    make = problems.staged_plan if path == "staged" else problems.float_plan
    plan = make("cpu", "Q8_0", N, K, M, w_start_byte_offset=34)
    x, y = random_activations(M, K), np.zeros((M, N), np.float32)
    for rows in (N, N + 1):
        weight = bcy.GgufTensor(random_weight("Q8_0", N + 1, K), "Q8_0", (rows, K))
        with pytest.raises(
            InvalidProblem, match=r"weight: expected .*from byte 34 on.*weight\.data"
        ):
            plan.validate(weight, x, y)
        plan.validate(weight.data, x, y)


# ---- outputs -------------------------------------------------------------------------------------


def test_read_only_output(plan, arguments):
    output = np.full((M, N), 77, np.float32)
    output.flags.writeable = False
    refused(plan, arguments, ReadOnlyArray, "output: expected a writable array", output=output)
    assert issubclass(ReadOnlyArray, BufferError)


def test_buffer_of_bytes_as_output():
    plan = problems.dequantize_plan("cpu", "Q8_0", 1, 32)
    with pytest.raises(InvalidProblem, match="output: expected float32"):
        plan.run(random_weight("Q8_0", 1, 32), bytes(128))


def test_jax_output(plan, arguments):
    jnp = pytest.importorskip("jax.numpy")
    output = jnp.zeros((M, N), jnp.float32)
    refused(plan, arguments, ReadOnlyArray, "output: expected a writable array", output=output)
    assert (np.asarray(output) == 0).all()


def test_read_only_inputs_are_fine(plan, arguments):
    for name in ("weight", "activations"):
        arguments[name].flags.writeable = False
    plan.run(**arguments)


@pytest.mark.parametrize("name", ["weight", "activations", "bias"])
def test_output_overlapping_an_input(path, name):
    make = problems.staged_plan if path == "staged" else problems.float_plan
    plan = make("cpu", "Q8_0", N, N * 32, M)
    memory = np.zeros(1 << 16, np.uint8)
    memory = memory[-memory.ctypes.data % 16 :]
    inputs = {
        "weight": memory[: problems.packed_bytes("Q8_0", N, N * 32)],
        "activations": memory[: 4 * M * N * 32].view(np.float32).reshape(M, -1),
        "bias": memory[: 4 * N].view(np.float32),
    }
    free = {
        "weight": random_weight("Q8_0", N, N * 32),
        "activations": random_activations(M, N * 32),
        "bias": np.zeros(N, np.float32),
    }
    size = inputs[name].nbytes
    free[name] = inputs[name]
    outputs = {
        at: memory[at : at + 4 * M * N].view(np.float32).reshape(M, N) for at in (0, size - 4, size)
    }
    for at, output in outputs.items():
        if at == size:
            plan.validate(free["weight"], free["activations"], output, bias=free["bias"])
            continue
        with pytest.raises(InvalidProblem, match=f"output: expected memory apart from {name}"):
            plan.validate(free["weight"], free["activations"], output, bias=free["bias"])


def test_output_beside_the_part_of_the_weight_that_is_used():
    memory = np.zeros(4096, np.uint8)
    memory = memory[-memory.ctypes.data % 16 :]
    plan = problems.float_plan("cpu", "Q8_0", 1, 32, 1, w_start_byte_offset=1024)
    x = random_activations(1, 32)
    plan.validate(memory[:2048], x, memory[:4].view(np.float32))
    plan.validate(memory[:2048], x, memory[1060:1064].view(np.float32))
    with pytest.raises(InvalidProblem, match="output: expected memory apart from weight"):
        plan.validate(memory[:2048], x, memory[1024:1028].view(np.float32))


def test_dequantize_over_its_own_weight():
    memory = np.zeros(4096, np.uint8)
    memory = memory[-memory.ctypes.data % 16 :]
    plan = problems.dequantize_plan("cpu", "Q8_0", 1, 32)
    with pytest.raises(InvalidProblem, match="output: expected memory apart from weight"):
        plan.run(memory[:34], memory[:128].view(np.float32).reshape(1, 32))


# ---- workspace -----------------------------------------------------------------------------------


@pytest.fixture
def staged():
    plan = problems.staged_plan("cpu", "Q8_0", N, K, M)
    return plan, {
        "weight": random_weight("Q8_0", N, K),
        "activations": random_activations(M, K),
        "output": np.full((M, N), 77, np.float32),
    }


def aligned(size, extra=0):
    memory = np.zeros(size + 512, np.uint8)
    start = -memory.ctypes.data % 256 + extra
    return memory[start : start + size]


def test_no_workspace(staged):
    plan, arguments = staged
    with pytest.raises(WorkspaceTooSmall, match=r"expected at least \d+ bytes, got 0; lend") as e:
        plan.run(**arguments)
    assert (e.value.needed, e.value.got) == (plan.workspace_size, 0)
    assert (arguments["output"] == 77).all()


@pytest.mark.parametrize("make", [aligned, lambda size: bcy.Workspace(size, device="cpu")])
def test_workspace_too_small(staged, make):
    plan, arguments = staged
    with pytest.raises(WorkspaceTooSmall) as e:
        plan.run(**arguments, workspace=make(plan.workspace_size - 1))
    assert (e.value.needed, e.value.got) == (plan.workspace_size, plan.workspace_size - 1)


def test_misaligned_workspace(staged):
    plan, arguments = staged
    refused(
        plan,
        arguments,
        InvalidProblem,
        "workspace: expected an address that is a multiple of 256",
        workspace=aligned(plan.workspace_size, 128),
    )


def test_read_only_workspace(staged):
    plan, arguments = staged
    workspace = aligned(plan.workspace_size)
    workspace.flags.writeable = False
    refused(plan, arguments, ReadOnlyArray, "workspace: expected a writable", workspace=workspace)


def test_strided_workspace(staged):
    plan, arguments = staged
    workspace = aligned(2 * plan.workspace_size)[::2]
    refused(
        plan, arguments, InvalidProblem, "workspace: expected one contiguous", workspace=workspace
    )


@pytest.mark.parametrize("name", ["weight", "activations", "output"])
def test_workspace_overlapping_an_array(staged, name):
    plan, arguments = staged
    array = arguments[name]
    memory = aligned(plan.workspace_size + array.nbytes)
    inside = memory[plan.workspace_size - 4 :][: array.nbytes].view(array.dtype)
    arguments[name] = inside.reshape(array.shape)
    with pytest.raises(InvalidProblem, match="expected memory apart from"):
        plan.run(**arguments, workspace=memory[: plan.workspace_size])


def test_closed_workspace(staged):
    plan, arguments = staged
    workspace = bcy.Workspace(plan.workspace_size, device="cpu")
    workspace.close()
    with pytest.raises(bcy.BaracudaError, match="workspace"):
        plan.run(**arguments, workspace=workspace)


# ---- streams and devices -------------------------------------------------------------------------


class ForeignStream:
    def __cuda_stream__(self):
        return 0, 1


def test_stream_on_the_cpu(plan, arguments):
    refused(
        plan,
        arguments,
        InvalidProblem,
        "stream: expected None on the CPU, got ForeignStream; leave it out",
        stream=ForeignStream(),
    )


def test_stream_of_a_weight_that_stays_on_the_cpu():
    for w in (
        bcy.GgufTensor(random_weight("Q8_0", N, K), "Q8_0", (N, K)),
        bcy.quantize(np.ones((N, K), np.float32), "nf4", nested=True),
    ):
        with pytest.raises(InvalidProblem, match="stream: expected None on the CPU, got ForeignS"):
            w.to("cpu", stream=ForeignStream())


class FakeCudaArray:
    """Says that it is on a GPU; its memory must never be touched."""

    def __init__(self, shape, typestr):
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": typestr,
            "data": (256, False),
            "version": 3,
            "stream": None,
        }


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("weight", FakeCudaArray((544,), "|u1")),
        ("activations", FakeCudaArray((M, K), "<f4")),
        ("output", FakeCudaArray((M, N), "<f4")),
        ("bias", FakeCudaArray((N,), "<f4")),
    ],
)
def test_two_devices(plan, arguments, name, array):
    arguments = {**arguments, name: array}
    with pytest.raises(bcy.BaracudaError, match=name) as caught:
        plan.run(**arguments)
    assert isinstance(caught.value, (InvalidProblem, bcy.CudaError, Unsupported))


@pytest.mark.parametrize(
    "device",
    [
        b"cuda",
        bytearray(b"cpu"),
        np.str_("nonsense"),
        "gpu",
        "",
        "cuda0",
        "tpu:0",
        True,
        None,
        object(),
        1.5,
    ],
)
def test_no_device(device):
    with pytest.raises(InvalidProblem, match='device: expected "cpu", "cuda", "cuda:1"'):
        problems.staged_plan(device, "Q8_0", N, K, M)


def test_cuda_where_there_is_none():
    from baracuda_cy import _cuda

    if _cuda.why_unavailable() is None:
        pytest.skip("this machine has a GPU")
    for device in ("cuda", "cuda:0", "cuda:7", np.str_("cuda")):
        with pytest.raises(Unsupported, match=r"^device: .*cpu"):
            problems.staged_plan(device, "Q8_0", N, K, M)
    weight = bcy.GgufTensor(random_weight("Q8_0", N, K), "Q8_0", (N, K))
    with pytest.raises(Unsupported, match="device: "):
        weight.to("cuda")


@pytest.mark.gpu
def test_cuda_device_that_is_not_there():
    with pytest.raises((Unsupported, InvalidProblem), match="99"):
        problems.staged_plan("cuda:99", "Q8_0", N, K, M)


@pytest.mark.gpu
def test_host_array_for_a_cuda_plan():
    plan = problems.float_plan("cuda:0", "Q8_0", N, K, M)
    backend = problems.Backend("cuda:0")
    right = {
        "weight": random_weight("Q8_0", N, K),
        "activations": random_activations(M, K),
        "output": np.zeros((M, N), np.float32),
    }
    for name, array in right.items():
        arguments = {other: backend.put(value) for other, value in right.items()}
        arguments[name] = array
        with pytest.raises(
            InvalidProblem, match=f"{name}: expected an array on cuda:0, got .* cpu"
        ):
            plan.run(**arguments)


@pytest.mark.gpu
def test_closed_stream_and_buffer():
    plan = problems.float_plan("cuda:0", "Q8_0", N, K, M)
    backend = problems.Backend("cuda:0")
    x, y = backend.put(random_activations(M, K)), backend.empty((M, N), "float32")
    weight = bcy.DeviceBuffer.from_host(random_weight("Q8_0", N, K))
    stream = bcy.Stream()
    plan.run(weight, x, y, stream=stream)
    stream.synchronize()
    stream.close()
    with pytest.raises(bcy.BaracudaError, match="stream"):
        plan.run(weight, x, y, stream=stream)
    weight.close()
    with pytest.raises(bcy.BaracudaError, match="weight"):
        plan.run(weight, x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("stream", [0, 1, "stream", object()])
def test_no_stream(stream):
    plan = problems.float_plan("cuda:0", "Q8_0", N, K, M)
    backend = problems.Backend("cuda:0")
    with pytest.raises(bcy.BaracudaError, match="stream"):
        plan.run(
            backend.put(random_weight("Q8_0", N, K)),
            backend.put(random_activations(M, K)),
            backend.empty((M, N), "float32"),
            stream=stream,
        )


@pytest.mark.gpu
def test_weight_beyond_the_memory_of_the_device():
    with pytest.raises(bcy.OutOfMemory):
        bcy.DeviceBuffer(1 << 50)


# ---- autograd ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["activations", "output", "bias"])
def test_requires_grad(plan, arguments, name):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    shape = {"activations": (M, K), "output": (M, N), "bias": (N,)}[name]
    array = torch.zeros(shape, requires_grad=True)
    refused(plan, arguments, InvalidProblem, f"{name}: .*grad", **{name: array})
    plan.run(**{**arguments, name: array.detach()})


@pytest.mark.parametrize("name", ["x", "out", "bias", "array", "absmax", "data", "source"])
def test_negative_bit(name):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    w = bcy.quantize(np.ones((1, 1), np.float32), "nf4")
    # The imaginary part of a conjugate is negated once it is read, not in memory.
    imaginary = torch.full((1, 1), 1j).conj().imag
    scale = imaginary.reshape(1)
    assert imaginary.is_neg()
    assert scale.is_neg()
    x = np.ones((1, 1), np.float32)
    refused = {
        "x": lambda: bcy.linear(imaginary, w),
        "out": lambda: bcy.linear(x, w, out=imaginary),
        "bias": lambda: bcy.linear(x, w, bias=scale),
        "array": lambda: bcy.quantize(imaginary, "nf4"),
        "absmax": lambda: bcy.Nf4Tensor(w.data, scale, (1, 1)),
        "data": lambda: bcy.GgufTensor(
            torch._neg_view(torch.zeros(34, dtype=torch.uint8)), "Q8_0", (1, 32)
        ),
        "source": lambda: bcy.DeviceBuffer.from_host(imaginary),
    }[name]
    with pytest.raises(InvalidProblem, match=rf"^{name}: .*negative bit; pass it as .resolve_neg"):
        refused()
    for argument, position in (("activations", 1), ("output", 2)):
        arguments = [w, x, x.copy()]
        arguments[position] = imaginary
        with pytest.raises(InvalidProblem, match=f"^{argument}: .*negative bit"):
            w.plan(activation="float32").run(*arguments)
    assert (bcy.linear(imaginary.resolve_neg(), w) == -1).all()


# ---- descriptors ---------------------------------------------------------------------------------

PLANS = [
    (bcy.GgufMmvqPlan, bcy.GgufMmvqDescriptor),
    (bcy.GgufMmvqMultiMPlan, bcy.GgufMmvqMultiMDescriptor),
    (bcy.GgufDequantizePlan, bcy.GgufDequantizeDescriptor),
]


@pytest.mark.parametrize(("kind", "descriptor"), PLANS)
@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"nrows": -1}, "nrows: expected 0 or more, got -1"),
        ({"ncols": -256}, "ncols: expected"),
        ({"ncols": 255}, r"ncols: expected a multiple of 256 \(the block size of Q4_K\), got 255"),
        ({"ncols": 32}, "ncols: expected a multiple of 256"),
        ({"w_start_byte_offset": -2}, "w_start_byte_offset: expected 0 or more"),
        ({"w_start_byte_offset": 3}, r"w_start_byte_offset: expected a multiple of 2 \(Q4_K\)"),
        ({"nrows": 2**63}, "nrows: expected at most"),
        ({"nrows": 2**40, "ncols": 2**40}, "nrows: expected a matrix whose bytes"),
        ({"nrows": 2**62, "ncols": 256}, "nrows: expected a matrix whose bytes"),
        ({"w_start_byte_offset": 2**63 - 2}, "nrows: expected a matrix whose bytes"),
    ],
)
def test_descriptor_of_no_problem(kind, descriptor, fields, match):
    desc = descriptor(**{"nrows": 4, "ncols": 256, "block_format": "Q4_K", **fields})
    with pytest.raises(InvalidProblem, match=match) as caught:
        kind.select("cpu", desc)
    assert SHAPE.match(str(caught.value))


@pytest.mark.parametrize(("kind", "descriptor"), PLANS[:2])
@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"m": -1}, "m: expected 0 or more"),
        ({"m": 2**62}, "m: expected"),
        ({"m": 2**64}, "m: expected at most"),
        ({"activation": "int8"}, "activation: expected float32, float16 or bfloat16, got int8"),
        ({"output": "float64"}, "output: expected float32, float16 or bfloat16, got float64"),
    ],
)
def test_product_of_no_problem(kind, descriptor, fields, match):
    desc = descriptor(**{"nrows": 4, "ncols": 256, "block_format": "Q4_K", **fields})
    with pytest.raises(InvalidProblem, match=match):
        kind.select("cpu", desc)


@pytest.mark.parametrize(("kind", "descriptor"), PLANS)
def test_more_than_two_to_the_31_elements_is_a_problem_like_any(kind, descriptor):
    plan = kind.select("cpu", descriptor(nrows=2**20, ncols=2**13, block_format="Q4_K"))
    others = [np.zeros(1)] * (1 if kind is bcy.GgufDequantizePlan else 2)
    with pytest.raises(InvalidProblem, match=f"weight: expected at least {2**33 // 256 * 144}"):
        plan.validate(np.zeros(4096, np.uint8), *others)


def test_float_output_of_another_type():
    for activation, output in (("float32", "float16"), ("float16", "bfloat16")):
        with pytest.raises(InvalidProblem, match=r"output: expected .* or float32, got"):
            problems.float_plan("cpu", "Q8_0", N, K, M, activation, output)


@pytest.mark.parametrize(("kind", "descriptor"), PLANS)
def test_no_descriptor(kind, descriptor):
    others = [other() for _, other in PLANS if other is not descriptor]
    for desc in (None, {}, "Q4_K", *others):
        with pytest.raises(InvalidProblem, match=f"desc: expected a {descriptor.__name__}, got"):
            kind.select("cpu", desc)
    with pytest.raises(InvalidProblem, match="preference: expected a PlanPreference, got dict"):
        kind.select("cpu", descriptor(), {})


@pytest.mark.parametrize(("kind", "descriptor"), PLANS)
def test_a_plan_is_selected(kind, descriptor):
    with pytest.raises(TypeError, match=rf"{kind.__name__}\.select\(device, descriptor\)"):
        kind(descriptor())


@pytest.mark.parametrize("kind", [bcy.GgufMmvqPlan, bcy.GgufMmvqMultiMPlan])
def test_a_plan_that_was_not_selected(kind):
    plan = kind.__new__(kind)
    with pytest.raises(InvalidProblem, match=r"plan: expected one that select made"):
        plan.validate(bytes(8), np.zeros((1, 8)), np.zeros((1, 8)))


def test_preference_for_the_other_path():
    with pytest.raises(InvalidProblem, match=r"preference: .*select a GgufMmvqMultiMPlan"):
        problems.float_plan(
            "cpu", "Q8_0", N, K, M, preference=bcy.PlanPreference(activations="staged")
        )
    with pytest.raises(InvalidProblem, match=r"preference: .*select a GgufMmvqPlan"):
        problems.staged_plan(
            "cpu", "Q8_0", N, K, M, preference=bcy.PlanPreference(activations="float")
        )


# ---- packed tensors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "shape", "match"),
    [
        (np.zeros(67, np.uint8), (1, 64), "data: expected at least 68 bytes, got 67"),
        (np.zeros(68, np.float32), (1, 64), "data: expected uint8, got float32"),
        (np.zeros(200, np.uint8)[::2], (1, 64), "data: expected one contiguous run"),
        (np.zeros(69, np.uint8)[1:], (1, 64), "data: expected an address"),
        (np.zeros(68, np.uint8), (1, 65), "ncols: expected a multiple of 32"),
        (np.zeros(68, np.uint8), (-1, 64), "shape: expected sizes of 0 or more"),
        (np.zeros(68, np.uint8), (), "shape: expected one or more sizes"),
        (np.zeros(68, np.uint8), 64, "shape: expected a tuple"),
        (np.zeros(68, np.uint8), (1.0, 64), "shape: expected a tuple"),
        (np.zeros(68, np.uint8), (True, 64), "shape: expected a tuple"),
        (np.zeros(68, np.uint8), (2**60, 64), "shape: expected an array of fewer than"),
        (np.zeros(0, np.uint8), (0, 2**62), "shape: expected an array of fewer than"),
    ],
)
def test_tensor_of_no_weight(data, shape, match):
    if data.dtype == np.uint8 and data.size == 68 and data.base is not None:
        assert data.ctypes.data % 2
    with pytest.raises(InvalidProblem, match=match):
        bcy.GgufTensor(data, "Q8_0", shape)


@pytest.mark.parametrize("data", [object(), 68, "text", None, [0] * 68])
def test_tensor_of_no_array(data):
    with pytest.raises(bcy.NotAnArray, match=r"^data: "):
        bcy.GgufTensor(data, "Q8_0", (1, 64))


def test_tensor_is_immutable():
    w = bcy.GgufTensor(bytes(68), "Q8_0", (1, 64))
    with pytest.raises(AttributeError, match="immutable"):
        w.format = "Q4_0"
    with pytest.raises(AttributeError, match="immutable"):
        del w.data
    with pytest.raises(AttributeError):
        w.something = 1


def test_tensors_are_made_once():
    code, scales = np.zeros(256, np.float32), np.zeros(1, np.float32)
    for kind, arguments in (
        (bcy.GgufTensor, (bytes(68), "Q8_0", (2, 32))),
        (bcy.Nf4Tensor, (bytes(32), scales, (1, 64))),
        (bcy.NestedAbsmax, (code, scales, 0.0)),
    ):
        tensor = kind(*arguments)
        text = repr(tensor)
        with pytest.raises(InvalidProblem, match=f"{kind.__name__}: expected to be made once"):
            tensor.__init__(*arguments)
        assert repr(tensor) == text


# ---- the exceptions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "base"),
    [
        (bcy.InvalidProblem, ValueError),
        (bcy.NotAnArray, TypeError),
        (bcy.NotAnArray, bcy.InvalidProblem),
        (bcy.ReadOnlyArray, BufferError),
        (bcy.ReadOnlyArray, bcy.InvalidProblem),
        (bcy.Unsupported, NotImplementedError),
        (bcy.WorkspaceTooSmall, bcy.InvalidProblem),
        (bcy.CudaError, RuntimeError),
        (bcy.OutOfMemory, MemoryError),
        (bcy.OutOfMemory, bcy.CudaError),
        (bcy.FileFormatError, ValueError),
    ],
)
def test_family(error, base):
    assert issubclass(error, base)
    assert issubclass(error, bcy.BaracudaError)


@pytest.mark.parametrize(
    "error",
    [
        WorkspaceTooSmall(5120, 12),
        bcy.CudaError(700, "cudaErrorIllegalAddress", "launching"),
        bcy.OutOfMemory(2, "cudaErrorMemoryAllocation"),
        InvalidProblem("x: expected a, got b; c"),
    ],
)
def test_errors_pickle(error):
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is type(error)
    assert str(other) == str(error)
    assert vars(other) == vars(error)


@pytest.mark.parametrize(
    "kind",
    [
        bcy.GgufMmvqPlan,
        bcy.GgufMmvqMultiMPlan,
        bcy.GgufDequantizePlan,
        bcy.Nf4MmvqPlan,
        bcy.Nf4MmvqMultiMPlan,
        bcy.Nf4DequantizePlan,
    ],
)
def test_a_plan_that_was_never_selected(kind):
    plan = kind.__new__(kind)
    w = bcy.quantize(np.eye(32, dtype=np.float32), "nf4" if "Nf4" in kind.__name__ else "Q8_0")
    x = np.ones((1, 32), np.float32)
    arguments = (w, x) if "Dequantize" in kind.__name__ else (w, x, x.copy())
    assert repr(plan) == f"{kind.__name__}(empty)"
    assert not plan.can_implement(*arguments)
    for use in (
        lambda: plan.run(*arguments),
        lambda: plan.validate(*arguments),
        lambda: plan.device,
        lambda: plan.precision_guarantee,
        lambda: pickle.dumps(plan),
    ):
        with pytest.raises(
            InvalidProblem, match="plan: expected one that select made, got an empty"
        ):
            use()


def test_what_operations_advise_needs_no_plan():
    w = bcy.quantize(np.eye(32, dtype=np.float32), "Q8_0")
    x = np.ones((1, 32), np.float32)
    for use in (
        lambda: bcy.linear(x, w, np.ones(31, np.float32)),
        lambda: bcy.linear(x, w, np.ones(32, np.float16)),
        lambda: w.dequantize("float16", np.empty((32, 32), np.float32)),
    ):
        with pytest.raises(InvalidProblem, match=r"; (reshape|convert) it$"):
            use()
    with pytest.raises(InvalidProblem, match=r"dtype: .* got float64; choose one of them"):
        bcy.dequantize(w, "float64")


@pytest.mark.gpu
def test_operations_on_two_devices_advise_to_move():
    w = bcy.quantize(np.eye(32, dtype=np.float32), "Q8_0").to("cuda")
    with pytest.raises(InvalidProblem, match=r"^w: .* got uint8.* on cuda:0; move it there$"):
        bcy.linear(np.ones((1, 32), np.float32), w)


def test_too_many_dimensions_of_a_weight():
    with pytest.raises(InvalidProblem, match="shape: expected at most 8 dimensions, got 9"):
        bcy.GgufTensor(np.zeros(34, np.uint8), "Q8_0", (1,) * 8 + (32,))
