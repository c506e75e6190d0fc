# SPDX-License-Identifier: Apache-2.0
"""Arrays that a running kernel still reads, kept until its stream is done with them."""

from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF, Py_XDECREF
from libc.stdint cimport int32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

cimport baracuda_cy._cuda as _cuda
from baracuda_cy.stream cimport give_event, take_event
from baracuda_cy.view cimport KEEP_NOTHING, ArrayView, drop, release_view

import atexit
import os

__all__ = ["pending"]

cdef struct Kept:
    int32_t kind
    void* keep

cdef struct Pending:
    Pending* next
    void* event
    PyObject* owners
    int device
    int count
    bint done
    Kept kept[1]

cdef enum:
    MOST_PENDING = 256     # then the oldest is waited for
    MOST_UNFINISHED = 4    # that one poll asks about
    POLL_EVERY = 16        # acquired arrays

cdef Pending* pending_first = NULL
cdef Pending* pending_last = NULL
cdef int pending_count = 0
cdef int since_poll = 0


cdef int collect_now_and_then(void* stream, bint on_cuda_stream) except -1:
    global since_poll
    cdef int device = 0, capturing = 0
    since_poll += 1
    if since_poll < POLL_EVERY:
        return 0
    if on_cuda_stream:
        # What is released may use the legacy stream, which would end a capture.
        with nogil:
            if _cuda.get_device_quietly(&device) == 0:
                _cuda.stream_is_capturing(device, stream, &capturing)
        if capturing:
            return 0
    since_poll = 0
    collect()
    return 0


cdef void poll(Pending* entry) noexcept nogil:
    cdef int unfinished = 0
    while entry != NULL and unfinished < MOST_UNFINISHED:
        entry.done = _cuda.event_is_done(entry.event)
        unfinished += not entry.done
        entry = entry.next


cdef void wait_for(Pending* entry) noexcept nogil:
    if not entry.done:
        _cuda.event_synchronize_quietly(entry.event)
        entry.done = True


cdef Pending* take_pending() noexcept:
    """Take the whole list, so that nobody else changes it while the GIL is released."""
    global pending_first, pending_last, pending_count
    cdef Pending* first = pending_first
    pending_first = pending_last = NULL
    pending_count = 0
    return first


cdef void release_finished(Pending* entry) noexcept:
    """Put back what is unfinished, in front, and release the rest."""
    global pending_first, pending_last, pending_count
    cdef Pending* finished = NULL
    cdef Pending* last = NULL
    cdef Pending* first = NULL
    cdef Pending* following
    cdef int i
    while entry != NULL:
        following = entry.next
        if entry.done:
            entry.next = finished
            finished = entry
        else:
            entry.next = NULL
            if last != NULL:
                last.next = entry
            else:
                first = entry
            last = entry
            pending_count += 1
        entry = following
    if last != NULL:
        last.next = pending_first
        pending_first = first
        if pending_last == NULL:
            pending_last = last
    # Only now, with the list in order: releasing may run anybody's code, which may come back here.
    while finished != NULL:
        following = finished.next
        give_event(finished.device, finished.event)
        for i in range(finished.count):
            drop(finished.kept[i].kind, finished.kept[i].keep)
        Py_XDECREF(finished.owners)
        free(finished)
        finished = following


cdef int collect() except -1:
    cdef Pending* first = take_pending()
    if first != NULL:
        with nogil:
            poll(first)
        release_finished(first)
    return 0


cdef int make_room() except -1:
    cdef Pending* first
    while pending_count >= MOST_PENDING:
        first = take_pending()
        with nogil:
            wait_for(first)
            poll(first)
        release_finished(first)
    return 0


cdef int hold_until_done(
    ArrayView* views, int count, tuple owners, int device, void* stream
) except -1:
    global pending_first, pending_last, pending_count
    cdef Pending* entry = NULL
    cdef int i
    cdef int capturing = 0
    try:
        with nogil:
            _cuda.stream_is_capturing(device, stream, &capturing)
        if not capturing:
            make_room()
            collect()
            entry = <Pending*>calloc(1, sizeof(Pending) + count * sizeof(Kept))
            if entry == NULL:
                raise MemoryError()
            entry.event = take_event(device)
            entry.device = device
            with nogil:
                _cuda.event_record(device, entry.event, stream)
            Py_INCREF(owners)
            entry.owners = <PyObject*>owners
            for i in range(count):
                if views[i].keep_kind != KEEP_NOTHING:
                    entry.kept[entry.count].kind = views[i].keep_kind
                    entry.kept[entry.count].keep = views[i].keep
                    views[i].keep_kind = KEEP_NOTHING
                    entry.count += 1
            if pending_last != NULL:
                pending_last.next = entry
            else:
                pending_first = entry
            pending_last = entry
            pending_count += 1
    except BaseException:
        # Without an event there is only waiting.
        if entry != NULL:
            if entry.event != NULL:
                give_event(device, entry.event)
            free(entry)
        with nogil:
            _cuda.stream_synchronize_quietly(device, stream)
        raise
    finally:
        for i in range(count):
            release_view(&views[i])
            memset(&views[i], 0, sizeof(ArrayView))
    return 0


def pending():
    """Release the arrays whose kernels are done, and count the launches that still hold some.

    A launch holds its arrays when it runs on another stream than the one their library works on.
    Later calls look after that; this is for tests and for those who want memory back now.

    Returns
    -------
    int

    Examples
    --------
    >>> from baracuda_cy.pending import pending
    >>> pending()
    0
    """
    collect()
    return pending_count


def _drain():
    """Wait for what is pending, before the interpreter takes the arrays apart."""
    cdef Pending* first = take_pending()
    cdef Pending* entry = first
    with nogil:
        while entry != NULL:
            wait_for(entry)
            entry = entry.next
    release_finished(first)


def _forget():
    """Leave the parent's arrays and events to the parent, in a child that was just forked."""
    take_pending()


atexit.register(_drain)
os.register_at_fork(after_in_child=_forget)
