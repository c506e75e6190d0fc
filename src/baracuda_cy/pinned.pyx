# SPDX-License-Identifier: Apache-2.0
# cython: auto_pickle=False
"""Page-locked memory of the host."""

cimport cython
from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBUF_STRIDES
from libc.stdint cimport int64_t, uintptr_t
from libc.string cimport memcpy, memset
from posix.unistd cimport getpid

cimport baracuda_cy._cuda as _cuda
from baracuda_cy._dlpack cimport DLPACK_FLAG_IS_COPIED, kDLCPU
from baracuda_cy.dlpack cimport register_type
from baracuda_cy.export cimport make_capsule
from baracuda_cy.memory cimport HostMemory, allocate_host, live_pinned, size_of
from baracuda_cy.view cimport ArrayView, bytes_view, keep_in_view

from baracuda_cy.errors import InvalidProblem

__all__ = ["PinnedBuffer"]

cdef char* BYTES_FORMAT = b"B"


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


register_type(PinnedBuffer, fill_pinned)
