# SPDX-License-Identifier: Apache-2.0
# cython: auto_pickle=False
"""Memory on the device, in the order of a stream, and what owns memory here or on the host."""

cimport cython
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libc.stdlib cimport free
from libc.string cimport memset
from posix.stdlib cimport posix_memalign
from posix.unistd cimport getpid

cimport baracuda_cy._cuda as _cuda
from baracuda_cy._dlpack cimport DLPACK_FLAG_IS_COPIED, kDLCPU, kDLCUDA, kDLCUDAHost
from baracuda_cy._native cimport BCY_ERROR_OUT_OF_MEMORY
from baracuda_cy.allocation cimport exporting_to_jax
from baracuda_cy.dlpack cimport check_sign, describe, hold_view, register_type
from baracuda_cy.elements cimport BF16, BOOL, element_bytes, element_of, numpy_dtype
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
from baracuda_cy.view cimport MAX_NDIM, ArrayView, bytes_view, keep_in_view, release_view

import sys

from baracuda_cy.arguments import as_index, as_shape
from baracuda_cy.errors import InvalidProblem, ReadOnlyArray
from baracuda_cy.formats import ElementKind
from baracuda_cy.stream import as_stream

__all__ = ["DeviceArray", "DeviceBuffer", "live_bytes"]

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


register_type(DeviceBuffer, fill_buffer)
register_type(DeviceArray, fill_array)
