# SPDX-License-Identifier: Apache-2.0
# cython: auto_pickle=False
"""CUDA streams and events.

Work is always given a stream. Anything that has ``__cuda_stream__`` is one: the streams of this
module, of torch, of CuPy and of cuda.core.
"""

cimport cython
from libc.stdint cimport uintptr_t
from posix.unistd cimport getpid

cimport baracuda_cy._cuda as _cuda

import os
from enum import Enum
from numbers import Integral

from baracuda_cy import _cuda as _cuda_module
from baracuda_cy.arguments import as_flag, as_integer
from baracuda_cy.errors import InvalidProblem, Unsupported

__all__ = ["LEGACY_DEFAULT_STREAM", "PER_THREAD_DEFAULT_STREAM", "Event", "Stream", "as_stream"]

cdef enum:
    LEGACY = 1        # cudaStreamLegacy; a NULL handle means the same here
    PER_THREAD = 2    # cudaStreamPerThread


cdef inline bint is_default(void* raw) noexcept nogil:
    return <uintptr_t>raw <= PER_THREAD


@cython.final
@cython.no_gc_clear
cdef class StreamHandle:
    def __dealloc__(self):
        # A forked child has a copy of this object but not the driver's state behind it. The GIL is
        # released because the driver takes locks that other threads hold while they wait for it.
        if self.owned and self.raw != NULL and self.pid == getpid():
            with nogil:
                _cuda.stream_destroy(self.device, self.raw)


# ---- events to order streams with ----------------------------------------------------------------

cdef enum:
    MAX_DEVICES = 64
    POOLED = 32

cdef void* pool[MAX_DEVICES][POOLED]
cdef int pooled[MAX_DEVICES]


cdef void* take_event(int device) except NULL:
    cdef void* event = NULL
    if 0 <= device < MAX_DEVICES and pooled[device]:
        pooled[device] -= 1
        return pool[device][pooled[device]]
    with nogil:
        _cuda.event_create(device, 0, &event)
    return event


cdef void give_event(int device, void* event) noexcept:
    if 0 <= device < MAX_DEVICES and pooled[device] < POOLED:
        pool[device][pooled[device]] = event
        pooled[device] += 1
        return
    with nogil:
        _cuda.event_destroy(device, event)


cdef int order_after(void* later, void* earlier, int device) except -1:
    cdef int capturing = 0
    cdef void* event
    if same_stream(later, earlier):
        return 0
    with nogil:
        _cuda.stream_is_capturing(device, later, &capturing)
        if capturing:
            _cuda.stream_is_capturing(device, earlier, &capturing)
            if not capturing:
                return 0
    event = take_event(device)
    try:
        with nogil:
            _cuda.event_record(device, event, earlier)
            _cuda.stream_wait_event(device, later, event)
    finally:
        give_event(device, event)
    return 0


cdef void order_quietly(void* later, void* earlier, int device) noexcept:
    cdef int capturing = 0
    try:
        with nogil:
            _cuda.stream_is_capturing(device, earlier, &capturing)
        if not capturing:
            order_after(later, earlier, device)
    except Exception:
        pass


def _forget():
    """Drop what belongs to the parent process, in a child that was just forked."""
    for device in range(MAX_DEVICES):
        pooled[device] = 0


os.register_at_fork(after_in_child=_forget)


cdef StreamHandle borrow(void* raw, int device, object owner):
    cdef StreamHandle handle = StreamHandle.__new__(StreamHandle)
    handle.raw = raw
    handle.device = device
    handle.owner = owner
    handle.pid = getpid()
    return handle


cdef bint is_number(object value):
    """Whether it may be an ordinal: a member of an enum stands for something else."""
    return isinstance(value, Integral) and not isinstance(value, (bool, Enum))


cdef int as_ordinal(object value, str text) except -2:
    if not is_number(value) or not 0 <= value < 1 << 30:
        raise InvalidProblem(
            f'device: expected "cuda", "cuda:N", an ordinal or a Stream, got {text}'
        )
    return value


cdef int cuda_ordinal(object device) except -1:
    cdef int ordinal = -1
    if isinstance(device, Stream):
        ordinal = handle_of(device).device
    elif is_number(device):
        ordinal = as_ordinal(device, repr(device))
    elif device is not None and not isinstance(device, str) and hasattr(
        device, "__dlpack_device__"
    ):
        kind, index = device.__dlpack_device__()
        if int(kind) not in (2, 13):
            where = "in host memory" if int(kind) in (1, 3) else f"on DLPack device type {kind}"
            raise InvalidProblem(
                f"device: expected a CUDA array, got {type(device).__name__} {where}; "
                'name the device, as in "cuda:0"'
            )
        ordinal = as_ordinal(int(index), repr(index))
    elif device is not None:
        # torch.device prints as "cuda:1" too.
        kind, _, index = str(device).partition(":")
        if kind != "cuda" or (index and not (index.isascii() and index.isdigit())):
            raise InvalidProblem(
                f'device: expected "cuda", "cuda:N", an ordinal or a Stream, got {device!r}'
            )
        if index:
            ordinal = as_ordinal(int(index), repr(device))
    if ordinal < 0:
        _cuda.require_ordinal(0)
        with nogil:
            _cuda.get_device(&ordinal)
    _cuda.require_ordinal(ordinal)
    return ordinal


cdef int read_protocol(object stream, void** raw, int* device) except -1:
    """Read a foreign stream through ``__cuda_stream__``, or torch's and CuPy's own attributes."""
    given = type(stream).__name__
    module = type(stream).__module__ or ""
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        answer = protocol() if callable(protocol) else protocol
        if not (isinstance(answer, (tuple, list)) and len(answer) == 2):
            raise InvalidProblem(
                f"stream: expected __cuda_stream__() to give (0, handle), {given} gave {answer!r}"
            )
        version, handle = answer
        if version != 0:
            raise Unsupported(
                f"stream: expected version 0 of the __cuda_stream__ protocol, {given} speaks "
                f"{version!r}; wrap its handle with Stream.from_handle(handle, device=...)"
            )
    elif module.startswith("torch") and hasattr(stream, "cuda_stream"):
        handle = stream.cuda_stream
    elif module.startswith("cupy") and hasattr(stream, "ptr"):
        handle = stream.ptr
    else:
        remedy = (
            "wrap a raw handle with Stream.from_handle(handle, device=...)"
            if isinstance(stream, int)
            else "pass a Stream, a framework's stream, or None"
        )
        raise InvalidProblem(
            f"stream: expected a Stream or an object with __cuda_stream__, got {stream!r}; {remedy}"
        )
    raw[0] = read_handle(handle, given)
    # The handle of a default stream does not say on which device it is; its framework does.
    index = getattr(stream, "device_index" if module.startswith("torch") else "device_id", -1)
    device[0] = index if isinstance(index, int) else -1
    if device[0] < 0 and not is_default(raw[0]):
        try:
            with nogil:
                _cuda.stream_device(raw[0], device)
        except Exception:
            device[0] = -1
    return 0


cdef void* read_handle(object handle, str given) except? NULL:
    if not isinstance(handle, int) or isinstance(handle, bool) or not 0 <= handle < 1 << 64:
        raise InvalidProblem(
            f"stream: expected a handle that is an address, got {handle!r} from {given}"
        )
    return <void*><uintptr_t>handle


cdef int stream_of(object stream, void** handle, int* device) except -1:
    cdef StreamHandle native
    if type(stream) is Stream:
        native = (<Stream>stream).native
        if native is None:
            raise InvalidProblem(
                "stream: expected an open Stream, got one that is closed; make another one"
            )
        handle[0] = native.raw
        device[0] = native.device
        return 0
    return read_protocol(stream, handle, device)


cdef StreamHandle handle_of(object stream):
    cdef void* raw = NULL
    cdef int device = -1
    if stream is None:
        return (<Stream>LEGACY_DEFAULT_STREAM).native
    stream_of(stream, &raw, &device)
    if type(stream) is Stream:
        return (<Stream>stream).native
    return borrow(raw, device, stream)


cdef Stream wrap_handle(StreamHandle native):
    cdef Stream stream = Stream.__new__(Stream)
    stream.native = native
    return stream


@cython.final
cdef class Stream:
    """A queue of GPU work, executed in order.

    Parameters
    ----------
    device : int, str or Stream, optional
        Where the stream lives; the current device by default.
    priority : int, optional
        Lower numbers run first; 0 is the lowest priority. `priority_range` gives what the device
        knows.

    Raises
    ------
    Unsupported
        There is no CUDA here; the message says why.
    InvalidProblem
        There is no such device or priority.

    Notes
    -----
    The stream does not wait for the legacy default stream. It is destroyed once it is closed (or
    garbage) and no buffer needs it any more; work that was submitted still completes.

    Examples
    --------
    >>> from baracuda_cy import Stream
    >>> with Stream() as stream:            # doctest: +SKIP
    ...     plan.run(weight, x, y, workspace=workspace, stream=stream)
    ...     stream.synchronize()
    """

    def __init__(self, device=None, *, priority=0):
        cdef StreamHandle native
        cdef int least = 0
        cdef int greatest = 0
        cdef int chosen
        if self.native is not None:
            raise InvalidProblem("stream: expected to be made once; make another Stream")
        priority = as_integer(priority, "priority")
        cdef int ordinal = cuda_ordinal(device)
        with nogil:
            _cuda.stream_priority_range(ordinal, &least, &greatest)
        if not greatest <= priority <= least:
            raise InvalidProblem(
                f"priority: expected {greatest} (first) to {least} (last), got {priority}; "
                "Stream.priority_range() gives both"
            )
        chosen = priority
        native = borrow(NULL, ordinal, None)
        with nogil:
            _cuda.stream_create(ordinal, chosen, &native.raw)
        native.owned = True
        self.native = native

    @staticmethod
    def from_handle(handle, *, device=None, owner=None):
        """Wrap a raw ``cudaStream_t`` that someone else owns.

        Parameters
        ----------
        handle : int
            The address; 0 and 1 are the legacy default stream, 2 the per-thread one.
        device : int or str, optional
            The device it lives on; the driver is asked by default.
        owner : object, optional
            Kept alive as long as the stream is in use.

        Returns
        -------
        Stream

        Raises
        ------
        InvalidProblem
            `handle` is no address, or there is no such device.

        Examples
        --------
        >>> from baracuda_cy import Stream
        >>> Stream.from_handle(2).handle
        2
        """
        cdef void* raw = read_handle(handle, "the caller")
        cdef int ordinal = -1
        if is_number(device):
            ordinal = as_ordinal(device, repr(device))
            if _cuda_module.device_count():
                _cuda.require_ordinal(ordinal)
        elif device is not None:
            ordinal = cuda_ordinal(device)
        elif not is_default(raw):
            with nogil:
                _cuda.stream_device(raw, &ordinal)
        return wrap_handle(borrow(raw, ordinal, owner))

    @staticmethod
    def wrap(stream):
        """Take another library's stream.

        Parameters
        ----------
        stream : object
            Anything with ``__cuda_stream__``; kept alive as long as the result is in use. A
            `Stream` is returned as it is.

        Returns
        -------
        Stream

        Raises
        ------
        InvalidProblem
            `stream` is not one; integers are refused, see `from_handle`.
        Unsupported
            It speaks another version of the protocol.
        """
        if type(stream) is Stream:
            return stream
        return wrap_handle(handle_of(stream))

    @staticmethod
    def priority_range(device=None):
        """The priorities a device knows, as ``(last, first)``; smaller numbers run first.

        Parameters
        ----------
        device : int, str or Stream, optional
            The current device by default.

        Returns
        -------
        tuple of int
        """
        cdef int least = 0
        cdef int greatest = 0
        cdef int ordinal = cuda_ordinal(device)
        with nogil:
            _cuda.stream_priority_range(ordinal, &least, &greatest)
        return least, greatest

    cdef StreamHandle open_handle(self):
        if self.native is None:
            raise InvalidProblem(
                "stream: expected an open Stream, got one that is closed; make another one"
            )
        return self.native

    @property
    def handle(self):
        """The ``cudaStream_t`` as an integer."""
        return <uintptr_t>self.open_handle().raw

    @property
    def device(self):
        """Device ordinal; None for the default streams, which run where the work is."""
        cdef int device = self.open_handle().device
        return device if device >= 0 else None

    @property
    def priority(self):
        """Priority; smaller numbers run first."""
        cdef StreamHandle native = self.open_handle()
        cdef int priority = 0
        if not is_default(native.raw):
            with nogil:
                _cuda.stream_priority(native.device, native.raw, &priority)
        return priority

    @property
    def closed(self):
        """Whether `close` was called."""
        return self.native is None

    def synchronize(self):
        """Wait, without the GIL, until everything submitted so far is done.

        Raises
        ------
        CudaError
            Work on the stream failed.
        """
        cdef StreamHandle native = self.open_handle()
        with nogil:
            _cuda.stream_synchronize(native.device, native.raw)

    def query(self):
        """Whether everything submitted so far is done.

        Returns
        -------
        bool
        """
        cdef StreamHandle native = self.open_handle()
        cdef int done = 0
        with nogil:
            _cuda.stream_query(native.device, native.raw, &done)
        return bool(done)

    def record(self, event=None):
        """Mark this point of the stream.

        Parameters
        ----------
        event : Event, optional
            The event to record; one without timing is made by default.

        Returns
        -------
        Event
        """
        if event is None:
            event = Event()
        elif not isinstance(event, Event):
            raise InvalidProblem(
                f"event: expected an Event, got {type(event).__name__}; leave it out for a new one"
            )
        (<Event>event).record(self)
        return event

    def wait(self, event):
        """Hold later work on this stream until `event` has happened; the host does not wait.

        Parameters
        ----------
        event : Event, Stream or object with ``__cuda_stream__``
            A stream stands for everything submitted to it so far.

        Raises
        ------
        InvalidProblem
            `event` is none of these.
        """
        cdef StreamHandle native = self.open_handle()
        cdef Event mark
        if event is None:
            raise InvalidProblem(
                "event: expected an Event, a Stream or an object with __cuda_stream__, got None; "
                "pass LEGACY_DEFAULT_STREAM for what is on that"
            )
        if not isinstance(event, Event):
            other = Stream.wrap(event)
            event = other.record()
        mark = event
        mark.require_open()
        if mark.recorded:
            with nogil:
                _cuda.stream_wait_event(
                    native.device if native.device >= 0 else mark._device, native.raw, mark.raw
                )

    def close(self):
        """Give the stream back. Using it afterwards is an error; closing twice is not.

        Work already submitted completes. `LEGACY_DEFAULT_STREAM` and `PER_THREAD_DEFAULT_STREAM`
        stay open.
        """
        if self is not LEGACY_DEFAULT_STREAM and self is not PER_THREAD_DEFAULT_STREAM:
            self.native = None

    def __enter__(self):
        self.open_handle()
        return self

    def __exit__(self, *_):
        self.close()

    def __cuda_stream__(self):
        """The stream protocol: ``(0, handle)``."""
        return 0, self.handle

    def __repr__(self):
        if self.native is None:
            return "Stream(closed)"
        if is_default(self.native.raw) and self.native.device < 0:
            return (
                "PER_THREAD_DEFAULT_STREAM"
                if <uintptr_t>self.native.raw == PER_THREAD
                else "LEGACY_DEFAULT_STREAM"
            )
        where = f"cuda:{self.native.device}" if self.native.device >= 0 else "cuda"
        return f"Stream.from_handle({<uintptr_t>self.native.raw:#x}, device={where!r})"


@cython.final
cdef class Event:
    """A point in a stream's work.

    Parameters
    ----------
    timing : bool, optional
        Whether it can measure time; an event that cannot is cheaper.
    device : int, str or Stream, optional
        Where it lives; by default the device of the stream it is first recorded on.

    Raises
    ------
    Unsupported
        There is no CUDA here; the message says why.

    Examples
    --------
    >>> from baracuda_cy import Event, Stream
    >>> with Stream() as stream:            # doctest: +SKIP
    ...     start = stream.record(Event(timing=True))
    ...     plan.run(weight, x, y, workspace=workspace, stream=stream)
    ...     milliseconds = stream.record(Event(timing=True)).elapsed_ms(start)
    """

    def __cinit__(self):
        self._device = -1

    def __init__(self, timing=False, device=None):
        if self.raw != NULL or self._closed:
            raise InvalidProblem("event: expected to be made once; make another Event")
        self.timing = as_flag(timing, "timing")
        self.pid = getpid()
        if device is not None:
            self.create(cuda_ordinal(device))

    def __dealloc__(self):
        self.destroy()

    cdef int create(self, int device) except -1:
        cdef bint timing = self.timing
        cdef void* raw = NULL
        with nogil:
            _cuda.event_create(device, timing, &raw)
        self.raw = raw
        self._device = device
        return 0

    cdef int destroy(self) noexcept:
        cdef void* raw = self.raw
        cdef int device = self._device
        self.raw = NULL
        if raw != NULL and self.pid == getpid():
            with nogil:
                _cuda.event_destroy(device, raw)
        return 0

    cdef int require_open(self) except -1:
        if self._closed:
            raise InvalidProblem(
                "event: expected an open Event, got one that is closed; make another one"
            )
        return 0

    @property
    def device(self):
        """Device ordinal; None until it is recorded."""
        return self._device if self._device >= 0 else None

    @property
    def handle(self):
        """The ``cudaEvent_t`` as an integer; 0 until it is recorded."""
        self.require_open()
        return <uintptr_t>self.raw

    @property
    def closed(self):
        """Whether `close` was called."""
        return self._closed

    def record(self, stream=None):
        """Mark the present end of a stream's work.

        Parameters
        ----------
        stream : Stream or object with ``__cuda_stream__``, optional
            The legacy default stream by default.

        Returns
        -------
        Event
            This event.
        """
        cdef StreamHandle native = handle_of(stream)
        self.require_open()
        cdef int device = native.device
        if device < 0:
            device = self._device if self._device >= 0 else cuda_ordinal(None)
        if self.raw == NULL:
            self.create(device)
        elif device != self._device:
            raise InvalidProblem(
                f"event: expected a stream of cuda:{self._device}, got one of cuda:{device}; "
                "use one Event per device"
            )
        with nogil:
            _cuda.event_record(device, self.raw, native.raw)
        self.recorded = True
        return self

    def query(self):
        """Whether the work before the event is done; True when it was never recorded.

        Returns
        -------
        bool
        """
        cdef int done = 1
        self.require_open()
        if self.recorded:
            with nogil:
                _cuda.event_query(self.raw, &done)
        return bool(done)

    def synchronize(self):
        """Wait, without the GIL, until the work before the event is done."""
        self.require_open()
        if self.recorded:
            with nogil:
                _cuda.event_synchronize(self.raw)

    def elapsed_ms(self, start):
        """Milliseconds from `start` to this event; waits for both.

        Parameters
        ----------
        start : Event
            Recorded earlier, on the same device.

        Returns
        -------
        float

        Raises
        ------
        InvalidProblem
            One of the two was made without ``timing=True`` or never recorded.
        """
        cdef float ms = 0
        cdef Event first
        if not isinstance(start, Event):
            raise InvalidProblem(
                f"start: expected an Event, got {type(start).__name__}; record one with "
                "stream.record(Event(timing=True))"
            )
        first = start
        for event in (first, self):
            (<Event>event).require_open()
            if not ((<Event>event).timing and (<Event>event).recorded):
                raise InvalidProblem(
                    "event: expected two recorded events made with timing=True, got one that "
                    + (
                        "was never recorded; stream.record(event) does it"
                        if (<Event>event).timing else "has no timing; make it with timing=True"
                    )
                )
        with nogil:
            _cuda.event_synchronize(first.raw)
            _cuda.event_synchronize(self.raw)
            _cuda.event_elapsed_ms(first.raw, self.raw, &ms)
        return ms

    def close(self):
        """Give the event back. Using it afterwards is an error; closing twice is not."""
        self._closed = True
        self.destroy()

    def __enter__(self):
        self.require_open()
        return self

    def __exit__(self, *_):
        self.close()

    def __repr__(self):
        if self._closed:
            return "Event(closed)"
        where = f", device='cuda:{self._device}'" if self._device >= 0 else ""
        return f"Event(timing={bool(self.timing)}{where})"


def as_stream(stream=None):
    """The stream behind any object that is one.

    Parameters
    ----------
    stream : Stream, object with ``__cuda_stream__`` or None
        None stands for the legacy default stream.

    Returns
    -------
    Stream

    Raises
    ------
    InvalidProblem
        `stream` is not one, or is closed. Integers are refused: see `Stream.from_handle`.

    Examples
    --------
    >>> from baracuda_cy.stream import as_stream
    >>> as_stream()
    LEGACY_DEFAULT_STREAM
    """
    if type(stream) is Stream:
        (<Stream>stream).open_handle()
        return stream
    return LEGACY_DEFAULT_STREAM if stream is None else Stream.wrap(stream)


LEGACY_DEFAULT_STREAM = wrap_handle(borrow(<void*><uintptr_t>LEGACY, -1, None))
PER_THREAD_DEFAULT_STREAM = wrap_handle(borrow(<void*><uintptr_t>PER_THREAD, -1, None))
