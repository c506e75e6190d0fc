# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
from producers import held

from baracuda_cy import (
    DeviceArray,
    DeviceBuffer,
    ElementKind,
    InvalidProblem,
    OutOfMemory,
    PinnedBuffer,
    ReadOnlyArray,
    Stream,
    Unsupported,
    Workspace,
    _cuda,
)
from baracuda_cy.dlpack import describe, inspect
from baracuda_cy.memory import live_bytes
from baracuda_cy.pending import pending


def test_an_array_that_was_not_made_is_refused():
    array = DeviceArray.__new__(DeviceArray)
    for use in (
        np.from_dlpack,
        inspect,
        DeviceArray.to_host,
        DeviceArray.__dlpack_device__,
        lambda it: it.__cuda_array_interface__,
    ):
        with pytest.raises(InvalidProblem, match="expected a DeviceArray that was made"):
            use(array)


# ---- scratch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 1, 255, 4096, 1 << 20])
def test_workspace(nbytes):
    workspace = Workspace(nbytes)
    assert workspace.nbytes == nbytes
    assert workspace.device == "cpu"
    assert workspace.ptr % 256 == 0
    assert repr(workspace) == f"Workspace({nbytes}, device='cpu')"
    found = inspect(workspace)
    assert found["pointer"] == workspace.ptr
    assert found["shape"] == (nbytes,)
    assert found["element"] is ElementKind.U8
    assert not found["readonly"]


@pytest.mark.parametrize("offset", [0, 1, 100, 255])
def test_lent_workspace(offset):
    memory = np.zeros(4096, np.uint8)[offset:]
    workspace = Workspace(buffer=memory)
    skipped = workspace.ptr - memory.ctypes.data
    assert workspace.ptr % 256 == 0
    assert 0 <= skipped < 256
    assert workspace.nbytes == memory.nbytes - skipped
    assert Workspace(buffer=memory.view(np.uint8)[:0]).nbytes == 0
    assert Workspace(buffer=np.zeros((8, 32), np.float32)).nbytes > 768


def test_sizes_of_another_library():
    assert Workspace(np.int64(64), device="cpu").nbytes == 64


def test_a_lent_buffer_is_released():
    data = bytearray(1024)
    workspace = Workspace(buffer=data)
    with pytest.raises(BufferError):
        data.extend(b"more")
    workspace.close()
    data.extend(b"more")


@pytest.mark.parametrize("change", ["resize_", "set_", "data"])
def test_a_lent_tensor_that_moves(change):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensor, other = torch.zeros(1024, dtype=torch.uint8), torch.zeros(1 << 20, dtype=torch.uint8)
    workspace = Workspace(buffer=tensor)
    if change == "resize_":
        tensor.resize_(1 << 20)
    elif change == "set_":
        tensor.set_(other)
    else:
        tensor.data = other
    skipped = -tensor.data_ptr() % 256
    assert workspace.ptr == inspect(workspace)["pointer"] == tensor.data_ptr() + skipped
    assert (workspace.nbytes,) == inspect(workspace)["shape"] == ((1 << 20) - skipped,)


def test_a_lent_tensor_whose_storage_is_freed():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensor = torch.zeros(1024, dtype=torch.uint8)
    workspace = Workspace(buffer=tensor)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(InvalidProblem, match="array: expected memory for shape"):
        inspect(workspace)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, InvalidProblem, "either nbytes or buffer=, got neither"),
        ({"nbytes": 3, "buffer": bytearray(3)}, InvalidProblem, "got both"),
        ({"nbytes": -1}, InvalidProblem, "size of 0 or more, got -1"),
        ({"nbytes": 1.5}, InvalidProblem, "size of 0 or more, got 1.5"),
        ({"nbytes": True}, InvalidProblem, "size of 0 or more, got True"),
        ({"nbytes": 1 << 63}, InvalidProblem, "size of 0 or more"),
        ({"buffer": b"bytes"}, ReadOnlyArray, "writable array, got uint8"),
        ({"buffer": bytearray(3), "device": "cpu"}, InvalidProblem, "no device and no stream"),
        ({"buffer": np.zeros((4, 4))[:, 1:]}, InvalidProblem, "C-contiguous array, got strides"),
        ({"buffer": np.zeros(4, "M8[s]")}, InvalidProblem, "numeric type, got datetime64"),
        ({"buffer": 3}, InvalidProblem, "buffer: expected an array"),
        ({"nbytes": 3, "device": "cpu", "stream": 1}, InvalidProblem, "stream: .*None on the CPU"),
        ({"nbytes": 3, "device": "gpu"}, (InvalidProblem, Unsupported), "device"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_workspaces_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Workspace(**arguments)


def test_jax_arrays_are_no_scratch():
    jax = pytest.importorskip("jax")
    cpu = jax.devices("cpu")[0]
    with pytest.raises(ReadOnlyArray):
        Workspace(buffer=jax.device_put(jax.numpy.zeros(1024), cpu))


def test_workspaces_are_made_once():
    workspace = Workspace(64)
    with pytest.raises(InvalidProblem, match="workspace: expected to be made once"):
        workspace.__init__(buffer=workspace)
    assert workspace.nbytes == 64


def test_a_lent_buffer_may_become_read_only():
    buffer = np.zeros(1 << 12, np.uint8)
    workspace = Workspace(buffer=buffer)
    buffer.setflags(write=False)
    with pytest.raises(ReadOnlyArray, match="array: expected a writable array"):
        inspect(workspace)
    assert repr(workspace) == "Workspace(buffer=uint8[4096] on cpu)"


def test_closed_workspaces_are_refused():
    with Workspace(64) as workspace:
        pass
    assert workspace.closed
    workspace.close()
    assert repr(workspace) == "Workspace(closed)"
    for use in (
        lambda: workspace.nbytes,
        lambda: workspace.ptr,
        lambda: workspace.device,
        lambda: inspect(workspace),
        workspace.__enter__,
    ):
        with pytest.raises(InvalidProblem, match="open Workspace, got one that is closed"):
            use()


def test_more_memory_than_there_is():
    with pytest.raises(OutOfMemory, match=rf"allocating {1 << 62} bytes: the host has no memory"):
        Workspace(1 << 62)


# ---- without a GPU ---------------------------------------------------------------------------


def test_without_cuda_the_reason_is_given():
    reason = _cuda.why_unavailable()
    if reason is None:
        pytest.skip("there is a GPU here")
    for make in (
        lambda: DeviceBuffer(16),
        lambda: DeviceBuffer.from_host(b"bytes"),
        lambda: DeviceArray.empty((4,), "f32"),
        lambda: PinnedBuffer(16),
        lambda: Workspace(16, device="cuda"),
    ):
        with pytest.raises(Unsupported) as caught:
            make()
        assert reason in str(caught.value)


def test_sizes_and_sources_are_checked_first():
    for nbytes in (-1, 1.5, None, True, 1 << 63):
        with pytest.raises(InvalidProblem, match="nbytes: expected a size of 0 or more"):
            DeviceBuffer(nbytes)
        with pytest.raises(InvalidProblem, match="nbytes: expected a size of 0 or more"):
            PinnedBuffer(nbytes)
    with pytest.raises(InvalidProblem, match="C-contiguous array, got strides"):
        DeviceBuffer.from_host(np.zeros((4, 4)).T[1:])
    with pytest.raises(InvalidProblem, match="buffer: expected a DeviceBuffer, got bytes"):
        DeviceArray((4,), "u8", b"data")
    for shape in ((-1,), (1.5,), (True,), (1 << 62, 4), (0, 1 << 62), (1,) * 9):
        with pytest.raises(InvalidProblem, match=r"shape: expected .*, got .*; [a-z]+ "):
            DeviceArray.empty(shape, "f32")
    with pytest.raises(InvalidProblem, match="dtype"):
        DeviceArray.empty((4,), "complex64")


# ---- device memory ---------------------------------------------------------------------------


@pytest.fixture
def stream():
    with Stream() as stream:
        yield stream


@pytest.fixture
def data():
    return np.random.default_rng(0).integers(0, 256, 100_003, np.uint8)


@pytest.mark.gpu
@pytest.mark.parametrize("nbytes", [0, 1, 4096, 100 << 20])
def test_device_buffer(nbytes, stream):
    before = held("device")
    buffer = DeviceBuffer(nbytes, stream=stream)
    assert buffer.nbytes == len(buffer) == nbytes
    assert buffer.device == 0
    assert buffer.stream is stream
    assert (buffer.ptr != 0) == (nbytes != 0)
    assert buffer.ptr % 256 == 0
    assert repr(buffer) == f"DeviceBuffer({nbytes}, device='cuda:0')"
    assert held("device") == before + nbytes
    assert bytes(buffer.fill(7).copy_to_host()) == b"\7" * nbytes
    buffer.close()
    assert held("device") == before
    assert buffer.closed
    assert repr(buffer) == "DeviceBuffer(closed)"
    for use in (lambda: buffer.ptr, lambda: buffer.copy_to_host(), lambda: inspect(buffer)):
        with pytest.raises(InvalidProblem, match="open DeviceBuffer, got one that is closed"):
            use()


@pytest.mark.gpu
def test_round_trips(data, stream):
    buffer = DeviceBuffer.from_host(data)
    assert bytes(buffer.copy_to_host()) == data.tobytes()
    target = np.empty_like(data)
    assert buffer.copy_to_host(target) is target
    np.testing.assert_array_equal(target, data)
    other = DeviceBuffer(data.nbytes, stream=stream)
    other.copy_from_host(data.tobytes())
    np.testing.assert_array_equal(np.frombuffer(other.copy_to_host(), np.uint8), data)
    # A shorter source leaves the rest alone; a longer target keeps its own.
    other.copy_from_host(bytes(10))
    assert bytes(other.copy_to_host())[:12] == bytes(10) + data.tobytes()[10:12]
    target = np.full(data.size + 3, 9, np.uint8)
    other.copy_to_host(target)
    assert list(target[-3:]) == [9, 9, 9]


@pytest.mark.gpu
def test_copies_on_another_stream(data, stream):
    for _ in range(20):
        buffer = DeviceBuffer(data.nbytes).fill(1)
        buffer.copy_from_host(data, stream=stream)
        target = np.zeros_like(data)
        with Stream() as third:
            buffer.copy_to_host(target, stream=third)
        np.testing.assert_array_equal(target, data)


@pytest.mark.gpu
def test_copies_that_are_refused(data):
    buffer = DeviceBuffer(16)
    with pytest.raises(InvalidProblem, match="at most 16 bytes, the size of the buffer, got 17"):
        buffer.copy_from_host(bytes(17))
    with pytest.raises(InvalidProblem, match="at least 16 bytes, the size of the buffer, got 15"):
        buffer.copy_to_host(bytearray(15))
    with pytest.raises(ReadOnlyArray, match="target: expected a writable array"):
        buffer.copy_to_host(bytes(16))
    with pytest.raises(InvalidProblem, match="source: expected host memory, got uint8"):
        buffer.copy_from_host(DeviceBuffer(16))
    with pytest.raises(InvalidProblem, match="value: expected a byte"):
        buffer.fill(256)


@pytest.mark.gpu
def test_out_of_memory():
    with pytest.raises(OutOfMemory, match=r"allocating \d+ bytes on cuda:0; \d+ of \d+") as caught:
        DeviceBuffer(1 << 50)
    assert caught.value.name == "cudaErrorMemoryAllocation"
    assert isinstance(caught.value, MemoryError)
    assert bytes(DeviceBuffer.from_host(b"still here").copy_to_host()) == b"still here"


@pytest.mark.gpu
def test_no_leak(data, stream):
    before = held("device"), held("pinned")
    for _ in range(200):
        buffer = DeviceBuffer.from_host(data, stream=stream)
        DeviceArray((data.size,), "u8", buffer).to_host()
        PinnedBuffer(100)
        Workspace(1000, device="cuda", stream=stream)
    del buffer
    stream.synchronize()
    assert (held("device"), held("pinned")) == before


@pytest.mark.gpu
def test_device_workspace(stream):
    for workspace in (
        Workspace(1000, device="cuda"),
        Workspace(1000, stream=stream),
        Workspace(buffer=DeviceBuffer(1000)),
    ):
        assert workspace.device == "cuda:0"
        assert workspace.nbytes == 1000
        assert workspace.ptr % 256 == 0
        assert inspect(workspace)["device"] == "cuda:0"


# ---- typed arrays ----------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", list(ElementKind), ids=lambda kind: kind.dtype)
def test_device_array(kind):
    if kind is ElementKind.BF16:
        pytest.importorskip("ml_dtypes")
    host = DeviceArray.empty((2, 3), kind).to_host()
    host.view(np.uint8)[...] = np.arange(host.nbytes, dtype=np.uint8).reshape(2, -1) % 2
    a = DeviceArray.from_host(host)
    assert (a.shape, a.ndim, a.dtype, a.nbytes) == ((2, 3), 2, kind, 6 * kind.itemsize)
    assert repr(a) == f"DeviceArray({kind.dtype}[2, 3] on cuda:0)"
    assert a.to_host().tobytes() == host.tobytes()
    found = inspect(a)
    assert found["element"] is kind
    assert found["strides"] == (3, 1)
    if kind is ElementKind.BF16:
        assert not hasattr(a, "__cuda_array_interface__")
    else:
        interface = a.__cuda_array_interface__
        assert np.dtype(interface["typestr"]) == host.dtype
        assert interface["shape"] == (2, 3)
        assert interface["data"] == (a.ptr, False)
        assert (interface["version"], interface["stream"]) == (3, 1)


@pytest.mark.gpu
def test_integers_of_another_library():
    buffer = DeviceBuffer(np.int64(16), device=np.int32(0)).fill(np.uint8(7))
    assert bytes(buffer.copy_to_host()) == bytes([7] * 16)
    assert DeviceArray.empty((np.int64(2), 3), "f32").shape == (2, 3)
    assert DeviceArray.empty(np.int64(2), "f32").shape == (2,)
    assert DeviceArray((2,), "f32", buffer, offset=np.int64(8)).ptr == buffer.ptr + 8
    for value in (True, 256, -1, 1.0):
        with pytest.raises(InvalidProblem, match="value: expected a byte from 0 to 255"):
            buffer.fill(value)
    for offset in (-4, True, 0.0):
        with pytest.raises(InvalidProblem, match="offset: expected a size of 0 or more"):
            DeviceArray((2,), "f32", buffer, offset=offset)


@pytest.mark.gpu
def test_device_array_over_a_part(data):
    buffer = DeviceBuffer.from_host(data)
    a = DeviceArray((10, 4), "u16", buffer, offset=6)
    np.testing.assert_array_equal(a.to_host(), data[6:86].view(np.uint16).reshape(10, 4))
    assert DeviceArray((0, 4), "f32", DeviceBuffer(0)).to_host().shape == (0, 4)
    assert DeviceArray((), "f32", buffer).to_host().shape == ()
    for shape, offset in (((data.size,), 1), ((1 << 40,), 0), ((1,), data.size)):
        with pytest.raises(InvalidProblem, match="buffer: expected"):
            DeviceArray(shape, "u8", buffer, offset=offset)
    with pytest.raises(InvalidProblem, match="at a multiple of 4"):
        DeviceArray((1,), "f32", buffer, offset=2)


# ---- export ----------------------------------------------------------------------------------


@pytest.fixture
def torch_cuda():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return torch


@pytest.mark.gpu
def test_export_to_torch(torch_cuda, data, stream):
    buffer = DeviceBuffer.from_host(data, stream=stream)
    t = torch_cuda.from_dlpack(buffer)
    assert t.data_ptr() == buffer.ptr
    assert t.dtype is torch_cuda.uint8
    np.testing.assert_array_equal(t.cpu().numpy(), data)
    a = DeviceArray.from_host(np.arange(12, dtype=np.float32).reshape(3, 4), stream=stream)
    np.testing.assert_array_equal(torch_cuda.from_dlpack(a).cpu().numpy(), a.to_host())
    b = DeviceArray((3, 4), "bf16", DeviceBuffer(24).fill(0))
    assert torch_cuda.from_dlpack(b).dtype is torch_cuda.bfloat16
    np.testing.assert_array_equal(torch_cuda.as_tensor(a, device="cuda").cpu().numpy(), a.to_host())


@pytest.mark.gpu
def test_export_to_cupy(data, stream):
    cupy = pytest.importorskip("cupy")
    buffer = DeviceBuffer.from_host(data, stream=stream)
    a = cupy.from_dlpack(buffer)
    assert a.data.ptr == buffer.ptr
    np.testing.assert_array_equal(a.get(), data)
    np.testing.assert_array_equal(cupy.asarray(buffer).get(), data)


@pytest.mark.gpu
def test_export_to_jax(data, stream):
    jax = pytest.importorskip("jax")
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        pytest.skip(f"this JAX has no CUDA: {error}")
    from jax import dlpack

    a = dlpack.from_dlpack(DeviceBuffer.from_host(data, stream=stream))
    np.testing.assert_array_equal(np.asarray(a), data)


@pytest.mark.gpu
def test_export_by_the_standard(data):
    buffer = DeviceBuffer.from_host(data)
    assert buffer.__dlpack_device__() == (2, 0)
    for stream in (None, -1, 1, 2):
        assert '"dltensor"' in repr(buffer.__dlpack__(stream=stream))
        capsule = buffer.__dlpack__(stream=stream, max_version=(1, 0))
        assert '"dltensor_versioned"' in repr(capsule)
    for stream in (0, -2, "1"):
        with pytest.raises(InvalidProblem, match="stream: expected None, -1"):
            buffer.__dlpack__(stream=stream)
    with pytest.raises(BufferError, match="by copy only"):
        buffer.__dlpack__(dl_device=(1, 0), copy=False)
    with pytest.raises(BufferError, match=r"expected \(2, 0\)"):
        buffer.__dlpack__(dl_device=(10, 0))
    buffer.__dlpack__(dl_device=(2, 0), copy=False)
    np.testing.assert_array_equal(np.from_dlpack(buffer, device="cpu"), data)


@pytest.mark.gpu
def test_exported_copies_are_apart(torch_cuda, data):
    buffer = DeviceBuffer.from_host(data)

    class Copies:
        def __dlpack__(self, **arguments):
            return buffer.__dlpack__(**(arguments | {"copy": True}))

        def __dlpack_device__(self):
            return buffer.__dlpack_device__()

    t = torch_cuda.from_dlpack(Copies())
    assert t.data_ptr() != buffer.ptr
    buffer.fill(0)
    np.testing.assert_array_equal(t.cpu().numpy(), data)
    assert inspect(Copies())["readonly"]  # what is written to a copy would be lost


@pytest.mark.gpu
def test_consumers_wait_for_our_stream(torch_cuda, stream):
    n = 1 << 28
    for value in range(5):
        buffer = DeviceBuffer(n, stream=stream)
        for other in range(20):
            buffer.fill(other + 100)
        buffer.fill(value)
        assert int(torch_cuda.from_dlpack(buffer).max()) == value


# ---- pinned memory ---------------------------------------------------------------------------


@pytest.mark.gpu
def test_pinned_buffer():
    before = held("pinned")
    with PinnedBuffer(4096) as pinned:
        assert pinned.nbytes == len(pinned) == 4096
        assert held("pinned") == before + 4096
        floats = np.frombuffer(pinned, np.float32)
        assert floats.flags.writeable
        floats[:] = 3
        assert floats.ctypes.data == pinned.ptr
        assert np.from_dlpack(pinned)[3] == np.frombuffer(pinned, np.uint8)[3]
        assert describe(pinned) == "uint8[4096] on cpu"
        assert memoryview(pinned).format == "B"
        with pytest.raises(BufferError, match="expected no users left"):
            pinned.close()
        del floats
    assert pinned.closed
    assert held("pinned") == before
    assert repr(pinned) == "PinnedBuffer(closed)"
    for use in (lambda: pinned.ptr, lambda: memoryview(pinned), lambda: inspect(pinned)):
        with pytest.raises(InvalidProblem, match="open PinnedBuffer, got one that is closed"):
            use()
    assert np.frombuffer(memoryview(PinnedBuffer(0)), np.uint8).size == 0


@pytest.mark.gpu
def test_pinned_export_by_the_standard():
    pinned = PinnedBuffer(8)
    assert pinned.__dlpack_device__() == (1, 0)
    with pytest.raises(InvalidProblem, match="None for CPU memory"):
        pinned.__dlpack__(stream=1)
    with pytest.raises(BufferError):
        pinned.__dlpack__(dl_device=(2, 0))
    np.frombuffer(pinned, np.uint8)[:] = 1
    shared, apart = np.from_dlpack(pinned), np.from_dlpack(pinned, copy=True)
    np.frombuffer(pinned, np.uint8)[:] = 5
    assert list(shared) == [5] * 8
    assert list(apart) == [1] * 8


@pytest.mark.gpu(real="an emulated one is done before a call returns")
def test_pinned_copies_overlap(stream):
    n = 256 << 20
    pinned, buffer = PinnedBuffer(n), DeviceBuffer(n, stream=stream)
    host = np.frombuffer(pinned, np.uint8)
    host[:] = 1
    for _ in range(4):
        buffer.copy_from_host(pinned)
    assert not stream.query()  # the host is ahead of the copies
    assert pending() >= 1
    stream.synchronize()
    assert pending() == 0
    buffer.fill(2)
    buffer.copy_to_host(pinned)
    assert not stream.query()
    stream.synchronize()
    assert host[0] == host[-1] == 2


@pytest.mark.gpu
def test_sources_live_until_the_copy_is_done(stream):
    n = 256 << 20
    buffer = DeviceBuffer(n, stream=stream)
    before = held("pinned")
    for value in range(3):
        pinned = PinnedBuffer(n)
        np.frombuffer(pinned, np.uint8)[:] = value + 1
        buffer.copy_from_host(pinned)
        with pytest.raises(BufferError, match="expected no users left"):
            pinned.close()
        del pinned
        assert live_bytes()["pinned"] > before
    assert set(buffer.copy_to_host()[:: n // 64]) == {3}
    assert held("pinned") == before


@pytest.mark.gpu
def test_an_array_is_made_once():
    array = DeviceArray.from_host(np.arange(6, dtype=np.float32))
    with pytest.raises(InvalidProblem, match="array: expected to be made once"):
        array.__init__((2,), "uint8", DeviceBuffer(8))
    with pytest.raises(InvalidProblem, match="array: expected to be made once"):
        array.__init__((1 << 40,), "uint8", array.buffer)
    np.testing.assert_array_equal(array.to_host(), np.arange(6, dtype=np.float32))


@pytest.mark.gpu
def test_more_pinned_memory_than_the_host_has():
    with pytest.raises(
        OutOfMemory, match=rf"allocating {1 << 62} bytes of pinned memory; the host"
    ):
        PinnedBuffer(1 << 62)
