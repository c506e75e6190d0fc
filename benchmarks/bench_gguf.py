# SPDX-License-Identifier: Apache-2.0
"""Time packed GGUF weights times activations: format x shape x M, on a GPU or on the CPU.

    python benchmarks/bench_gguf.py --output benchmarks/results/h100.json
    python benchmarks/bench_gguf.py --formats Q4_K Q8_0 --shapes 4096x4096 --m 1 8 --quick
    python benchmarks/bench_gguf.py --device cpu

GPU: every sample replays a CUDA graph of calls that walk over copies of the weight, at least 256 MB
in all, so that no call finds its weight in the cache; reported is the median of 21 samples of at
least 4 ms. Each cell is timed twice: the *product* alone, its activations already staged, and the
whole *call*, float16 in and out. Beside it stand a kernel that only reads as many bytes, and
float16 torch.matmul where torch is installed. Needs CuPy.

CPU: the weights rotate over about 200 MB; one thread and two; float32 in and out.

64 rows of the last output of every cell are compared with a float64 product.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import harness
import native
import numpy as np
import render

import baracuda_cy as bcy

SHAPES = ("4096x4096", "14336x4096", "4096x14336", "128256x4096")
TILE_ROWS = 128  # rows that are really quantized; a weight repeats them, each copy from another on
ERROR_LIMIT = 2e-2  # staging costs 5e-3; anything near this is a wrong kernel


class Times(NamedTuple):
    """Seconds of one call."""

    median: float
    lowest: float


class Weights:
    """A quantized tile, and weights of any number of rows made of it.

    Parameters
    ----------
    block_format : str
        GGUF block format.
    ncols : int
        K.
    """

    def __init__(self, block_format: str, ncols: int) -> None:
        rng = np.random.default_rng(ncols)
        values = rng.standard_normal((TILE_ROWS, ncols), dtype=np.float32) * np.float32(0.02)
        packed = bcy.quantize(values, block_format)
        self.format = bcy.GgufBlockFormat(block_format)
        self.ncols = ncols
        self.tile = np.asarray(packed.data).view(np.uint8).reshape(TILE_ROWS, -1)
        self.exact = np.asarray(bcy.dequantize(packed, "float32")).astype(np.float64)

    def rows(self, nrows: int, copy: int) -> np.ndarray:
        """Return which row of the tile each row of a copy is."""
        return (np.arange(nrows) + 7 * copy) % TILE_ROWS

    def error(self, output: np.ndarray, activations: np.ndarray, copy: int) -> float:
        """Relative L2 distance of 64 rows of an output [M, nrows] from the float64 product."""
        nrows = output.shape[1]
        columns = np.linspace(0, nrows - 1, 64).astype(int)
        expected = activations.astype(np.float64) @ self.exact[self.rows(nrows, copy)[columns]].T
        difference = output[:, columns].astype(np.float64) - expected
        return float(np.linalg.norm(difference) / np.linalg.norm(expected))

    def descriptor(self, nrows: int, m: int, element: str) -> bcy.GgufMmvqMultiMDescriptor:
        return bcy.GgufMmvqMultiMDescriptor(
            nrows=nrows,
            ncols=self.ncols,
            m=m,
            block_format=self.format,
            activation=element,
            output=element,
        )

    def arguments(self, nrows: int, m: int, element: str, **addresses: int) -> native.MatmulArgs:
        return native.MatmulArgs(
            **addresses,
            nrows=nrows,
            ncols=self.ncols,
            m=m,
            x_stride=self.ncols,
            y_stride=nrows,
            format=int(self.format),
            x_type=native.ELEMENT[element],
            y_type=native.ELEMENT[element],
        )


def copies_for(nbytes: int, rotate: int) -> int:
    """Return how many buffers of `nbytes` make up `rotate` bytes: two at least."""
    return max(2, -(-rotate // nbytes))


def cell(
    device: str, kind: str, weights: Weights, nrows: int, m: int, times: Times, error: float
) -> dict[str, Any]:
    """Return one cell of the document; stop where the output was wrong."""
    nbytes = nrows * weights.tile.shape[1]
    if not error < ERROR_LIMIT:
        raise SystemExit(
            f"{weights.format.name} {nrows}x{weights.ncols} M={m} {kind}: "
            f"relative error {error:.3g}, expected below {ERROR_LIMIT}"
        )
    return {
        "device": device,
        "kind": kind,
        "format": weights.format.name,
        "nrows": nrows,
        "ncols": weights.ncols,
        "m": m,
        "bytes": nbytes,
        "us": round(times.median * 1e6, 3),
        "us_lowest": round(times.lowest * 1e6, 3),
        "gb_s": round(nbytes / times.median / 1e9, 1),
        "error": round(error, 6),
    }


# ---- GPU -----------------------------------------------------------------------------------------


class GpuTimer:
    """Times calls as replays of a CUDA graph on a stream of its own."""

    def __init__(self, samples: int, minimum: float) -> None:
        import cupy

        self.cupy, self.samples, self.minimum = cupy, samples, minimum
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.start, self.end = cupy.cuda.Event(), cupy.cuda.Event()

    def replays(
        self,
        launch: Callable[[], Any],
        nodes: int,
        samples: int | None = None,
        minimum: float | None = None,
    ) -> Times:
        """Time one of the `nodes` calls that one `launch` replays."""

        def sample(repeats: int) -> float:
            self.start.record(self.stream)
            for _ in range(repeats):
                launch()
            self.end.record(self.stream)
            self.end.synchronize()
            return self.cupy.cuda.get_elapsed_time(self.start, self.end) * 1e-3

        median, lowest, _ = harness.times_of(
            sample, samples=samples or self.samples, minimum=minimum or self.minimum
        )
        return Times(median / nodes, lowest / nodes)

    def calls(self, calls: list[Callable[[], Any]], **how: Any) -> Times:
        """Time one of `calls`, captured in the order given."""
        with self.stream:
            calls[0]()  # loads the kernel, which a capture must not
            self.stream.synchronize()
            self.stream.begin_capture()
            for call in calls:
                call()
            graph = self.stream.end_capture()
        return self.replays(lambda: graph.launch(self.stream), len(calls), **how)


class Ceilings:
    """What the memory gives: kernels that read, copy, or do nothing."""

    def __init__(self, timer: GpuTimer, rotate: int) -> None:
        import cupy

        self.cupy, self.timer, self.rotate = cupy, timer, rotate
        source = (Path(__file__).parent / "kernels.cu").read_text()
        self.module = cupy.RawModule(code=source, options=("-std=c++17",))
        self.sink = cupy.zeros(1, dtype=cupy.uint32)
        self.known: dict[int, tuple[float, str]] = {}

    def reader(self, each: int, threads: int, address: int, nbytes: int) -> Callable[[], Any]:
        kernel = self.module.get_function(f"read_{each}")
        count = nbytes // 16
        blocks = -(-count // (each * threads))
        arguments = (np.uintp(address), np.int64(count), self.sink)
        return lambda: kernel((blocks,), (threads,), arguments)

    def memory(self, nbytes: int):
        """Return bytes that no compression makes smaller."""
        words = self.cupy.arange(-(-nbytes // 4), dtype=self.cupy.uint32)
        words *= np.uint32(2654435761)
        return words.view(self.cupy.uint8)

    def read(self, nbytes: int) -> tuple[float, str]:
        """Seconds of the fastest kernel that only reads so many bytes, others each time; its name.

        Parameters
        ----------
        nbytes : int
            Bytes of one weight.
        """
        if nbytes not in self.known:
            copies = copies_for(nbytes, self.rotate)
            step = -(-nbytes // 256) * 256
            memory = self.memory(copies * step)
            self.cupy.cuda.Device().synchronize()

            def calls(each: int, threads: int) -> list[Callable[[], Any]]:
                starts = range(memory.data.ptr, memory.data.ptr + copies * step, step)
                return [self.reader(each, threads, start, nbytes) for start in starts]

            rough = {
                (each, threads): self.timer.calls(calls(each, threads), samples=3, minimum=5e-4)
                for each in (1, 2, 4, 8)
                for threads in (256, 512)
            }
            best = min(rough, key=rough.__getitem__)
            name = f"{best[0]} x 16 B a thread, blocks of {best[1]}"
            self.known[nbytes] = self.timer.calls(calls(*best)).median, name
        return self.known[nbytes]

    def summary(self) -> dict[str, float]:
        """Return the figures of large transfers and of an empty kernel."""
        free = self.cupy.cuda.runtime.memGetInfo()[0]
        nbytes = min(4 << 30, free // 4 & ~0xFFF)
        source, target = self.memory(nbytes), self.memory(nbytes)
        self.cupy.cuda.Device().synchronize()
        count = nbytes // 16
        copy = self.module.get_function("copy")
        empty = self.module.get_function("empty")
        grid, block = (-(-count // 512),), (512,)
        copied = self.timer.calls([lambda: copy(grid, block, (source, np.int64(count), target))])
        read = min(
            self.timer.calls([self.reader(each, threads, source.data.ptr, nbytes)])
            for each in (2, 4)
            for threads in (256, 512)
        )
        nothing = self.timer.calls([lambda: empty((1,), (32,), ())] * 256)
        return {
            "bytes": nbytes,
            "read_gb_s": round(nbytes / read.median / 1e9, 1),
            "copy_gb_s": round(2 * nbytes / copied.median / 1e9, 1),
            "empty_node_us": round(nothing.median * 1e6, 3),
        }


def dense_seconds(
    timer: GpuTimer, nrows: int, ncols: int, ms: list[int], rotate: int
) -> dict[int, float]:
    """float16 torch.matmul over dense weights of this shape, by M; empty without torch."""
    try:
        import torch
    except ImportError:
        return {}
    copies = copies_for(2 * nrows * ncols, rotate)
    weights = [torch.randn(nrows, ncols, device="cuda", dtype=torch.float16) for _ in range(copies)]
    stream = torch.cuda.ExternalStream(timer.stream.ptr)

    def one(m: int) -> float:
        x = torch.randn(m, ncols, device="cuda", dtype=torch.float16)
        y = torch.empty(m, nrows, device="cuda", dtype=torch.float16)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.matmul(x, weights[0].T, out=y)  # chooses the kernel, makes cuBLAS' workspace
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for weight in weights:
                torch.matmul(x, weight.T, out=y)

        def launch() -> None:
            with torch.cuda.stream(stream):
                graph.replay()

        return timer.replays(launch, copies).median

    result = {m: one(m) for m in ms}
    weights.clear()
    torch.cuda.empty_cache()
    return result


def gpu_times(
    timer: GpuTimer, functions: native.Native, weights: Weights, nrows: int, m: int, packed: list
) -> Iterator[tuple[str, Times, float]]:
    """Yield kind, times and error of the call, then of the product on what the call staged."""
    import cupy

    rng = np.random.default_rng(m)
    host = rng.standard_normal((m, weights.ncols), dtype=np.float32).astype(np.float16)
    x, y = cupy.asarray(host), cupy.empty((m, nrows), dtype=cupy.float16)
    plan = bcy.GgufMmvqMultiMPlan.select("cuda:0", weights.descriptor(nrows, m, "float16"))
    workspace = cupy.empty(plan.workspace_size, dtype=cupy.uint8)
    stream = bcy.Stream.from_handle(timer.stream.ptr, device=0, owner=timer.stream)
    arguments = [
        weights.arguments(
            nrows,
            m,
            "float16",
            weight=w.data.ptr,
            x=x.data.ptr,
            y=y.data.ptr,
            workspace=workspace.data.ptr,
        )
        for w in packed
    ]

    def call(w) -> Callable[[], Any]:
        return lambda: plan.run(w, x, y, workspace=workspace, stream=stream)

    def product(a: native.MatmulArgs) -> Callable[[], Any]:
        return lambda: functions.matmul(native.address(a), timer.stream.ptr)

    for kind, calls in (
        ("call", [call(w) for w in packed]),
        ("product", [product(a) for a in arguments]),
    ):
        y.fill(0)
        cupy.cuda.Device().synchronize()
        times = timer.calls(calls)
        yield kind, times, weights.error(y.get(), host, len(packed) - 1)


def bench_gpu(result: dict[str, Any], options: argparse.Namespace) -> None:
    try:
        import cupy
    except ImportError:
        raise SystemExit("The GPU benchmark needs CuPy: pip install 'cupy-cuda13x[ctk]'") from None

    from baracuda_cy import _cuda

    settings = result["settings"]
    rotate = settings["rotate_bytes"]
    timer = GpuTimer(settings["samples"], settings["sample_ms"] * 1e-3)
    ceilings = Ceilings(timer, rotate)
    functions = native.Native("cuda")
    pool = cupy.get_default_memory_pool()

    result["machine"]["gpu"] = (result["machine"]["gpu"] or {"name": _cuda.device_name(0)}) | {
        "architectures": list(_cuda.architectures()),
        "cuda_runtime": cupy.cuda.runtime.runtimeGetVersion(),
        "cuda_driver": cupy.cuda.runtime.driverGetVersion(),
        "multiprocessors": cupy.cuda.Device(0).attributes["MultiProcessorCount"],
    }
    result["ceilings"] = ceilings.summary()
    pool.free_all_blocks()

    progress = harness.Progress(len(options.shapes) * len(options.formats))
    for shape in options.shapes:
        nrows, ncols = map(int, shape.split("x"))
        dense = dense_seconds(timer, nrows, ncols, options.m, rotate)
        for block_format in options.formats:
            weights = Weights(block_format, ncols)
            nbytes = nrows * weights.tile.shape[1]
            read, reader = ceilings.read(nbytes)
            pool.free_all_blocks()
            tile = cupy.asarray(weights.tile)
            packed = [
                tile[cupy.asarray(weights.rows(nrows, i))].ravel()
                for i in range(copies_for(nbytes, rotate))
            ]
            for m in options.m:
                for kind, times, error in gpu_times(timer, functions, weights, nrows, m, packed):
                    one = cell("cuda", kind, weights, nrows, m, times, error)
                    one["read_us"] = round(read * 1e6, 3)
                    one["read_kernel"] = reader
                    one["percent_of_read"] = round(100 * read / times.median, 1)
                    if dense:
                        one["dense_us"] = round(dense[m] * 1e6, 3)
                        one["dense_ratio"] = round(dense[m] / times.median, 3)
                    result["cells"].append(one)
            packed.clear()
            pool.free_all_blocks()
            progress.step(f"{shape} {block_format}")


# ---- CPU -----------------------------------------------------------------------------------------


def cpu_times(
    settings: dict[str, Any],
    functions: native.Native,
    weights: Weights,
    nrows: int,
    m: int,
    threads: int,
    packed: list[np.ndarray],
) -> Iterator[tuple[str, Times, float]]:
    """Yield kind, times and error of the call, then of the product on what the call staged."""
    x = np.random.default_rng(m).standard_normal((m, weights.ncols), dtype=np.float32)
    y = np.zeros((m, nrows), dtype=np.float32)
    plan = bcy.GgufMmvqMultiMPlan.select(
        "cpu", weights.descriptor(nrows, m, "float32"), bcy.PlanPreference(threads=threads)
    )
    workspace = bcy.Workspace(plan.workspace_size, device="cpu")
    arguments = [
        weights.arguments(
            nrows,
            m,
            "float32",
            weight=w.ctypes.data,
            x=x.ctypes.data,
            y=y.ctypes.data,
            workspace=workspace.ptr,
        )
        for w in packed
    ]

    def call(i: int) -> None:
        plan.run(packed[i], x, y, workspace=workspace)

    def product(i: int) -> None:
        functions.matmul(native.address(arguments[i]), threads)

    for kind, run in (("call", call), ("product", product)):
        y.fill(0)
        at = 0

        def sample(repeats: int, run=run) -> float:
            nonlocal at
            start = time.perf_counter()
            for i in range(at, at + repeats):
                run(i % len(packed))
            spent = time.perf_counter() - start
            at += repeats
            return spent

        minimum = settings["sample_ms"] * 1e-3
        median, lowest, _ = harness.times_of(sample, samples=settings["samples"], minimum=minimum)
        yield kind, Times(median, lowest), weights.error(y, x, (at - 1) % len(packed))


def bench_cpu(result: dict[str, Any], options: argparse.Namespace) -> None:
    from baracuda_cy import _cpu

    settings = result["settings"]
    functions = native.Native("cpu")
    result["machine"]["isa"] = _cpu.isa()
    progress = harness.Progress(len(options.shapes) * len(options.formats))
    for shape in options.shapes:
        nrows, ncols = map(int, shape.split("x"))
        for block_format in options.formats:
            weights = Weights(block_format, ncols)
            copies = copies_for(nrows * weights.tile.shape[1], settings["rotate_bytes"])
            packed = [weights.tile[weights.rows(nrows, i)].ravel() for i in range(copies)]
            for m in options.m:
                for threads in options.threads:
                    for kind, times, error in cpu_times(
                        settings, functions, weights, nrows, m, threads, packed
                    ):
                        one = cell("cpu", kind, weights, nrows, m, times, error)
                        result["cells"].append(one | {"threads": threads})
            progress.step(f"{shape} {block_format}")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    every = [f.name for f in bcy.GgufBlockFormat]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.common_arguments(parser)
    parser.add_argument("--formats", nargs="+", default=every, choices=every, metavar="FORMAT")
    parser.add_argument("--shapes", nargs="+", metavar="NROWSxNCOLS")
    parser.add_argument("--m", nargs="+", type=int)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="CPU backend")
    parser.add_argument("--rotate", type=int, metavar="MB", help="of weight copies to walk over")
    options = parser.parse_args(arguments)

    device = harness.choose_device(options.device)
    cuda = device == "cuda"
    options.shapes = options.shapes or list(SHAPES if cuda else SHAPES[:1])
    options.m = options.m or ([1, 2, 4, 8, 16, 32] if cuda else [1, 8])
    settings = {
        "samples": 5 if options.quick else 21,
        "sample_ms": 1.0 if options.quick else 4.0,
        "rotate_bytes": (options.rotate or (256 if cuda else 200)) * 10**6,
        "element": "float16" if cuda else "float32",
        "quick": options.quick,
    }
    result = harness.document("gguf", settings, harness.machine(options.commit))
    (bench_gpu if cuda else bench_cpu)(result, options)
    if options.output:
        harness.save(result, options.output)
    print(render.tables(harness.check(result)))
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
