# SPDX-License-Identifier: Apache-2.0
import gc
import threading
import time
import weakref

import numpy as np
import pytest

from baracuda_cy import (
    LEGACY_DEFAULT_STREAM,
    PER_THREAD_DEFAULT_STREAM,
    DeviceBuffer,
    Event,
    InvalidProblem,
    Stream,
    Unsupported,
    _cuda,
)
from baracuda_cy.stream import as_stream


class Foreign:
    """A stream of another library."""

    def __init__(self, answer):
        self.answer = answer

    def __cuda_stream__(self):
        return self.answer


# ---- without a GPU ---------------------------------------------------------------------------


def test_default_streams():
    assert LEGACY_DEFAULT_STREAM.__cuda_stream__() == (0, 1)
    assert PER_THREAD_DEFAULT_STREAM.__cuda_stream__() == (0, 2)
    assert repr(LEGACY_DEFAULT_STREAM) == "LEGACY_DEFAULT_STREAM"
    assert repr(PER_THREAD_DEFAULT_STREAM) == "PER_THREAD_DEFAULT_STREAM"
    for stream in (LEGACY_DEFAULT_STREAM, PER_THREAD_DEFAULT_STREAM):
        assert stream.device is None
        assert stream.priority == 0
        stream.close()
        assert not stream.closed
        assert as_stream(stream) is stream
    assert as_stream() is LEGACY_DEFAULT_STREAM


def test_from_handle():
    stream = Stream.from_handle(0x1234, device=np.int64(0))
    assert (stream.handle, stream.device) == (0x1234, 0)
    assert repr(stream) == "Stream.from_handle(0x1234, device='cuda:0')"
    assert Stream.from_handle(0).handle == 0
    stream.close()
    assert repr(stream) == "Stream(closed)"


@pytest.mark.parametrize("handle", [-1, 1 << 64, True, "7", 1.0, None], ids=repr)
def test_handles_that_are_none(handle):
    with pytest.raises(InvalidProblem, match="expected a handle that is an address"):
        Stream.from_handle(handle)


def test_wrap():
    foreign = Foreign((0, 2))
    assert Stream.wrap(foreign).handle == 2
    assert as_stream(foreign).handle == 2
    stream = Stream.from_handle(2)
    assert Stream.wrap(stream) is stream


def test_wrapped_streams_keep_their_owner():
    foreign = Foreign((0, 2))
    alive = weakref.ref(foreign)
    stream = Stream.wrap(foreign)
    owned = Stream.from_handle(2, owner=foreign)
    del foreign
    gc.collect()
    assert alive() is not None
    stream.close()
    assert alive() is not None
    del owned
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    ("stream", "error", "message"),
    [
        (7, InvalidProblem, r"got 7; wrap a raw handle with Stream\.from_handle"),
        (object(), InvalidProblem, r"an object with __cuda_stream__, got <object"),
        (
            Foreign((1, 2)),
            Unsupported,
            "version 0 of the __cuda_stream__ protocol, Foreign speaks 1",
        ),
        (Foreign(2), InvalidProblem, r"to give \(0, handle\), Foreign gave 2"),
        (Foreign((0, None)), InvalidProblem, "a handle that is an address, got None from Foreign"),
        (Foreign((0, -5)), InvalidProblem, "a handle that is an address, got -5 from Foreign"),
    ],
)
def test_what_is_no_stream(stream, error, message):
    with pytest.raises(error, match=message):
        Stream.wrap(stream)
    with pytest.raises(error, match=message):
        as_stream(stream)


def test_closed_streams_are_refused():
    stream = Stream.from_handle(0x1234, device=0)
    stream.close()
    stream.close()
    assert stream.closed
    for use in (
        lambda: stream.handle,
        lambda: stream.device,
        lambda: stream.priority,
        stream.synchronize,
        stream.query,
        stream.record,
        stream.__cuda_stream__,
        stream.__enter__,
        lambda: as_stream(stream),
        lambda: Event().record(stream),
        lambda: LEGACY_DEFAULT_STREAM.wait(stream),
    ):
        with pytest.raises(InvalidProblem, match="open Stream, got one that is closed"):
            use()


def test_default_streams_are_made_once():
    with pytest.raises(InvalidProblem, match="stream: expected to be made once"):
        LEGACY_DEFAULT_STREAM.__init__()
    assert LEGACY_DEFAULT_STREAM.handle == 1


@pytest.mark.parametrize("priority", [-0.9, True, "0", None], ids=repr)
def test_priorities_that_are_none(priority):
    with pytest.raises(InvalidProblem, match="priority: expected an integer"):
        Stream(priority=priority)


@pytest.mark.parametrize("timing", ["cuda:0", 1, None], ids=repr)
def test_timing_is_a_flag(timing):
    with pytest.raises(InvalidProblem, match="timing: expected True or False, got"):
        Event(timing)


def test_none_is_nothing_to_wait_for():
    with pytest.raises(InvalidProblem, match=r"event: expected an Event, .* got None; pass LEGACY"):
        PER_THREAD_DEFAULT_STREAM.wait(None)


def test_streams_are_context_managers():
    with Stream.from_handle(0x1234, device=0) as stream:
        assert not stream.closed
    assert stream.closed


@pytest.mark.parametrize("device", ["cpu", "gpu", "cuda:x", "cuda:-1", -1, 1.5, ...], ids=repr)
def test_devices_that_are_none(device):
    with pytest.raises(InvalidProblem, match="device: expected"):
        Stream(device)


def test_events_that_were_never_recorded():
    event = Event(timing=True)
    assert event.query()
    event.synchronize()
    assert event.device is None
    assert event.handle == 0
    assert repr(event) == "Event(timing=True)"
    with pytest.raises(InvalidProblem, match="never recorded"):
        event.elapsed_ms(event)
    with pytest.raises(InvalidProblem, match="has no timing"):
        event.elapsed_ms(Event())
    with pytest.raises(InvalidProblem, match="start: expected an Event, got int"):
        event.elapsed_ms(3)
    LEGACY_DEFAULT_STREAM.wait(event)


def test_closed_events_are_refused():
    event = Event()
    with event:
        pass
    assert event.closed
    event.close()
    assert repr(event) == "Event(closed)"
    for use in (event.query, event.synchronize, event.record, lambda: event.handle):
        with pytest.raises(InvalidProblem, match="open Event, got one that is closed"):
            use()
    with pytest.raises(InvalidProblem, match="open Event, got one that is closed"):
        LEGACY_DEFAULT_STREAM.wait(event)


def test_without_cuda_the_reason_is_given():
    reason = _cuda.why_unavailable()
    if reason is None:
        pytest.skip("there is a GPU here")
    assert 'device "cpu"' in reason
    for use in (Stream, Event().record, Stream.priority_range, lambda: Event(device="cuda:0")):
        with pytest.raises(Unsupported) as caught:
            use()
        assert reason in str(caught.value)


# ---- on a GPU --------------------------------------------------------------------------------


@pytest.fixture
def stream():
    with Stream() as stream:
        yield stream


class Slow:
    """Work that keeps a stream busy for a while: copies of one large buffer."""

    def __init__(self, stream):
        self.stream = stream
        self.buffer = DeviceBuffer(1 << 30, stream=stream)

    def start(self, times=20):
        for value in range(times):
            self.buffer.fill(value)


@pytest.mark.gpu
def test_streams(stream):
    assert stream.device == 0
    assert stream.handle > 2
    assert stream.__cuda_stream__() == (0, stream.handle)
    assert stream.priority == 0
    stream.synchronize()
    assert stream.query()
    assert Stream.from_handle(stream.handle).device == 0


@pytest.mark.gpu
def test_priorities():
    last, first = Stream.priority_range()
    assert first <= last
    for priority in (first, last):
        with Stream(priority=priority) as stream:
            assert stream.priority == priority
    with pytest.raises(InvalidProblem, match=rf"expected {first} \(first\) to {last} \(last\)"):
        Stream(priority=first - 1)
    with pytest.raises(InvalidProblem, match="priority: expected"):
        Stream(priority=10**20)


@pytest.mark.gpu
def test_devices():
    count = _cuda.device_count()
    for device in (0, np.int64(0), "cuda", "cuda:0", LEGACY_DEFAULT_STREAM, None):
        with Stream(device) as stream:
            assert stream.device == 0
            with Stream(stream) as other:
                assert other.device == 0
    with pytest.raises(InvalidProblem, match=f"from 0 to {count - 1}, .* got {count}"):
        Stream(count)
    with pytest.raises(InvalidProblem, match=f"from 0 to {count - 1}, .* got {count}"):
        Stream.from_handle(2, device=count)
    assert _cuda.device_name(0)
    assert _cuda.compute_capability(0) >= (7, 5)
    with pytest.raises(InvalidProblem, match="got 99"):
        _cuda.device_name(99)


@pytest.mark.gpu(real="an emulated one is done before a call returns")
def test_queries_tell_the_truth(stream):
    slow = Slow(stream)
    stream.synchronize()
    slow.start()
    event = stream.record()
    assert not stream.query()
    assert not event.query()
    event.synchronize()
    assert event.query()
    assert stream.query()


@pytest.mark.gpu(real="an emulated one is done before a call returns")
def test_waiting_orders_streams(stream):
    slow = Slow(stream)
    with Stream() as later:
        slow.start()
        later.wait(stream)
        assert not later.query()
        later.synchronize()
        assert stream.query()
        slow.start()
        later.wait(stream.record())
        assert not later.query()
        later.synchronize()
        assert stream.query()
    stream.synchronize()


@pytest.mark.gpu(real="an emulated one is done before a call returns")
def test_elapsed_time(stream):
    slow = Slow(stream)
    stream.synchronize()
    start = stream.record(Event(timing=True))
    began = time.perf_counter()
    slow.start()
    end = stream.record(Event(timing=True))
    elapsed = end.elapsed_ms(start)
    assert 0 < elapsed <= 1000 * (time.perf_counter() - began) * 1.1
    with pytest.raises(InvalidProblem, match="has no timing"):
        stream.record().elapsed_ms(start)


@pytest.mark.gpu(real="an emulated one is done before a call returns")
def test_synchronizing_releases_the_gil(stream):
    slow = Slow(stream)
    stream.synchronize()
    slow.start(100)
    counted, waiting = 0, threading.Event()

    def wait():
        waiting.set()
        stream.synchronize()

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait()
    while thread.is_alive():
        counted += 1
    thread.join()
    assert counted > 100


@pytest.mark.gpu
def test_closing_while_work_is_pending():
    stream = Stream()
    slow = Slow(stream)
    slow.start()
    stream.close()
    with pytest.raises(InvalidProblem, match="closed"):
        stream.synchronize()
    # The buffer still has its stream, and what was submitted completes.
    assert set(slow.buffer.copy_to_host()[:100]) == {19}


@pytest.mark.gpu
def test_streams_of_torch():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    theirs = torch.cuda.Stream()
    ours = Stream.wrap(theirs)
    assert ours.handle == theirs.cuda_stream
    assert ours.device == 0
    assert Stream.wrap(torch.cuda.default_stream()).handle == 0
    with Stream() as stream:
        assert torch.cuda.ExternalStream(stream.handle).query()


@pytest.mark.gpu
def test_streams_of_cupy():
    cupy = pytest.importorskip("cupy")
    theirs = cupy.cuda.Stream(non_blocking=True)
    ours = Stream.wrap(theirs)
    assert ours.handle == theirs.ptr
    assert ours.device == 0
    assert Stream.wrap(cupy.cuda.Stream.null).handle == 0


@pytest.mark.gpu
@pytest.mark.skipif("_cuda.device_count() < 2", reason="needs two GPUs")
def test_two_devices():
    with Stream(0) as first, Stream(1) as second:
        assert second.device == 1
        event = Event().record(first)
        second.wait(event)
        with pytest.raises(InvalidProblem, match="expected a stream of cuda:0, got one of cuda:1"):
            event.record(second)
        with pytest.raises(InvalidProblem, match="expected a stream of cuda:0, got one of cuda:1"):
            DeviceBuffer(16, stream=second, device=0)
        with DeviceBuffer(16, stream=second) as buffer:
            assert buffer.device == 1
