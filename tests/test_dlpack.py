# SPDX-License-Identifier: Apache-2.0
import array
import ctypes
import mmap
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from producers import (
    CUDA,
    IS_COPIED,
    PINNED,
    READ_ONLY,
    ROCM,
    LegacyProducer,
    OldProducer,
    Producer,
    exchange_capsule,
    exchange_table,
)

from baracuda_cy import (
    LEGACY_DEFAULT_STREAM,
    ElementKind,
    GgufTensor,
    InvalidProblem,
    NotAnArray,
    OutOfMemory,
    Unsupported,
    Workspace,
    linear,
    quantize,
)
from baracuda_cy.allocation import empty_like
from baracuda_cy.dlpack import describe, inspect

NUMPY_KINDS = [kind for kind in ElementKind if kind is not ElementKind.BF16]


def agrees(found, array):
    """Pointer, shape and strides are those that NumPy gives."""
    strides = tuple(step // array.itemsize for step in array.strides)
    if array.size:
        assert found["pointer"] == array.ctypes.data
        # The stride of a dimension of one element is nobody's business.
        for size, ours, theirs in zip(array.shape, found["strides"], strides, strict=True):
            assert size == 1 or ours == theirs
    assert found["shape"] == array.shape


# ---- NumPy and the buffer protocol -----------------------------------------------------------


@pytest.mark.parametrize("kind", NUMPY_KINDS, ids=lambda kind: kind.dtype)
def test_numpy_types(kind):
    a = np.zeros((2, 3), kind.dtype)
    found = inspect(a)
    assert found["element"] is kind
    assert found["protocol"] == "buffer protocol"
    assert describe(a) == f"{kind.dtype}[2, 3] on cpu"
    agrees(found, a)


@pytest.mark.parametrize("name", ["l", "q"])
def test_both_c_names_of_int64(name):
    assert inspect(np.zeros(2, name))["element"] is ElementKind.I64


@pytest.mark.parametrize(
    "dtype", [">f4", ">i2", "complex64", np.longdouble, "S3", "M8[s]", [("a", "i4")]], ids=str
)
def test_numpy_types_that_are_none_of_ours(dtype):
    a = np.zeros((2, 3), dtype)[:, ::2]
    found = inspect(a)
    assert found["element"] is None
    agrees(found, a)
    assert describe(a).endswith("[2, 2] on cpu")


def test_big_endian_bytes_have_no_order():
    assert inspect(np.zeros(3, ">u1"))["element"] is ElementKind.U8


def test_bfloat16_of_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    a = np.arange(24, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(4, 6)[1:, ::-2]
    a.flags.writeable = False
    found = inspect(a)
    assert found["element"] is ElementKind.BF16
    assert found["readonly"]
    agrees(found, a)
    assert inspect(np.zeros(2, ml_dtypes.float8_e4m3fn))["element"] is None
    assert inspect(a.astype(a.dtype.newbyteorder()))["element"] is None


@st.composite
def views(draw):
    """Any view of a small array: sliced either way, transposed, offset, read-only, empty."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    dtype = draw(st.sampled_from([kind.dtype for kind in NUMPY_KINDS]))
    raw = np.zeros(int(np.prod(shape)) * np.dtype(dtype).itemsize + 8, np.uint8)
    start = draw(st.integers(0, 8))
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    a = raw[start : start + size].view(dtype).reshape(shape)
    index = []
    for length in shape:
        step = draw(st.sampled_from([1, 2, 3, -1, -2]))
        stop = draw(st.integers(0, length))
        index.append(slice(None, None if step < 0 else stop, step))
    a = a[(*index, ...)]
    a = a.transpose(draw(st.permutations(range(a.ndim))))
    if draw(st.booleans()):
        a = np.broadcast_to(a, (2, *a.shape))
    elif draw(st.booleans()):
        a.flags.writeable = False
    return a


@given(views())
def test_views_of_numpy(a):
    found = inspect(a)
    agrees(found, a)
    assert found["readonly"] == (not a.flags.writeable)
    assert found["element"].dtype == a.dtype.name
    assert found["device"] == "cpu"
    assert not found["foreign_order"]


@given(views(), st.booleans(), st.booleans(), st.integers(0, 64))
def test_views_through_dlpack(a, versioned, readonly, offset):
    kind = Producer if versioned else LegacyProducer
    producer = kind(
        a,
        flags=READ_ONLY if readonly else 0,
        data=a.ctypes.data - offset,
        byte_offset=offset,
    )
    found = inspect(producer)
    agrees(found, a)
    assert found["readonly"] == (versioned and readonly)
    assert producer.exported == producer.deleted == 1


def test_buffers(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        found = inspect(mapped)
        assert found["shape"] == (256,)
        assert found["element"] is ElementKind.U8
        assert found["readonly"]
    assert inspect(b"abc")["readonly"]
    assert not inspect(bytearray(3))["readonly"]
    assert inspect(memoryview(bytearray(12))[::3])["strides"] == (3,)
    assert describe(memoryview(bytearray(16)).cast("f", (2, 2))) == "float32[2, 2] on cpu"
    assert describe(array.array("d", [1, 2])) == "float64[2] on cpu"
    assert describe((ctypes.c_int32 * 5)()) == "int32[5] on cpu"
    assert describe(np.float16(1)) == "float16[] on cpu"


def test_a_buffer_in_use_is_released():
    data = bytearray(8)
    inspect(data)
    data.extend(b"more")  # a BufferError while somebody holds the buffer


@pytest.mark.parametrize("value", [None, 3, "text", [1.0], ..., int, {}, np.dtype("f4")], ids=repr)
def test_what_is_no_array(value):
    with pytest.raises(NotAnArray, match=r"array: expected an array .* got .*; convert it"):
        inspect(value)
    assert describe(value) == type(value).__name__


def test_what_is_no_array_of_its_framework():
    w = quantize(np.eye(32, dtype=np.float32), "Q8_0")
    values = [np.random.default_rng(), pytest.importorskip("ml_dtypes").bfloat16(1)]
    if torch := sys.modules.get("torch"):
        values += [torch.float32, torch.Size([3]), torch.nn.Linear(1, 1), torch.UntypedStorage(4)]
    plan, y = w.plan(m=1), np.empty((1, 32), np.float32)
    for value in values:
        with pytest.raises(NotAnArray, match=r"^x: expected an array"):
            linear(value, w)
        assert not plan.can_implement(w, value, y)
        assert not plan.can_implement(w, y, y, bias=value)
    with pytest.raises(InvalidProblem, match=r'^device: expected "cpu"'):
        w.to(np.dtype("f4"))


def test_masks_are_refused():
    with pytest.raises(InvalidProblem, match=r"without a mask.*filled"):
        inspect(np.ma.masked_array([1.0, 2.0], [False, True]))


def test_too_many_dimensions():
    assert inspect(np.zeros((1,) * 8))["shape"] == (1,) * 8
    with pytest.raises(InvalidProblem, match="0 to 8 dimensions, got 9"):
        inspect(np.zeros((1,) * 9))


def test_strides_between_elements_are_refused():
    packed = np.zeros(4, [("a", "i1"), ("b", "f4")])
    with pytest.raises(InvalidProblem, match="multiples of the element's 4 bytes, got"):
        inspect(packed["b"])
    assert inspect(packed["b"][:1])["shape"] == (1,)
    with pytest.raises(InvalidProblem, match="multiples of the element's 8 bytes, got"):
        inspect(np.zeros(4, [("a", "i1"), ("b", "M8[s]")])["b"])


# ---- DLPack ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Producer, LegacyProducer, OldProducer])
def test_capsules(kind):
    a = np.arange(12, dtype=np.int32).reshape(3, 4)
    producer = kind(a)
    for _ in range(3):
        found = inspect(producer)
        agrees(found, a)
        assert found["element"] is ElementKind.I32
    assert producer.deleted == producer.exported == 3
    # What an old producer does not know is not asked for twice.
    assert len(producer.calls) == 3
    assert all(call["stream"] is None for call in producer.calls)
    expected = "__dlpack__" if kind is Producer else "__dlpack__ (unversioned)"
    assert found["protocol"] == expected


@pytest.mark.parametrize("kind", [Producer, LegacyProducer])
def test_missing_strides_mean_compact(kind):
    a = np.zeros((2, 3, 4), np.float32)
    assert inspect(kind(a, strides=False))["strides"] == (12, 4, 1)
    assert inspect(kind(np.zeros(()), strides=False))["strides"] == ()


def test_a_missing_deleter_is_not_called():
    producer = Producer(np.zeros(3), deleter=False)
    assert inspect(producer)["shape"] == (3,)
    assert producer.exported == 1


def test_flags():
    a = np.zeros(3)
    assert not inspect(Producer(a))["readonly"]
    assert inspect(Producer(a, flags=READ_ONLY))["readonly"]
    # What is written to a copy would be lost.
    assert inspect(Producer(a, flags=IS_COPIED))["readonly"]


def test_size_zero_may_have_no_memory():
    found = inspect(Producer(np.zeros((0, 4)), data=None))
    assert found["shape"] == (0, 4)
    assert found["pointer"] == 0
    with pytest.raises(InvalidProblem, match="null pointer"):
        inspect(Producer(np.zeros((1, 4)), data=None))


def test_of_another_major_version_only_the_deleter_is_touched():
    # Reading these pointers would end the process.
    producer = Producer(np.zeros(3), version=(2, 0), shape=8, strides=8, data=8, ndim=4)
    with pytest.raises(Unsupported, match=r"DLPack 1\.x, got one of 2\.0"):
        inspect(producer)
    assert producer.exported == producer.deleted == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ndim": 9, "shape": 8}, "0 to 8 dimensions, got 9"),
        ({"ndim": -1}, "0 to 8 dimensions, got -1"),
        ({"ndim": 1, "shape": None}, "expected a shape, got none"),
        ({"device_type": ROCM}, "CPU or CUDA memory, got one on DLPack device type 10"),
    ],
)
def test_tensors_that_cannot_be_read(fields, message):
    producer = Producer(np.zeros(3), **fields)
    with pytest.raises(InvalidProblem, match=message):
        inspect(producer)
    assert producer.exported == producer.deleted == 1


@pytest.mark.parametrize(
    ("shape", "message"),
    [((-1,), "sizes of 0 or more"), ((1 << 62, 4), r"fewer than 2\*\*63 elements")],
)
def test_shapes_that_cannot_be(shape, message):
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    producer = Producer(np.zeros((1,) * len(shape)), shape=ctypes.addressof(sizes), ndim=len(shape))
    with pytest.raises(InvalidProblem, match=message):
        inspect(producer)
    assert producer.deleted == 1


def test_types_that_are_none_of_ours():
    a = np.zeros(4)
    assert inspect(Producer(a, lanes=2))["element"] is None
    assert inspect(Producer(a, code=5))["element"] is None
    assert inspect(Producer(a, code=10, bits=8))["element"] is None
    assert inspect(Producer(a.view("u1"), code=17, bits=4))["element"] is None


def test_pinned_memory_is_host_memory():
    found = inspect(Producer(np.zeros(4), device_type=PINNED))
    assert found["device"] == "cpu"


def test_a_cuda_producer_is_told_that_nothing_follows():
    producer = Producer(np.zeros(4), device_type=CUDA, device_id=3)
    assert inspect(producer)["device"] == "cuda:3"
    assert producer.calls == [{"stream": -1, "max_version": (1, 1)}]


def test_a_capsule_is_taken_once():
    class Twice(Producer):
        def __dlpack__(self, **arguments):
            self.capsule = getattr(self, "capsule", None) or super().__dlpack__(**arguments)
            return self.capsule

    producer = Twice(np.zeros(3))
    inspect(producer)
    with pytest.raises(InvalidProblem, match="unused DLPack capsule"):
        inspect(producer)
    assert producer.deleted == 1


@pytest.mark.parametrize("error", [TypeError("no"), BufferError("no"), RuntimeError("no\ntrace")])
def test_a_producer_that_refuses(error):
    class Refuses(Producer):
        def __dlpack__(self, **_):
            self.calls.append(1)
            raise error

    producer = Refuses(np.zeros(3))
    with pytest.raises(InvalidProblem, match=f"{type(error).__name__}: no; pass a dense") as caught:
        inspect(producer)
    assert caught.value.__cause__ is error
    assert producer.calls == [1]


def test_what_is_no_capsule():
    class Wrong(Producer):
        def __dlpack__(self, **_):
            return 7

    with pytest.raises(InvalidProblem, match="unused DLPack capsule, got 7"):
        inspect(Wrong(np.zeros(3)))


def test_protocols_of_one_object():
    class Plain:
        pass

    producer = Producer(np.arange(3))
    plain = Plain()
    with pytest.raises(NotAnArray):
        inspect(plain)
    plain.__dlpack__ = producer.__dlpack__
    plain.__dlpack_device__ = producer.__dlpack_device__
    assert inspect(plain)["shape"] == (3,)


# ---- exchange tables -------------------------------------------------------------------------

FIRST = exchange_table()
MANAGED_ONLY = exchange_table(borrowed=False)
NEXT = exchange_table(version=(2, 0), previous=FIRST)
UNKNOWN = exchange_table(version=(2, 0))


@pytest.mark.parametrize(
    ("table", "calls"),
    [(FIRST, ["borrowed"]), (MANAGED_ONLY, ["managed"]), (NEXT, ["borrowed"])],
    ids=["borrowed", "managed", "previous"],
)
def test_exchange_table(table, calls):
    class Offers(Producer):
        __dlpack_c_exchange_api__ = exchange_capsule(table)

    a = np.arange(6, dtype=np.uint16).reshape(2, 3).T
    producer = Offers(a)
    found = inspect(producer)
    agrees(found, a)
    assert found["element"] is ElementKind.U16
    assert found["protocol"] == "__dlpack_c_exchange_api__"
    assert producer.calls == calls
    assert producer.exported == producer.deleted


def test_exchange_table_as_an_integer():
    class Offers(Producer):
        __c_dlpack_exchange_api__ = ctypes.addressof(FIRST)

    producer = Offers(np.zeros(3))
    inspect(producer)
    assert producer.calls == ["borrowed"]


def test_exchange_table_that_is_too_new():
    class Offers(Producer):
        __dlpack_c_exchange_api__ = exchange_capsule(UNKNOWN)

    assert inspect(Offers(np.zeros(3)))["protocol"] == "__dlpack__"


def test_exchange_table_of_an_instance_does_not_count():
    producer = Producer(np.zeros(3))
    producer.__dlpack_c_exchange_api__ = exchange_capsule(FIRST)
    assert inspect(producer)["protocol"] == "__dlpack__"


def test_more_types_than_are_remembered():
    a = np.arange(4)
    for i in range(1000):
        kind = type(f"Producer{i}", (Producer,), {})
        assert inspect(kind(a))["shape"] == (4,)
    assert inspect(a)["shape"] == (4,)


# ---- __cuda_array_interface__ ----------------------------------------------------------------


class Interface:
    def __init__(self, **fields):
        self.__cuda_array_interface__ = {
            "shape": (2, 3),
            "typestr": "<f4",
            "data": (0x1000, False),
            "version": 3,
        } | fields


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"mask": 1}, InvalidProblem, "without a mask"),
        ({"stream": 0}, InvalidProblem, "got 0"),
        ({"stream": -3}, InvalidProblem, "got -3"),
        ({"version": 4}, Unsupported, "version 3 or less, got 4"),
        ({"data": (0, False)}, InvalidProblem, "null pointer"),
        ({"data": None}, InvalidProblem, "cannot be read"),
        ({"data": ("a", False)}, InvalidProblem, "cannot be read"),
        ({"data": (1 << 64, False)}, InvalidProblem, "cannot be read: .* beyond 64 bits"),
        ({"shape": "ab"}, InvalidProblem, "cannot be read"),
        ({"typestr": b"<f4"}, InvalidProblem, "cannot be read: TypeError"),
        ({"stream": 1 << 64}, InvalidProblem, "to be None, 1, 2 or a handle"),
        ({"shape": (1 << 63,)}, InvalidProblem, "cannot be read: .* beyond 64 bits"),
        ({"strides": (1 << 70, 4)}, InvalidProblem, "cannot be read: .* beyond 64 bits"),
        ({"strides": (4,)}, InvalidProblem, "one stride per dimension"),
        ({"strides": (13, 4)}, InvalidProblem, "multiples of the element's 4 bytes"),
        ({"shape": (-1, 2)}, InvalidProblem, "sizes of 0 or more"),
        ({"shape": (1,) * 9}, InvalidProblem, "0 to 8 dimensions"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_interfaces_that_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        inspect(Interface(**fields))


@pytest.mark.gpu
def test_interface_of_a_pointer_that_is_none_of_cuda():
    host = np.zeros(6, np.float32)
    with pytest.raises(InvalidProblem, match="which CUDA does not know"):
        inspect(Interface(data=(host.ctypes.data, False)))


@pytest.mark.gpu
@pytest.mark.parametrize("version", [0, 2, 3])
def test_interface(version):
    from baracuda_cy import DeviceArray

    a = DeviceArray.from_host(np.arange(12, dtype=np.float32).reshape(3, 4))
    fields = {"shape": (3, 2), "data": (a.ptr + 4, True), "strides": (16, 8), "version": version}
    array = Interface(**fields)
    found = inspect(array)
    assert found["pointer"] == a.ptr + 4
    assert found["strides"] == (4, 2)
    assert found["element"] is ElementKind.F32
    assert found["device"] == "cuda:0"
    assert found["readonly"]
    assert found["protocol"] == "__cuda_array_interface__"
    assert inspect(Interface(data=(0, False), shape=(0, 3)))["shape"] == (0, 3)


# ---- frameworks on the CPU -------------------------------------------------------------------

TORCH_KINDS = ["float32", "float16", "bfloat16", "float64", "uint8", "int8", "int16", "int32"]
TORCH_KINDS += ["int64", "bool"]


@pytest.mark.parametrize("dtype", TORCH_KINDS)
def test_torch(dtype):
    torch = pytest.importorskip("torch")
    t = torch.zeros(4, 6, dtype=getattr(torch, dtype))[1:, ::2].t()
    found = inspect(t)
    assert found["pointer"] == t.data_ptr()
    assert found["shape"] == tuple(t.shape)
    assert found["strides"] == t.stride()
    assert found["element"] is ElementKind.of(dtype)
    assert not found["readonly"]
    assert describe(t) == f"{dtype}[3, 3] on cpu"


def test_torch_corner_cases():
    torch = pytest.importorskip("torch")
    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        assert inspect(torch.zeros(2))["protocol"] == "__dlpack_c_exchange_api__"
    assert inspect(torch.tensor(3.0))["shape"] == ()
    assert inspect(torch.zeros(0, 4))["shape"] == (0, 4)
    assert inspect(torch.nn.Parameter(torch.zeros(2)))["shape"] == (2,)
    assert inspect(torch.zeros(2, dtype=torch.complex64))["element"] is None
    with pytest.raises(InvalidProblem, match="0 to 8 dimensions, got 9"):
        inspect(torch.zeros((1,) * 9))


def test_torch_tensors_without_memory():
    torch = pytest.importorskip("torch")
    w = quantize(np.eye(32, dtype=np.float32), "Q8_0")
    for t in (torch.zeros(3, device="meta"), torch.eye(3).to_sparse()):
        with pytest.raises(InvalidProblem, match=r"which refused: \w+: .*; pass a dense") as caught:
            inspect(t)
        assert "\n" not in str(caught.value)
        with pytest.raises(InvalidProblem, match=r"^x: .* which refused"):
            linear(t, w)


class Nowhere:
    """An array that cannot say where it is."""

    def __dlpack__(self, **_):
        raise RuntimeError("deleted")

    def __dlpack_device__(self):
        raise RuntimeError("deleted")


def test_an_array_that_refuses_to_say_where_it_is():
    w = quantize(np.eye(32, dtype=np.float32), "Q8_0")
    with pytest.raises(InvalidProblem, match=r"^x: .* refused: RuntimeError: deleted; pass"):
        linear(Nowhere(), w)


class Elsewhere:
    """An array on a device of another kind."""

    def __init__(self, device_type):
        self.device_type = device_type

    def __dlpack__(self, **_):
        raise AssertionError("asked for its memory")

    def __dlpack_device__(self):
        return self.device_type, 0


@pytest.mark.parametrize("device_type", [ROCM, 7, 8, 14])
def test_arrays_on_other_devices(device_type):
    array = Elsewhere(device_type)
    w = quantize(np.eye(32, dtype=np.float32), "Q8_0")
    for use, name in (
        (lambda: linear(array, w), "x"),
        (lambda: w.to(array), "device"),
        (lambda: w.plan().select(array, w.plan().descriptor), "device"),
        (lambda: quantize(array, "nf4"), "array"),
    ):
        with pytest.raises(
            InvalidProblem, match=f"^{name}: .* on DLPack device type {device_type}"
        ):
            use()
    with pytest.raises(InvalidProblem, match=f"device: .*DLPack device type {device_type}; name"):
        Workspace(4, device=array)


JAX_KINDS = ["float32", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "bool"]


@pytest.mark.parametrize("dtype", JAX_KINDS)
def test_jax(dtype):
    jax = pytest.importorskip("jax")
    a = jax.device_put(jax.numpy.zeros((3, 4), dtype), jax.devices("cpu")[0])
    found = inspect(a)
    assert found["pointer"] == a.unsafe_buffer_pointer()
    assert found["shape"] == (3, 4)
    assert found["strides"] == (4, 1)
    assert found["element"] is ElementKind.of(dtype)
    assert found["readonly"]  # JAX arrays never change


def test_jax_tracers_have_no_memory():
    jax = pytest.importorskip("jax")
    with pytest.raises(NotAnArray, match=r"which jax traces; call this outside of jax\.jit"):
        jax.jit(lambda a: inspect(a))(jax.numpy.zeros(3))


# ---- arrays out ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 4)], ids=str)
def test_empty_like_numpy(dtype, shape):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    result = empty_like(np.zeros(3), shape, dtype)
    assert isinstance(result, np.ndarray)
    assert (result.shape, result.dtype.name) == (shape, dtype)


@pytest.mark.parametrize(
    "source", [b"abc", bytearray(3), memoryview(b"abc")], ids=lambda source: type(source).__name__
)
def test_empty_like_buffers(source):
    assert isinstance(empty_like(source, (2, 2)), np.ndarray)


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((1.9, 2.9), "a tuple of integers"),
        ((True, 2), "a tuple of integers"),
        (3, "a tuple of integers"),
        ("12", "a tuple of integers"),
        ((2, -1), "sizes of 0 or more"),
        ((0, 2**62), r"an array of fewer than 2\*\*63 bytes"),
    ],
    ids=str,
)
def test_empty_like_of_no_shape(shape, match):
    with pytest.raises(InvalidProblem, match=f"^shape: expected {match}, got "):
        empty_like(np.zeros(3, np.float32), shape)
    assert empty_like(np.zeros(3), (np.int64(2), 3)).shape == (2, 3)


def test_empty_like_on_the_cpu_takes_no_stream():
    with pytest.raises(InvalidProblem, match="stream: expected None on the CPU, got Stream; leave"):
        empty_like(np.zeros(3), (3,), stream=LEGACY_DEFAULT_STREAM)


def test_empty_like_without_ml_dtypes(monkeypatch):
    class Absent:
        @staticmethod
        def find_spec(name, *_):
            if name == "ml_dtypes":
                raise ImportError(name)

    monkeypatch.delitem(sys.modules, "ml_dtypes", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    with pytest.raises(Unsupported, match="NumPy has no bfloat16; install ml_dtypes"):
        empty_like(np.zeros(3), (3,), "bf16")


def test_empty_like_of_an_unknown_type():
    with pytest.raises(InvalidProblem, match="dtype: expected one to be named"):
        empty_like(np.zeros(3, "complex64"), (3,))
    assert empty_like(np.zeros(3, "complex64"), (3,), "u8").dtype == np.uint8


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_empty_like_torch(dtype):
    torch = pytest.importorskip("torch")
    result = empty_like(torch.zeros(3), (2, 5), dtype)
    assert type(result) is torch.Tensor
    assert result.dtype is getattr(torch, dtype)
    assert tuple(result.shape) == (2, 5)
    assert result.is_contiguous()
    result.fill_(1)
    assert float(result.sum()) == 10


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_empty_like_jax(dtype):
    jax = pytest.importorskip("jax")
    cpu = jax.devices("cpu")[0]
    result = empty_like(jax.device_put(jax.numpy.zeros(3), cpu), (2, 5), dtype)
    assert isinstance(result, jax.Array)
    assert (result.shape, result.dtype.name) == ((2, 5), dtype)
    assert result.devices() == {cpu}


# ---- frameworks on the GPU -------------------------------------------------------------------


@pytest.fixture
def torch_cuda():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return torch


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy")


@pytest.fixture
def jax_cuda():
    jax = pytest.importorskip("jax")
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        pytest.skip(f"this JAX has no CUDA: {error}")
    return jax


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TORCH_KINDS)
def test_torch_on_the_gpu(torch_cuda, dtype):
    t = torch_cuda.zeros(4, 6, dtype=getattr(torch_cuda, dtype), device="cuda")[1:, ::2].t()
    found = inspect(t)
    assert found["pointer"] == t.data_ptr()
    assert found["strides"] == t.stride()
    assert found["element"] is ElementKind.of(dtype)
    assert found["device"] == "cuda:0"


@pytest.mark.gpu
def test_order_of_torch(torch_cuda):
    from baracuda_cy import LEGACY_DEFAULT_STREAM, Stream

    t = torch_cuda.zeros(4, device="cuda")
    assert not inspect(t, LEGACY_DEFAULT_STREAM)["foreign_order"]
    with Stream() as ours:
        assert inspect(t, ours)["foreign_order"]
    theirs = torch_cuda.cuda.Stream()
    assert inspect(t, theirs)["foreign_order"]
    with torch_cuda.cuda.stream(theirs):
        assert not inspect(t, theirs)["foreign_order"]
        assert inspect(t, LEGACY_DEFAULT_STREAM)["foreign_order"]


@pytest.mark.gpu
def test_work_on_our_stream_waits_for_torch(torch_cuda):
    from baracuda_cy import DeviceBuffer, Stream

    n = 1 << 20
    with Stream() as ours, DeviceBuffer(n, stream=ours) as copy:
        for value in range(8):
            t = torch_cuda.full((n,), 255, dtype=torch_cuda.uint8, device="cuda")
            torch_cuda.cuda._sleep(20_000_000)  # the value is written long after it was asked for
            t.fill_(value)
            inspect(t, ours)  # orders our stream after torch's
            with torch_cuda.cuda.stream(torch_cuda.cuda.ExternalStream(ours.handle)):
                torch_cuda.from_dlpack(copy).copy_(t)
            assert set(copy.copy_to_host()) == {value}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8", "int32", "bool"])
def test_cupy(cupy, dtype):
    a = cupy.zeros((4, 6), dtype)[1:, ::2].T
    found = inspect(a)
    assert found["pointer"] == a.data.ptr
    assert found["strides"] == tuple(step // a.itemsize for step in a.strides)
    assert found["element"] is ElementKind.of(dtype)
    assert found["device"] == f"cuda:{a.device.id}"


@pytest.mark.gpu
def test_order_of_cupy(cupy):
    from baracuda_cy import LEGACY_DEFAULT_STREAM

    a = cupy.zeros(4)
    assert not inspect(a, LEGACY_DEFAULT_STREAM)["foreign_order"]
    stream = cupy.cuda.Stream(non_blocking=True)
    assert inspect(a, stream)["foreign_order"]
    with stream:
        assert not inspect(a, stream)["foreign_order"]
    stream.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint8"])
def test_jax_on_the_gpu(jax_cuda, dtype):
    from baracuda_cy import LEGACY_DEFAULT_STREAM

    a = jax_cuda.device_put(jax_cuda.numpy.zeros((3, 4), dtype), jax_cuda.devices("cuda")[0])
    found = inspect(a, LEGACY_DEFAULT_STREAM)
    assert found["pointer"] == a.unsafe_buffer_pointer()
    assert found["element"] is ElementKind.of(dtype)
    assert found["device"] == "cuda:0"
    assert found["readonly"]
    assert found["foreign_order"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_empty_like_on_the_gpu(torch_cuda, cupy, jax_cuda, dtype):
    from baracuda_cy import DeviceArray

    result = empty_like(torch_cuda.zeros(3, device="cuda"), (2, 5), dtype)
    assert result.device.type == "cuda"
    assert result.dtype is getattr(torch_cuda, dtype)
    result = empty_like(cupy.zeros(3), (2, 5), dtype)
    assert isinstance(result, cupy.ndarray)
    assert result.dtype.name == dtype
    prototype = jax_cuda.device_put(jax_cuda.numpy.zeros(3), jax_cuda.devices("cuda")[0])
    result = empty_like(prototype, (2, 5), dtype)
    assert isinstance(result, jax_cuda.Array)
    assert (result.shape, result.dtype.name) == ((2, 5), dtype)
    assert result.devices() == prototype.devices()
    result = empty_like(DeviceArray.empty((3,), "f32"), (2, 5), dtype)
    assert isinstance(result, DeviceArray)
    assert describe(result) == f"{dtype}[2, 5] on cuda:0"


# ---- code of others that runs between two arguments ----------------------------------------------


class Shared:
    """A NumPy array whose library does something else first."""

    def __init__(self, array, first):
        self.array, self.first = array, first

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **arguments):
        self.first()
        return self.array.__dlpack__(**arguments)


@pytest.mark.parametrize("name", ["Q8_0", "nf4"])
@pytest.mark.parametrize("argument", ["out", "bias", "torch's bias"])
@pytest.mark.parametrize("way", ["linear", "plan"])
def test_memory_taken_between_two_arguments_is_not_read(way, argument, name):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    w = quantize(np.eye(64, dtype=np.float32), name)
    x, out, bias = torch.ones(8, 64), np.empty((8, 64), np.float32), np.zeros(64, np.float32)

    def take():
        x.set_(torch.empty(0))

    class Hooked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            take()
            return super().__torch_function__(function, types, args, kwargs or {})

    if argument == "out":
        out = Shared(out, take)
    elif argument == "bias":
        bias = Shared(bias, take)
    else:
        bias = torch.zeros(64).as_subclass(Hooked)
    plan = w.plan(8, bias=True)
    scratch = Workspace(plan.workspace_size)
    call = {
        "linear": lambda: linear(x, w, bias, out=out),
        "plan": lambda: plan.run(w, x, out, bias=bias, workspace=scratch),
    }[way]
    with pytest.raises(InvalidProblem, match=r"expected shape \[8, 64\], got float32\[0\] on cpu"):
        call()


def test_an_array_that_changes_its_class_between_two_arguments_is_read_as_what_it_is():
    torch = pytest.importorskip("torch", reason="torch is not installed")

    class Plain(torch.Tensor):
        __dlpack_c_exchange_api__ = None

    w = quantize(np.eye(64, dtype=np.float32), "Q8_0")
    x, out = torch.ones(8, 64), np.empty((8, 64), np.float32)
    linear(x, w, out=Shared(out, lambda: setattr(x, "__class__", Plain)))
    assert type(x) is Plain
    np.testing.assert_array_equal(out, linear(np.ones((8, 64), np.float32), w))


def test_an_output_taken_before_a_weight_is_unpacked_is_not_written():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    out = torch.empty(64, 64)
    codes = quantize(np.eye(64, dtype=np.float32), "Q8_0").data
    w = GgufTensor(Shared(codes, lambda: None), "Q8_0", (64, 64))
    w.data.first = lambda: out.set_(torch.empty(0))
    with pytest.raises(InvalidProblem, match=r"^out: expected shape \[64, 64\], got float32\[0\]"):
        w.dequantize(out=out)


# ---- tensors of torch that are more than their memory --------------------------------------------


# torch compiles what it needs by means that it has deprecated itself.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_is_refused():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    forward_ad = torch.autograd.forward_ad
    w = quantize(np.eye(64, dtype=np.float32), "Q8_0")
    x, row, y = torch.ones(2, 64), torch.ones(64), torch.empty(2, 64)
    square = torch.ones(64, 64)
    plan = w.plan(2)
    scratch = Workspace(plan.workspace_size)
    with forward_ad.dual_level():
        dual, dual_row = forward_ad.make_dual(x, x), forward_ad.make_dual(row, row)
        for use, name in (
            (lambda: linear(dual, w), "x"),
            (lambda: linear(x, w, dual_row), "bias"),
            (lambda: linear(x, w, out=forward_ad.make_dual(y, y)), "out"),
            (lambda: plan.run(w, dual, y, workspace=scratch), "activations"),
            (lambda: w.dequantize(out=forward_ad.make_dual(square, square)), "out"),
            (lambda: quantize(dual, "nf4"), "array"),
        ):
            with pytest.raises(InvalidProblem, match=f"^{name}: expected a tensor without a tan"):
                use()
        assert torch.equal(linear(x, w), linear(forward_ad.unpack_dual(dual).primal, w))
    assert linear(x, w).shape == (2, 64)


def test_a_layer_of_torch_may_be_an_array():
    torch = pytest.importorskip("torch", reason="torch is not installed")

    class Layer(torch.nn.Module):
        def __dlpack_device__(self):
            return 1, 0

        def __dlpack__(self, **arguments):
            return np.ones((2, 64), np.float32).__dlpack__(**arguments)

    w = quantize(np.eye(64, dtype=np.float32), "Q8_0")
    np.testing.assert_array_equal(linear(Layer(), w), linear(np.ones((2, 64), np.float32), w))


def test_memory_that_torch_has_not_is_said_in_one_line():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    with pytest.raises(OutOfMemory, match=r"output: .*memory") as caught:
        empty_like(torch.zeros(1), (1 << 60,), "uint8")
    assert "\n" not in str(caught.value)
