# SPDX-License-Identifier: Apache-2.0
# cython: auto_pickle=False
"""Memory: on the device, in the order of a stream; pinned on the host; and scratch for plans."""

cimport cython
from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBUF_STRIDES
from cpython.ref cimport Py_INCREF
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset
from posix.stdlib cimport posix_memalign
from posix.unistd cimport getpid

cimport baracuda_cy._cuda as _cuda
from baracuda_cy._dlpack cimport DLPACK_FLAG_IS_COPIED, kDLCPU, kDLCUDA, kDLCUDAHost
from baracuda_cy._native cimport BCY_ERROR_OUT_OF_MEMORY
from baracuda_cy.allocation cimport exporting_to_jax
from baracuda_cy.dlpack cimport (
    acquire_view,
    check_sign,
    current_stream,
    describe,
    hold_view,
    register_type,
)
from baracuda_cy.elements cimport BF16, BOOL, U8, element_bytes, element_of, numpy_dtype
from baracuda_cy.export cimport make_capsule
from baracuda_cy.pending cimport hold_until_done
from baracuda_cy.stream cimport (
    StreamHandle,
    cuda_ordinal,
    handle_of,
    order_after,
    order_quietly,
    same_stream,
)
from baracuda_cy.view cimport KEEP_OBJECT, MAX_NDIM, ArrayView, release_view

import sys

from baracuda_cy.arguments import as_index, as_shape
from baracuda_cy.errors import InvalidProblem, ReadOnlyArray
from baracuda_cy.formats import ElementKind
from baracuda_cy.stream import as_stream

__all__ = ["DeviceArray", "DeviceBuffer", "PinnedBuffer", "Workspace", "live_bytes"]

cdef enum:
    ALIGNMENT = 256

cdef char* BYTES_FORMAT = b"B"
cdef int64_t live_device = 0
cdef int64_t live_pinned = 0


def live_bytes():
    """Bytes that this package's buffers hold at present.

    Returns
    -------
    dict
        ``{"device": int, "pinned": int}``.

    Examples
    --------
    >>> from baracuda_cy.memory import live_bytes
    >>> sorted(live_bytes())
    ['device', 'pinned']
    """
    return {"device": live_device, "pinned": live_pinned}


cdef int64_t size_of(object value, str argument) except -1:
    size = as_index(value)
    if size is None or not 0 <= size < 1 << 63:
        raise InvalidProblem(
            f"{argument}: expected a size of 0 or more, got {value!r}; pass a number of bytes"
        )
    return size


# ---- owners --------------------------------------------------------------------------------------


@cython.final
@cython.no_gc_clear
cdef class DeviceMemory:
    def __dealloc__(self):
        global live_device
        cdef int i
        if self.raw == NULL or self.pid != getpid():
            return
        live_device -= self.size
        for i in range(self.consumer_count):
            order_quietly(self.order.raw, self.consumers[i], self.device)
        # Without the GIL: the driver may wait for a lock whose holder waits for the GIL.
        with nogil:
            _cuda.free_device(self.device, self.raw, self.order.raw)

    cdef int add_consumer(self, void* stream) except -1:
        cdef int i
        if same_stream(stream, self.order.raw):
            return 0
        for i in range(self.consumer_count):
            if same_stream(stream, self.consumers[i]):
                return 0
        if self.consumer_count == CONSUMERS:
            order_after(self.order.raw, self.consumers[0], self.device)
            self.consumer_count -= 1
            self.consumers[0] = self.consumers[self.consumer_count]
        self.consumers[self.consumer_count] = stream
        self.consumer_count += 1
        return 0


cdef DeviceMemory allocate_device(int64_t nbytes, int device, StreamHandle order):
    global live_device
    cdef DeviceMemory memory = DeviceMemory.__new__(DeviceMemory)
    cdef void* raw = NULL
    memory.order = order
    memory.device = device
    memory.pid = getpid()
    with nogil:
        _cuda.malloc_device(device, nbytes, order.raw, &raw)
    memory.raw = raw
    memory.size = nbytes
    if raw != NULL:
        live_device += nbytes
    return memory


@cython.final
cdef class HostMemory:
    def __dealloc__(self):
        free(self.raw)


cdef HostMemory allocate_host(int64_t nbytes):
    cdef HostMemory memory = HostMemory.__new__(HostMemory)
    if posix_memalign(&memory.raw, ALIGNMENT, nbytes if nbytes else 1):
        memory.raw = NULL
        _cuda.check(BCY_ERROR_OUT_OF_MEMORY, f"allocating {nbytes} bytes")
    memory.size = nbytes
    return memory


@cython.final
cdef class LentMemory:
    def __dealloc__(self):
        release_view(&self.view)


# ---- what views share ----------------------------------------------------------------------------


cdef int64_t span_of(ArrayView* view, str name, object array) except -1:
    """Bytes of a contiguous array; any other is refused."""
    cdef int64_t count = 1
    cdef int i
    cdef bint dense = True
    for i in range(view.ndim - 1, -1, -1):
        dense = dense and (view.shape[i] <= 1 or view.strides[i] == count)
        count *= view.shape[i]
    if not view.element:
        raise InvalidProblem(
            f"{name}: expected a numeric type, got {describe(array)}; view it as uint8"
        )
    if count and not dense:
        raise InvalidProblem(
            f"{name}: expected a C-contiguous array, got strides "
            f"{tuple([view.strides[i] for i in range(view.ndim)])} in {describe(array)}; copy it, "
            "as in .contiguous() or .copy()"
        )
    return count * element_bytes(view.element)


cdef int acquire_host(object array, ArrayView* view, str name, bint writable) except -1:
    check_sign(array, name)
    hold_view(array, view, NULL, False, name)
    try:
        if view.device_type != kDLCPU:
            raise InvalidProblem(
                f"{name}: expected host memory, got {describe(array)}; "
                "share device memory through __dlpack__"
            )
        if writable and view.readonly:
            raise ReadOnlyArray(
                f"{name}: expected a writable array, got {describe(array)}, which is read-only; "
                "pass a bytearray or a writable array"
            )
    except BaseException:
        release_view(view)
        raise
    return 0


cdef bint is_pinned(const void* pointer) noexcept nogil:
    cdef int device_type = 0
    cdef int device = 0
    return (
        pointer != NULL
        and _cuda.pointer_device(pointer, &device_type, &device) == 0
        and device_type == kDLCUDAHost
    )


cdef StreamHandle choose_stream(DeviceMemory memory, object stream):
    """The stream of a copy, ordered after what the memory's own stream did to it."""
    cdef StreamHandle chosen = memory.order if stream is None else handle_of(stream)
    if chosen.device >= 0 and chosen.device != memory.device:
        raise InvalidProblem(
            f"stream: expected a stream of cuda:{memory.device}, where the memory is, got one of "
            f"cuda:{chosen.device}; leave it out for the memory's own"
        )
    order_after(chosen.raw, memory.order.raw, memory.device)
    return chosen


cdef int copy_in(
    DeviceMemory memory, void* to, int64_t room, object source, object stream
) except -1:
    cdef ArrayView view
    cdef int64_t nbytes
    cdef StreamHandle chosen
    cdef bint pinned
    memset(&view, 0, sizeof(view))
    acquire_host(source, &view, "source", False)
    try:
        nbytes = span_of(&view, "source", source)
        if nbytes > room:
            raise InvalidProblem(
                f"source: expected at most {room} bytes, the size of the buffer, got {nbytes}; "
                "make a larger buffer or copy a part"
            )
        if nbytes == 0:
            return 0
        chosen = choose_stream(memory, stream)
        with nogil:
            pinned = is_pinned(view.data)
            _cuda.copy(memory.device, to, view.data, nbytes, chosen.raw)
        if pinned:
            hold_until_done(&view, 1, (source, memory, chosen), memory.device, chosen.raw)
        order_after(memory.order.raw, chosen.raw, memory.device)
    finally:
        release_view(&view)
    return 0


cdef int copy_out(
    DeviceMemory memory, void* source, int64_t nbytes, object target, object stream, bint wait
) except -1:
    cdef ArrayView view
    cdef int64_t room
    cdef StreamHandle chosen
    cdef bint pinned
    memset(&view, 0, sizeof(view))
    acquire_host(target, &view, "target", True)
    try:
        room = span_of(&view, "target", target)
        if room < nbytes:
            raise InvalidProblem(
                f"target: expected at least {nbytes} bytes, the size of the buffer, got {room}; "
                "pass a larger array"
            )
        if nbytes == 0:
            return 0
        chosen = choose_stream(memory, stream)
        with nogil:
            pinned = is_pinned(view.data)
            _cuda.copy(memory.device, view.data, source, nbytes, chosen.raw)
        if wait or not pinned:
            with nogil:
                _cuda.stream_synchronize(memory.device, chosen.raw)
        else:
            hold_until_done(&view, 1, (target, memory, chosen), memory.device, chosen.raw)
            order_after(memory.order.raw, chosen.raw, memory.device)
    finally:
        release_view(&view)
    return 0


cdef object export_device(
    DeviceMemory memory, ArrayView* view, int64_t nbytes, object stream, object max_version,
    object dl_device, object copy,
):
    """``__dlpack__`` of device memory."""
    cdef DeviceMemory duplicate
    cdef HostMemory host
    cdef ArrayView moved = view[0]
    cdef uint64_t flags = 0
    cdef void* consumer
    if stream is not None and (not isinstance(stream, int) or stream == 0 or stream < -1):
        raise InvalidProblem(
            "stream: expected None, -1 (no ordering), 1 (legacy default), 2 (per-thread default) "
            f"or a handle, got {stream!r}"
        )
    asked = None if dl_device is None else (int(dl_device[0]), int(dl_device[1]))
    if asked == (kDLCPU, 0):
        if copy is False:
            raise BufferError(
                f"dl_device: memory of cuda:{memory.device} reaches the host by copy only"
            )
        host = allocate_host(nbytes)
        if nbytes:
            with nogil:
                _cuda.copy(memory.device, host.raw, view.data, nbytes, memory.order.raw)
                _cuda.stream_synchronize(memory.device, memory.order.raw)
        moved.data = <char*>host.raw
        moved.device_type = kDLCPU
        moved.device_id = 0
        return make_capsule(host, &moved, DLPACK_FLAG_IS_COPIED, max_version)
    if asked is not None and asked != (kDLCUDA, memory.device):
        raise BufferError(
            f"dl_device: expected ({kDLCUDA}, {memory.device}), where the memory is, or "
            f"({kDLCPU}, 0), got {asked}"
        )
    if copy:
        duplicate = allocate_device(nbytes, memory.device, memory.order)
        if nbytes:
            with nogil:
                _cuda.copy(
                    memory.device, duplicate.raw, view.data, nbytes, memory.order.raw
                )
        memory = duplicate
        moved.data = <char*>duplicate.raw
        flags = DLPACK_FLAG_IS_COPIED
    if stream is None or stream != -1:
        # No stream stands for the legacy default stream.
        consumer = <void*><uintptr_t>(1 if stream is None else stream)
        order_after(consumer, memory.order.raw, memory.device)
        if lasts(stream, memory.device):
            memory.add_consumer(consumer)
    return make_capsule(memory, &moved, flags, max_version)


cdef bint lasts(object stream, int device) except -1:
    """Whether a consumer's stream is still a stream whenever the memory is freed.

    The default streams are, and so are torch's and JAX's, which they never destroy. A stream that
    its user may destroy must not be touched later: there the memory is freed in its own stream's
    order, and whoever took it keeps it until the work is done, as with other DLPack producers.
    """
    if stream is None or stream <= 2 or exporting_to_jax():
        return True
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    return bool(torch.cuda.current_stream(device).cuda_stream == stream)


cdef object cuda_interface(DeviceMemory memory, ArrayView* view):
    if view.element == BF16:
        raise AttributeError(
            "__cuda_array_interface__ cannot say bfloat16; share the array through __dlpack__"
        )
    size = element_bytes(view.element)
    kind = "b" if view.element == BOOL else ElementKind(view.element).dtype[0]
    return {
        "version": 3,
        "shape": tuple([view.shape[i] for i in range(view.ndim)]),
        "typestr": f"{'|' if size == 1 else '<'}{kind}{size}",
        "data": (<uintptr_t>view.data, False),
        "strides": None,
        # 0 is not allowed, because it could mean either default stream.
        "stream": <uintptr_t>memory.order.raw if memory.order.raw != NULL else 1,
    }


cdef int keep_in_view(ArrayView* view, object owner) except -1:
    Py_INCREF(owner)
    view.keep = <void*>owner
    view.keep_kind = KEEP_OBJECT
    return 0


cdef int bytes_view(
    ArrayView* view, void* data, int64_t nbytes, int device_type, int device
) except -1:
    view.data = <char*>data
    view.ndim = 1
    view.shape[0] = nbytes
    view.strides[0] = 1
    view.element = U8
    view.device_type = device_type
    view.device_id = device
    return 0


# ---- device memory -------------------------------------------------------------------------------


cdef int place_of(StreamHandle order, object device) except -1:
    """The device of an allocation, from its stream and the device asked for."""
    cdef int ordinal
    if device is None and order.device >= 0:
        _cuda.require_ordinal(order.device)
        return order.device
    ordinal = cuda_ordinal(device)
    if order.device >= 0 and order.device != ordinal:
        raise InvalidProblem(
            f"stream: expected a stream of cuda:{ordinal}, got one of cuda:{order.device}; "
            "leave device= out to allocate where the stream is"
        )
    return ordinal


@cython.final
cdef class DeviceBuffer:
    """Device memory, allocated and freed in the order of a stream.

    Parameters
    ----------
    nbytes : int
        Size; 0 is allowed.
    stream : Stream or object with ``__cuda_stream__``, optional
        The stream whose order it belongs to, kept open as long as the memory is in use. The legacy
        default stream by default.
    device : int, str or Stream, optional
        Where; by default the stream's device, else the current one.

    Raises
    ------
    OutOfMemory
        The device has no such amount left.
    Unsupported
        There is no CUDA here; the message says why.
    InvalidProblem
        A negative size, no such device, or a stream of another device.

    Notes
    -----
    Work on another stream must be ordered after the allocation and before the free. The plans and
    copies of this package do that themselves; so does ``__dlpack__`` for the consumer's stream. A
    consumer that drops the memory while its kernels still run on a stream it made itself must wait
    for them first, as with every library.

    Examples
    --------
    >>> from baracuda_cy import DeviceBuffer
    >>> buffer = DeviceBuffer.from_host(b"weights")     # doctest: +SKIP
    >>> bytes(buffer.copy_to_host())                    # doctest: +SKIP
    b'weights'
    """

    def __init__(self, nbytes, *, stream=None, device=None):
        cdef int64_t size = size_of(nbytes, "nbytes")
        cdef StreamHandle order = handle_of(stream)
        if self.memory is not None:
            raise InvalidProblem("buffer: expected to be made once; make another DeviceBuffer")
        self.adopt(allocate_device(size, place_of(order, device), order), as_stream(stream))

    cdef int adopt(self, DeviceMemory memory, object stream) except -1:
        self.memory = memory
        self.raw = memory.raw
        self.size = memory.size
        self.order = memory.order
        self._stream = stream
        return 0

    cdef DeviceMemory require_open(self):
        if self.memory is None:
            raise InvalidProblem(
                "buffer: expected an open DeviceBuffer, got one that is closed; "
                "make another one"
            )
        return self.memory

    @staticmethod
    def from_host(source, *, stream=None, device=None):
        """Make a buffer with the bytes of a host array.

        Parameters
        ----------
        source : array or buffer
            C-contiguous host memory of any type.
        stream : Stream or object with ``__cuda_stream__``, optional
            As in `DeviceBuffer`.
        device : int, str or Stream, optional
            As in `DeviceBuffer`.

        Returns
        -------
        DeviceBuffer

        Raises
        ------
        OutOfMemory, Unsupported, InvalidProblem
            As in `DeviceBuffer` and `copy_from_host`.

        Examples
        --------
        >>> from baracuda_cy import DeviceBuffer
        >>> DeviceBuffer.from_host(bytes(1024)).nbytes      # doctest: +SKIP
        1024
        """
        cdef ArrayView view
        cdef int64_t nbytes
        memset(&view, 0, sizeof(view))
        acquire_host(source, &view, "source", False)
        try:
            nbytes = span_of(&view, "source", source)
        finally:
            release_view(&view)
        buffer = DeviceBuffer(nbytes, stream=stream, device=device)
        return buffer.copy_from_host(source)

    def copy_from_host(self, source, *, stream=None):
        """Copy a host array to the beginning of the buffer.

        Parameters
        ----------
        source : array or buffer
            C-contiguous, at most as large as the buffer.
        stream : Stream or object with ``__cuda_stream__``, optional
            Where the copy runs; the buffer's own stream by default.

        Returns
        -------
        DeviceBuffer
            This buffer.

        Raises
        ------
        InvalidProblem
            `source` is no contiguous host array, or too large.

        Notes
        -----
        From pinned memory (`PinnedBuffer`) the copy overlaps with what the host does next, and
        `source` is kept alive until it is done: do not write to it before. From other memory the
        call returns once `source` was read.
        """
        cdef DeviceMemory memory = self.require_open()
        copy_in(memory, memory.raw, memory.size, source, stream)
        return self

    def copy_to_host(self, target=None, *, stream=None):
        """Copy the buffer to host memory.

        Parameters
        ----------
        target : array or buffer, optional
            Writable, C-contiguous, at least as large as the buffer.
        stream : Stream or object with ``__cuda_stream__``, optional
            Where the copy runs; the buffer's own stream by default.

        Returns
        -------
        bytearray or `target`

        Raises
        ------
        ReadOnlyArray
            `target` cannot be written.
        InvalidProblem
            `target` is no contiguous host array, or too small.

        Notes
        -----
        Into pinned memory (`PinnedBuffer`) the copy overlaps with what the host does next, and
        `target` is kept alive until it is done: wait for the stream before reading it. Into other
        memory the call returns when the bytes are there.
        """
        cdef DeviceMemory memory = self.require_open()
        result = bytearray(memory.size) if target is None else target
        copy_out(memory, memory.raw, memory.size, result, stream, target is None)
        return result

    def fill(self, value=0, *, stream=None):
        """Set every byte.

        Parameters
        ----------
        value : int, optional
            0 to 255.
        stream : Stream or object with ``__cuda_stream__``, optional
            Where it runs; the buffer's own stream by default.

        Returns
        -------
        DeviceBuffer
            This buffer.
        """
        cdef DeviceMemory memory = self.require_open()
        cdef int byte
        number = as_index(value)
        if number is None or not 0 <= number <= 255:
            raise InvalidProblem(
                f"value: expected a byte from 0 to 255, got {value!r}; copy_from_host writes others"
            )
        byte = number
        cdef StreamHandle chosen = choose_stream(memory, stream)
        with nogil:
            _cuda.fill(memory.device, memory.raw, byte, memory.size, chosen.raw)
        order_after(memory.order.raw, chosen.raw, memory.device)
        return self

    @property
    def ptr(self):
        """Address of the first byte; 0 when the buffer is empty."""
        return <uintptr_t>self.require_open().raw

    @property
    def nbytes(self):
        """Size in bytes."""
        return self.require_open().size

    @property
    def device(self):
        """Device ordinal."""
        return self.require_open().device

    @property
    def stream(self):
        """The stream whose order the memory belongs to."""
        self.require_open()
        return self._stream

    @property
    def closed(self):
        """Whether `close` was called."""
        return self.memory is None

    def close(self):
        """Let go of the memory. Using the buffer afterwards is an error; closing twice is not.

        The memory is freed, in its stream's order, once no exported array and no running kernel of
        this package needs it.
        """
        self.memory = None
        self.raw = NULL
        self._stream = None

    def __enter__(self):
        self.require_open()
        return self

    def __exit__(self, *_):
        self.close()

    def __len__(self):
        return self.require_open().size

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        """Export the bytes as a uint8 DLPack tensor.

        Parameters
        ----------
        stream : int, optional
            The consumer's stream, made to wait for this buffer's: None or 1 for the legacy default
            stream, 2 for the per-thread one, -1 for no waiting, else a handle.
        max_version : tuple of int, optional
            The newest DLPack the consumer reads; a legacy capsule without it.
        dl_device : tuple of int, optional
            Where the consumer wants it: here, or the host, ``(1, 0)``.
        copy : bool, optional
            True for a copy, False for none.

        Returns
        -------
        capsule

        Raises
        ------
        BufferError
            Another device, or the host with ``copy=False``.
        InvalidProblem
            A stream that is none, or a closed buffer.
        """
        cdef ArrayView view
        cdef DeviceMemory memory = self.require_open()
        memset(&view, 0, sizeof(view))
        bytes_view(&view, memory.raw, memory.size, kDLCUDA, memory.device)
        return export_device(memory, &view, memory.size, stream, max_version, dl_device, copy)

    def __dlpack_device__(self):
        """DLPack's ``(device type, device id)``."""
        return kDLCUDA, self.require_open().device

    @property
    def __cuda_array_interface__(self):
        """The bytes for consumers of version 3 of the interface, with the stream to wait for."""
        cdef ArrayView view
        cdef DeviceMemory memory = self.require_open()
        memset(&view, 0, sizeof(view))
        bytes_view(&view, memory.raw, memory.size, kDLCUDA, memory.device)
        return cuda_interface(memory, &view)

    def __repr__(self):
        if self.memory is None:
            return "DeviceBuffer(closed)"
        return f"DeviceBuffer({self.memory.size}, device='cuda:{self.memory.device}')"


cdef int fill_buffer(object array, ArrayView* view, void** stream) except -1:
    cdef DeviceMemory memory = (<DeviceBuffer>array).require_open()
    bytes_view(view, memory.raw, memory.size, kDLCUDA, memory.device)
    stream[0] = memory.order.raw
    return keep_in_view(view, memory)


@cython.final
cdef class DeviceArray:
    """An array over device memory, for libraries that have none of their own to give.

    Parameters
    ----------
    shape : tuple of int
        C-contiguous.
    dtype : ElementKind, str or a framework's dtype
        Any `ElementKind`, bfloat16 included.
    buffer : DeviceBuffer
        The memory, kept alive.
    offset : int, optional
        Bytes from the beginning of the buffer, a multiple of the element's size.

    Raises
    ------
    InvalidProblem
        The buffer is closed or too small, or the shape or dtype is none.

    Examples
    --------
    >>> from baracuda_cy import DeviceArray, DeviceBuffer
    >>> DeviceArray((4, 8), "bfloat16", DeviceBuffer(64))      # doctest: +SKIP
    DeviceArray(bfloat16[4, 8] on cuda:0)
    """

    def __init__(self, shape, dtype, buffer, *, offset=0):
        cdef int64_t nbytes = 0
        cdef int64_t start
        cdef DeviceMemory memory
        if self.memory is not None:
            raise InvalidProblem("array: expected to be made once; make another DeviceArray")
        if not isinstance(buffer, DeviceBuffer):
            raise InvalidProblem(
                f"buffer: expected a DeviceBuffer, got {type(buffer).__name__}; "
                "DeviceArray.from_host copies a host array"
            )
        memory = (<DeviceBuffer>buffer).require_open()
        memset(&self.view, 0, sizeof(ArrayView))
        nbytes = lay_out(&self.view, shape, element_of(dtype, "dtype"))
        start = size_of(offset, "offset")
        if start % element_bytes(self.view.element) or start > memory.size - nbytes:
            raise InvalidProblem(
                f"buffer: expected {nbytes} bytes at a multiple of "
                f"{element_bytes(self.view.element)}, got {memory.size} bytes and offset {start}; "
                "make a buffer of shape and dtype, or move the offset"
            )
        self.view.data = <char*>memory.raw + start if memory.raw != NULL else NULL
        self.view.device_type = kDLCUDA
        self.view.device_id = memory.device
        self.memory = memory
        self.buffer = buffer

    @staticmethod
    def empty(shape, dtype, *, stream=None, device=None):
        """Allocate an array whose contents are undefined.

        Parameters
        ----------
        shape : tuple of int
            Its shape.
        dtype : ElementKind, str or a framework's dtype
            Its type.
        stream : Stream or object with ``__cuda_stream__``, optional
            As in `DeviceBuffer`.
        device : int, str or Stream, optional
            As in `DeviceBuffer`.

        Returns
        -------
        DeviceArray
        """
        cdef ArrayView view
        memset(&view, 0, sizeof(view))
        nbytes = lay_out(&view, shape, element_of(dtype, "dtype"))
        return DeviceArray(shape, dtype, DeviceBuffer(nbytes, stream=stream, device=device))

    @staticmethod
    def from_host(array, *, stream=None, device=None):
        """Copy a host array to the device.

        Parameters
        ----------
        array : array or buffer
            C-contiguous, of any `ElementKind`.
        stream : Stream or object with ``__cuda_stream__``, optional
            As in `DeviceBuffer`.
        device : int, str or Stream, optional
            As in `DeviceBuffer`.

        Returns
        -------
        DeviceArray

        Raises
        ------
        InvalidProblem
            `array` is not on the host, not contiguous or of another type.
        """
        cdef ArrayView view
        memset(&view, 0, sizeof(view))
        acquire_host(array, &view, "array", False)
        try:
            span_of(&view, "array", array)
            shape = tuple([view.shape[i] for i in range(view.ndim)])
            element = view.element
        finally:
            release_view(&view)
        result = DeviceArray.empty(shape, element, stream=stream, device=device)
        result.buffer.copy_from_host(array)
        return result

    def to_host(self, *, stream=None):
        """Copy the array to a NumPy array, and wait for it.

        Parameters
        ----------
        stream : Stream or object with ``__cuda_stream__``, optional
            Where the copy runs; the buffer's own stream by default.

        Returns
        -------
        numpy.ndarray
            Of the same shape and type; bfloat16 needs ml_dtypes.

        Raises
        ------
        Unsupported
            bfloat16 without ml_dtypes.
        """
        import numpy as np

        self.require_made()
        result = np.empty(self.shape, numpy_dtype(self.view.element, "array"))
        copy_out(self.memory, self.view.data, self.byte_size(), result, stream, True)
        return result

    cdef DeviceMemory require_made(self):
        if self.memory is None:
            raise InvalidProblem(
                "array: expected a DeviceArray that was made, got one without memory; call "
                "DeviceArray, DeviceArray.empty or DeviceArray.from_host"
            )
        return self.memory

    cdef int64_t byte_size(self) noexcept:
        cdef int64_t nbytes = element_bytes(self.view.element)
        cdef int i
        for i in range(self.view.ndim):
            nbytes *= self.view.shape[i]
        return nbytes

    def _settle(self, *, scratch=False):
        """Order the legacy default stream after the array's own, and belong to that from now on.

        Its own stream was lent for one call, and may be destroyed before the array is. Scratch of a
        captured graph stays where it is: it is freed inside the graph, before the call returns.
        """
        cdef StreamHandle legacy = handle_of(None)
        cdef StreamHandle order = self.require_made().order
        cdef int device = self.memory.device
        cdef int capturing = 0
        with nogil:
            # A captured graph is ordered by whoever launches it.
            _cuda.stream_is_capturing(device, order.raw, &capturing)
        if capturing and scratch:
            return
        if not capturing:
            order_after(legacy.raw, order.raw, device)
        self.memory.order = legacy
        self.buffer.order = legacy
        self.buffer._stream = as_stream(None)

    @property
    def shape(self):
        """Sizes, as a tuple."""
        return tuple([self.view.shape[i] for i in range(self.view.ndim)])

    @property
    def ndim(self):
        """Number of dimensions."""
        return self.view.ndim

    @property
    def dtype(self):
        """The `ElementKind`."""
        return ElementKind(self.view.element)

    @property
    def nbytes(self):
        """Size in bytes."""
        return self.byte_size()

    @property
    def ptr(self):
        """Address of the first element; 0 when the array is empty."""
        return <uintptr_t>self.view.data

    @property
    def device(self):
        """Device ordinal."""
        return self.view.device_id

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        """Export as a DLPack tensor; see `DeviceBuffer.__dlpack__`."""
        return export_device(
            self.require_made(), &self.view, self.byte_size(), stream, max_version, dl_device, copy
        )

    def __dlpack_device__(self):
        """DLPack's ``(device type, device id)``."""
        self.require_made()
        return kDLCUDA, self.view.device_id

    @property
    def __cuda_array_interface__(self):
        """The array for consumers of version 3 of the interface; bfloat16 has no name there."""
        return cuda_interface(self.require_made(), &self.view)

    def __len__(self):
        if self.view.ndim == 0:
            raise TypeError("len() of an array without dimensions")
        return self.view.shape[0]

    def __repr__(self):
        return f"DeviceArray({describe(self)})"


cdef int64_t lay_out(ArrayView* view, object shape, int element) except -1:
    """Fill in a C-contiguous shape; gives its size in bytes."""
    cdef int64_t step = 1
    cdef int i
    sizes = as_shape(shape if hasattr(shape, "__iter__") else (shape,), element_bytes(element))
    if len(sizes) > MAX_NDIM:
        raise InvalidProblem(
            f"shape: expected 0 to {MAX_NDIM} dimensions, got {len(sizes)}; merge some"
        )
    view.ndim = len(sizes)
    view.element = element
    for i in range(view.ndim - 1, -1, -1):
        view.shape[i] = sizes[i]
        view.strides[i] = step
        step *= view.shape[i]
    return step * element_bytes(element)


cdef int fill_array(object array, ArrayView* view, void** stream) except -1:
    cdef DeviceArray source = array
    cdef DeviceMemory memory = source.require_made()
    view[0] = source.view
    stream[0] = memory.order.raw
    return keep_in_view(view, memory)


# ---- pinned host memory --------------------------------------------------------------------------


@cython.final
cdef class PinnedBuffer:
    """Page-locked host memory, which copies to and from the device at full speed, asynchronously.

    It is a writable buffer of bytes: ``numpy.frombuffer(pinned, "float32")`` and
    ``memoryview(pinned)`` share it.

    Parameters
    ----------
    nbytes : int
        Size; 0 is allowed.

    Raises
    ------
    OutOfMemory
        The host cannot lock as much.
    Unsupported
        There is no CUDA here; the message says why.

    Examples
    --------
    >>> from baracuda_cy import DeviceBuffer, PinnedBuffer, Stream
    >>> with Stream() as stream:                                        # doctest: +SKIP
    ...     staging = PinnedBuffer(1 << 20)
    ...     buffer = DeviceBuffer(1 << 20, stream=stream)
    ...     copied = buffer.copy_from_host(staging)     # returns at once
    """

    def __init__(self, nbytes):
        global live_pinned
        cdef int64_t size = size_of(nbytes, "nbytes")
        cdef void* raw = NULL
        if self.raw != NULL or self._closed:
            raise InvalidProblem("buffer: expected to be made once; make another PinnedBuffer")
        _cuda.require_ordinal(0)
        with nogil:
            # An empty buffer still has an address, which its consumers may ask for.
            _cuda.malloc_pinned(size if size else 1, &raw)
        self.raw = raw
        self.size = self.length = size
        self.step = 1
        self.pid = getpid()
        live_pinned += size

    def __dealloc__(self):
        self.destroy()

    cdef int destroy(self) noexcept:
        global live_pinned
        cdef void* raw = self.raw
        self.raw = NULL
        if raw != NULL and self.pid == getpid():
            live_pinned -= self.size
            with nogil:
                _cuda.free_pinned(raw)
        return 0

    cdef int require_open(self) except -1:
        if self.raw == NULL:
            raise InvalidProblem(
                "buffer: expected an open PinnedBuffer, got one that is closed; "
                "make another one"
            )
        return 0

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        self.require_open()
        buffer.buf = self.raw
        buffer.obj = self
        buffer.len = self.size
        buffer.itemsize = 1
        buffer.readonly = 0
        buffer.ndim = 1
        buffer.format = BYTES_FORMAT if flags & PyBUF_FORMAT else NULL
        buffer.shape = &self.length if flags & PyBUF_ND else NULL
        buffer.strides = &self.step if (flags & PyBUF_STRIDES) == PyBUF_STRIDES else NULL
        buffer.suboffsets = NULL
        buffer.internal = NULL
        self.exports += 1

    def __releasebuffer__(self, Py_buffer* buffer):
        self.exports -= 1

    @property
    def ptr(self):
        """Address of the first byte."""
        self.require_open()
        return <uintptr_t>self.raw

    @property
    def nbytes(self):
        """Size in bytes."""
        self.require_open()
        return self.size

    @property
    def closed(self):
        """Whether `close` was called."""
        return self._closed

    def close(self):
        """Free the memory. Using the buffer afterwards is an error; closing twice is not.

        Raises
        ------
        BufferError
            A memoryview, an array or a copy under way still uses it.
        """
        if self.exports:
            raise BufferError(
                f"buffer: expected no users left, got {self.exports}; delete the arrays that share "
                "the memory and wait for the stream that copies it"
            )
        self._closed = True
        self.destroy()

    def __enter__(self):
        self.require_open()
        return self

    def __exit__(self, *_):
        self.close()

    def __len__(self):
        self.require_open()
        return self.size

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        """Export the bytes as a uint8 DLPack tensor in CPU memory.

        Parameters
        ----------
        stream : None
            CPU memory has no stream.
        max_version : tuple of int, optional
            The newest DLPack the consumer reads; a legacy capsule without it.
        dl_device : tuple of int, optional
            ``(1, 0)``.
        copy : bool, optional
            True for a copy.

        Returns
        -------
        capsule

        Raises
        ------
        BufferError
            Another device is asked for.
        InvalidProblem
            A stream is given, or the buffer is closed.
        """
        cdef ArrayView view
        cdef HostMemory host
        self.require_open()
        if stream is not None:
            raise InvalidProblem(f"stream: expected None for CPU memory, got {stream!r}")
        if dl_device is not None and (int(dl_device[0]), int(dl_device[1])) != (kDLCPU, 0):
            raise BufferError(f"dl_device: expected ({kDLCPU}, 0), got {dl_device!r}")
        memset(&view, 0, sizeof(view))
        bytes_view(&view, self.raw, self.size, kDLCPU, 0)
        if not copy:
            return make_capsule(memoryview(self), &view, 0, max_version)
        host = allocate_host(self.size)
        memcpy(host.raw, self.raw, self.size)
        view.data = <char*>host.raw
        return make_capsule(host, &view, DLPACK_FLAG_IS_COPIED, max_version)

    def __dlpack_device__(self):
        """DLPack's ``(device type, device id)``: CPU, so that NumPy takes it too."""
        return kDLCPU, 0

    def __repr__(self):
        return "PinnedBuffer(closed)" if self.raw == NULL else f"PinnedBuffer({self.size})"


cdef int fill_pinned(object array, ArrayView* view, void** stream) except -1:
    cdef PinnedBuffer source = array
    source.require_open()
    bytes_view(view, source.raw, source.size, kDLCPU, 0)
    return keep_in_view(view, memoryview(source))


# ---- scratch -------------------------------------------------------------------------------------


@cython.final
cdef class Workspace:
    """Scratch memory that a caller lends to ``plan.run``, aligned to 256 bytes.

    Its contents mean nothing between calls. One workspace serves one call at a time: calls that may
    overlap, on several streams or threads, need one each.

    Parameters
    ----------
    nbytes : int, optional
        Size, such as ``plan.workspace_size``.
    device : str, int or Stream, optional
        ``"cpu"`` (the default, unless `stream` is given) or ``"cuda:1"``.
    stream : Stream or object with ``__cuda_stream__``, optional
        On CUDA, the stream whose order the memory belongs to.
    buffer : array, optional
        Memory to lend instead: writable, contiguous, on either device. What lies before the first
        multiple of 256 is not used.

    Raises
    ------
    InvalidProblem
        Both or neither of `nbytes` and `buffer`; a buffer that is not contiguous; or a stream on
        the CPU.
    ReadOnlyArray
        A buffer that cannot be written.
    OutOfMemory
        The GPU or the host has no such amount left.

    Examples
    --------
    >>> from baracuda_cy import Workspace
    >>> Workspace(4096)
    Workspace(4096, device='cpu')
    >>> Workspace(buffer=bytearray(4096)).nbytes > 3840
    True
    """

    def __init__(self, nbytes=None, *, device=None, stream=None, buffer=None):
        cdef HostMemory host
        cdef DeviceMemory memory
        cdef StreamHandle order
        cdef int64_t size
        if self.memory is not None:
            raise InvalidProblem(
                "workspace: expected to be made once, got a second __init__; make another Workspace"
            )
        if (nbytes is None) == (buffer is None):
            raise InvalidProblem(
                "nbytes: expected either nbytes or buffer=, got "
                + ("neither" if buffer is None else "both")
                + "; pass one of them"
            )
        if buffer is not None:
            if device is not None or stream is not None:
                raise InvalidProblem(
                    "buffer: expected no device and no stream beside it: they are the buffer's"
                )
            self.lend(buffer)
            return
        size = size_of(nbytes, "nbytes")
        host_named = str(device) in ("cpu", "cpu:0")
        if host_named and stream is not None:
            raise InvalidProblem(
                f"stream: expected None on the CPU, got {type(stream).__name__}; leave it out"
            )
        if host_named or (device is None and stream is None):
            host = allocate_host(size)
            self.memory = host
            self.raw = <char*>host.raw
            self.device_type = kDLCPU
        else:
            order = handle_of(stream)
            memory = allocate_device(size, place_of(order, device), order)
            self.memory = memory
            self.raw = <char*>memory.raw
            self.device_type = kDLCUDA
            self.device_id = memory.device
        self.size = size

    cdef int lend(self, object buffer) except -1:
        cdef LentMemory lent = LentMemory.__new__(LentMemory)
        lent.source = buffer
        # Borrowed where that can be: what this holds could hold the workspace in turn.
        acquire_view(buffer, &lent.view, NULL, False, "buffer")
        use_lent(buffer, &lent.view)
        self.memory = lent
        return 0

    cdef int fill(self, ArrayView* view) except -1:
        """View the usable bytes."""
        self.require_open()
        if isinstance(self.memory, LentMemory):
            # Anew for each use, as its library may have moved it, and held for as long.
            source = (<LentMemory>self.memory).source
            hold_view(source, view, NULL, False, "buffer")
            return use_lent(source, view)
        bytes_view(view, self.raw, self.size, self.device_type, self.device_id)
        return keep_in_view(view, self.memory)

    cdef int require_open(self) except -1:
        if self.memory is None:
            raise InvalidProblem(
                "workspace: expected an open Workspace, got one that is closed; "
                "make another one"
            )
        return 0

    cdef tuple look(self):
        """Address, size and device."""
        cdef ArrayView view
        memset(&view, 0, sizeof(view))
        self.fill(&view)
        device = "cpu" if view.device_type == kDLCPU else f"cuda:{view.device_id}"
        found = <uintptr_t>view.data, view.shape[0], device
        release_view(&view)
        return found

    @property
    def nbytes(self):
        """Usable size in bytes."""
        return self.look()[1]

    @property
    def ptr(self):
        """Address of the first usable byte, a multiple of 256."""
        return self.look()[0]

    @property
    def device(self):
        """``"cpu"`` or ``"cuda:N"``."""
        return self.look()[2]

    @property
    def closed(self):
        """Whether `close` was called."""
        return self.memory is None

    def close(self):
        """Let go of the memory. Using it afterwards is an error; closing twice is not."""
        self.memory = None
        self.raw = NULL

    def __enter__(self):
        self.require_open()
        return self

    def __exit__(self, *_):
        self.close()

    def __repr__(self):
        if self.memory is None:
            return "Workspace(closed)"
        if isinstance(self.memory, LentMemory):
            # Its bytes may be gone by now.
            return f"Workspace(buffer={describe((<LentMemory>self.memory).source)})"
        return f"Workspace({self.nbytes}, device={self.device!r})"


cdef int use_lent(object source, ArrayView* view) except -1:
    """Make the view of an array one of its aligned bytes."""
    cdef int64_t size, skipped
    try:
        if view.readonly:
            raise ReadOnlyArray(
                f"buffer: expected a writable array, got {describe(source)}, which is read-only; "
                "pass a bytearray or a writable array"
            )
        size = span_of(view, "buffer", source)
    except BaseException:
        release_view(view)
        raise
    skipped = -<uintptr_t>view.data % ALIGNMENT
    bytes_view(
        view, view.data + skipped, max(size - skipped, 0), view.device_type, view.device_id
    )
    return 0


cdef int fill_workspace(object array, ArrayView* view, void** stream) except -1:
    cdef Workspace workspace = array
    workspace.fill(view)
    if view.device_type != kDLCUDA:
        return 0
    if isinstance(workspace.memory, DeviceMemory):
        stream[0] = (<DeviceMemory>workspace.memory).order.raw
        return 0
    try:
        current_stream((<LentMemory>workspace.memory).source, stream)
    except BaseException:
        release_view(view)
        raise
    return 0


register_type(DeviceBuffer, fill_buffer)
register_type(DeviceArray, fill_array)
register_type(PinnedBuffer, fill_pinned)
register_type(Workspace, fill_workspace)
