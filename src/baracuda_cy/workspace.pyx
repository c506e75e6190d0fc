# SPDX-License-Identifier: Apache-2.0
# cython: auto_pickle=False
"""Scratch that a caller lends to a plan: of its own, or the memory of an array."""

cimport cython
from libc.stdint cimport int64_t, uintptr_t
from libc.string cimport memset

from baracuda_cy._dlpack cimport kDLCPU, kDLCUDA
from baracuda_cy.dlpack cimport (
    acquire_view,
    current_stream,
    describe,
    hold_view,
    register_type,
)
from baracuda_cy.memory cimport (
    ALIGNMENT,
    DeviceMemory,
    HostMemory,
    allocate_device,
    allocate_host,
    place_of,
    size_of,
    span_of,
)
from baracuda_cy.stream cimport StreamHandle, handle_of
from baracuda_cy.view cimport ArrayView, bytes_view, keep_in_view, release_view

from baracuda_cy.errors import InvalidProblem, ReadOnlyArray

__all__ = ["Workspace"]


@cython.final
cdef class LentMemory:
    def __dealloc__(self):
        release_view(&self.view)


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


register_type(Workspace, fill_workspace)
