# SPDX-License-Identifier: Apache-2.0
import copy
import gc
import os
import pickle
import sys
import threading
import weakref

import numpy as np
import pytest
from problems import child
from producers import LegacyProducer, Producer, held

import baracuda_cy as bcy
from baracuda_cy import DeviceArray, DeviceBuffer, Event, PinnedBuffer, Stream, Workspace
from baracuda_cy.allocation import empty_like
from baracuda_cy.dlpack import describe, inspect
from baracuda_cy.pending import pending

# ---- what a look at an array leaves behind ---------------------------------------------------


class Watched(np.ndarray):
    pass


def frameworks():
    def numpy():
        return np.zeros(4).view(Watched)

    def torch():
        return pytest.importorskip("torch").zeros(4)

    def jax():
        return pytest.importorskip("jax").numpy.zeros(4) + 1

    def producer():
        return Producer(np.zeros(4))

    return [numpy, torch, jax, producer]


@pytest.mark.parametrize("make", frameworks(), ids=lambda make: make.__name__)
def test_arrays_are_let_go(make):
    array = make()
    references = sys.getrefcount(array)
    for _ in range(100):
        inspect(array)
        describe(array)
    assert sys.getrefcount(array) == references
    alive = weakref.ref(array)
    del array
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("make", frameworks(), ids=lambda make: make.__name__)
def test_prototypes_are_let_go(make):
    prototype = make()
    references = sys.getrefcount(prototype)
    results = [empty_like(prototype, (3,), "f32") for _ in range(10)]
    assert sys.getrefcount(prototype) == references
    assert len({describe(result) for result in results}) == 1


@pytest.mark.parametrize("kind", [Producer, LegacyProducer])
def test_deleters_are_called_once(kind):
    producer = kind(np.zeros(4))
    for expected in range(1, 50):
        inspect(producer)
        assert producer.exported == producer.deleted == expected


@pytest.mark.parametrize("kind", [Producer, LegacyProducer])
def test_workspaces_hold_what_they_borrow(kind):
    producer = kind(np.zeros(1024))
    workspace = Workspace(buffer=producer)
    assert (producer.exported, producer.deleted) == (1, 0)
    alive = weakref.ref(producer)
    with workspace:
        inspect(workspace)
        assert (producer.exported, producer.deleted) == (2, 1)
    assert producer.deleted == 2
    del workspace
    assert producer.deleted == 2
    del producer
    gc.collect()
    assert alive() is None


def test_scales_that_a_weight_makes_when_asked_are_held():
    made, seen = [], []

    class Fresh(bcy.Nf4Tensor):
        __slots__ = ("_scales",)

        @property
        def absmax(self):
            scales = self._scales.copy().view(Watched)
            made.append(weakref.ref(scales))
            return scales

        @absmax.setter
        def absmax(self, scales):
            object.__setattr__(self, "_scales", scales)

    class Asks(Producer):
        def __dlpack__(self, **arguments):
            seen.append(made[-1]() is not None)
            if not seen[-1]:
                raise RuntimeError("the scales are gone")
            return super().__dlpack__(**arguments)

    w = bcy.quantize(np.eye(64, dtype=np.float32), "nf4")
    fresh = Fresh(w.data, w.absmax, w.shape)
    x, y, bias = (np.ones(shape, np.float32) for shape in ((1, 64), (1, 64), 64))
    bcy.linear(x, fresh, bias=Asks(bias))
    fresh.plan(activation="float32").run(fresh, Asks(x), y)
    bcy.Nf4DequantizePlan.select("cpu", bcy.Nf4Descriptor(n=64, k=64, output="float32")).run(
        fresh, Asks(np.empty((64, 64), np.float32))
    )
    assert seen == [True] * 3


def test_a_deleter_may_look_at_arrays_itself():
    seen = []
    producer = Producer(np.zeros(4))
    producer.account.then = lambda: seen.append(describe(np.zeros(2)))
    inspect(producer)
    assert seen == ["float64[2] on cpu"]


def test_an_error_survives_a_deleter():
    class Refuses(Producer):
        def tensor(self):
            tensor, *memory = super().tensor()
            tensor.ndim = 9
            return tensor, *memory

    producer = Refuses(np.zeros(4))
    with pytest.raises(ValueError, match="got 9"):
        inspect(producer)
    assert producer.deleted == 1


@pytest.mark.parametrize(
    "thing", [Workspace(64), Stream.from_handle(7, device=0), Event()], ids=repr
)
def test_nothing_is_copied_by_pickle(thing):
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            duplicate(thing)


def test_workspaces_can_be_collected_in_cycles():
    class Holder:
        pass

    holder = Holder()
    holder.workspace = Workspace(64)
    holder.again = holder
    alive = weakref.ref(holder.workspace)
    del holder
    gc.collect()
    assert alive() is None


def test_a_tensor_may_keep_its_own_workspace():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensor = torch.zeros(1024)
    tensor.workspace = Workspace(buffer=tensor)
    alive = weakref.ref(tensor.workspace)
    inspect(tensor.workspace)
    del tensor
    gc.collect()
    assert alive() is None


def test_threads_share_arrays():
    arrays = [np.arange(12).reshape(3, 4), b"bytes", Producer(np.zeros(5)), Workspace(64)]
    failures = []

    def look():
        try:
            for _ in range(300):
                for array in arrays:
                    inspect(array)
                kind = type("Producer", (LegacyProducer,), {})
                inspect(kind(np.zeros(2)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert arrays[2].exported == arrays[2].deleted == 8 * 300


# ---- the process -----------------------------------------------------------------------------


def test_shutdown_with_objects_alive():
    child(
        """
        import numpy as np
        from producers import Producer
        from baracuda_cy import LEGACY_DEFAULT_STREAM, Event, Stream, Workspace
        from baracuda_cy.dlpack import inspect

        class Cycle:
            pass

        producer = Producer(np.zeros(1024))
        kept = [Workspace(64), Workspace(buffer=bytearray(64)), Workspace(buffer=producer)]
        kept += [Event(), Stream.from_handle(7, device=0), LEGACY_DEFAULT_STREAM]
        cycle = Cycle()
        cycle.self, cycle.kept = cycle, kept
        inspect(kept[0])
        """
    )


def test_import_touches_no_driver():
    out = child(
        """
        import sys, baracuda_cy
        from pathlib import Path
        print("libcuda.so" in Path("/proc/self/maps").read_text())
        print(sorted({"torch", "jax", "cupy", "ml_dtypes"} & set(sys.modules)))
        """
    )
    assert out.split("\n")[:2] == ["False", "[]"]


FORK = """
    import os
    import sys
    import warnings
    import numpy as np
    from producers import Producer
    from baracuda_cy import Workspace
    from baracuda_cy.dlpack import inspect
    from baracuda_cy.pending import pending

    warnings.simplefilter("ignore")
    kept = [Workspace(buffer=Producer(np.zeros(1024))), Workspace(64)]
    {before}
    child = os.fork()
    if child == 0:
        assert inspect(np.zeros(3))["shape"] == (3,)
        assert pending() == 0
        {inside}
        del kept
        sys.exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    {after}
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_fork():
    child(FORK.format(before="", inside="", after="inspect(kept[0])"))


# ---- on a GPU --------------------------------------------------------------------------------


@pytest.mark.gpu(real="an emulated one outlives a fork")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_fork_leaves_the_parents_cuda_alone():
    child(
        FORK.format(
            before="""
    from baracuda_cy import DeviceBuffer, Event, PinnedBuffer, Stream, Unsupported
    stream = Stream()
    buffer = DeviceBuffer.from_host(b"parent", stream=stream)
    event, pinned = stream.record(), PinnedBuffer(64)
    """,
            inside="""
        try:
            Stream()
        except Unsupported as error:
            assert "spawn" in str(error), error
        else:
            raise AssertionError("a forked child has no CUDA")
        del stream, buffer, event, pinned
        """,
            after="""
    event.synchronize()
    stream.synchronize()
    assert bytes(buffer.copy_to_host()) == b"parent"
    memoryview(pinned)[0] = 1
    """,
        )
    )


@pytest.mark.gpu
def test_shutdown_with_cuda_objects_alive():
    child(
        """
        import numpy as np
        from baracuda_cy import DeviceArray, DeviceBuffer, Event, PinnedBuffer, Stream, Workspace

        class Cycle:
            pass

        stream = Stream()
        pinned = PinnedBuffer(64 << 20)
        buffer = DeviceBuffer(64 << 20, stream=stream)
        for _ in range(50):
            buffer.copy_from_host(pinned)       # still under way when the interpreter ends
        kept = [stream.record(), Event(timing=True), DeviceArray((4,), "f32", buffer)]
        kept += [Workspace(100, stream=stream), buffer.__dlpack__(), memoryview(pinned)]
        cycle = Cycle()
        cycle.self, cycle.kept = cycle, kept
        """
    )


ORDERS = [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("closing", [False, True], ids=["deleted", "closed"])
def test_any_order_of_deletion(order, closing):
    gc.collect()
    before = held("device")
    stream = Stream()
    buffer = DeviceBuffer(1 << 20, stream=stream)
    objects = [stream, buffer, DeviceArray((1 << 10,), "f32", buffer), stream.record()]
    capsule = buffer.__dlpack__(stream=-1)
    del stream, buffer
    for i in order:
        if closing and hasattr(objects[i], "close"):
            objects[i].close()
        objects[i] = None
    gc.collect()
    assert held("device") == before + (1 << 20)  # the capsule has it
    del capsule
    assert held("device") == before


@pytest.mark.gpu
def test_exported_memory_outlives_its_buffer():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    before = held("device")
    with Stream() as stream, DeviceBuffer(1 << 20, stream=stream) as buffer:
        t = torch.from_dlpack(buffer.fill(7))
    assert held("device") == before + (1 << 20)
    for _ in range(10):
        DeviceBuffer(1 << 20).fill(9)
    assert int(t.min()) == int(t.max()) == 7
    del t
    gc.collect()
    assert held("device") == before


@pytest.mark.gpu
def test_memory_is_not_reused_while_a_consumer_reads_it():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    n = 1 << 20
    with Stream() as ours, torch.cuda.stream(torch.cuda.Stream()):
        for value in range(20):
            buffer = DeviceBuffer(n, stream=ours).fill(value)
            t = torch.from_dlpack(buffer)
            torch.cuda._sleep(5_000_000)
            result = t.clone()  # reads after the sleep
            del t, buffer  # the last references go while the read is still ahead
            other = DeviceBuffer(n, stream=ours).fill(255)
            assert int(result.max()) == value
            del other


@pytest.mark.gpu
def test_host_sources_are_released_after_the_copy():
    with Stream() as stream:
        n = 64 << 20
        buffer, pinned = DeviceBuffer(n, stream=stream), PinnedBuffer(n)
        producer = Producer(np.frombuffer(pinned, np.uint8))
        for _ in range(10):
            buffer.copy_from_host(producer)
        assert producer.exported == 10
        stream.synchronize()
        assert pending() == 0
        assert producer.deleted == 10


@pytest.mark.gpu
def test_what_is_released_may_fill_the_table_of_types():
    class Crowd(np.ndarray):
        def __del__(self):
            for i in range(600):
                describe(type(f"Kind{i}", (), {})())

    stream = Stream()
    DeviceBuffer(64).copy_from_host(
        np.frombuffer(PinnedBuffer(64), np.uint8).view(Crowd), stream=stream
    )
    stream.synchronize()
    for _ in range(32):
        assert inspect(b"bytes")["shape"] == (5,)
    assert pending() == 0


@pytest.mark.gpu
def test_pending_is_bounded():
    with Stream() as stream:
        n = 1 << 20
        buffer, pinned = DeviceBuffer(n, stream=stream), PinnedBuffer(n)
        producer = Producer(np.frombuffer(pinned, np.uint8))
        for _ in range(2000):
            buffer.copy_from_host(producer)
            assert producer.exported - producer.deleted <= 257
        stream.synchronize()
        assert pending() == 0
        assert producer.deleted == 2000


@pytest.mark.gpu
def test_threads_make_and_drop_memory():
    before = held("device")
    failures = []

    def churn(seed):
        try:
            rng = np.random.default_rng(seed)
            with Stream() as stream:
                for _ in range(50):
                    data = rng.integers(0, 256, 10_000, np.uint8)
                    buffer = DeviceBuffer.from_host(data, stream=stream)
                    event = stream.record(Event())
                    assert bytes(buffer.copy_to_host()) == data.tobytes()
                    event.synchronize()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    gc.collect()
    assert held("device") == before


@pytest.mark.gpu
def test_ordering_inside_a_capture():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    t = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    buffer = DeviceBuffer(1 << 20)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        current = torch.cuda.current_stream()
        t += 1
        # torch is capturing on this very stream: nothing to order, and nothing breaks the capture.
        assert not inspect(t, current)["foreign_order"]
        # Our buffer's stream is not in the capture; what it was used for must be done before.
        assert inspect(buffer, current)["foreign_order"]
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert int(t.max()) == 3


@pytest.mark.gpu
def test_scratch_outlives_the_stream_it_was_used_on():
    weight = np.random.default_rng(0).standard_normal((64, 512), np.float32)
    w = bcy.quantize(weight, "Q8_0").to("cuda")
    x = DeviceArray.from_host(np.ones((3, 512), np.float32))
    want = bcy.linear(x, w).to_host()
    for _ in range(50):
        stream = Stream()
        y = bcy.linear(x, w, stream=stream)
        stream.close()
        del stream
        np.testing.assert_array_equal(y.to_host(), want)
    while pending():
        pass


@pytest.mark.gpu
def test_jax_results_outlive_the_stream_they_were_made_on():
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("this jax has no GPU")
    weight = np.random.default_rng(0).standard_normal((64, 512), np.float32)
    w = bcy.quantize(weight, "Q8_0").to("cuda")
    x = jax.numpy.ones((3, 512), "float32")
    want = np.asarray(bcy.linear(x, w))
    for _ in range(50):
        stream = Stream()
        y = bcy.linear(x, w, stream=stream)
        stream.close()
        del stream
        np.testing.assert_array_equal(np.asarray(y), want)
        del y
    while pending():
        pass
