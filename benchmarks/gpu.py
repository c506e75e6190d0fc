# SPDX-License-Identifier: Apache-2.0
"""What benchmarks of products share: weights made of a tile, calls timed as CUDA graphs, and what
the memory gives at best, measured in the same process.

Nothing here needs a GPU, CuPy or torch before it is asked for.
"""

import argparse
import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
import native
import numpy as np
from harness import Times

import baracuda_cy as bcy

TILE_ROWS = 128  # rows that are really quantized; a weight repeats them, each copy from another on
GRAPH_CALLS = 32  # in a CUDA graph at least: between two graphs nothing overlaps
LARGE = 1 << 30  # bytes that show what the memory gives


class Tile:
    """Rows that are really quantized, of which weights of any number of rows are made.

    Parameters
    ----------
    exact : numpy.ndarray
        [TILE_ROWS, ncols] float64, the values of the packed rows.
    step : int
        Rows by which each copy begins further on.
    """

    def __init__(self, exact: np.ndarray, step: int) -> None:
        self.exact, self.step = exact, step
        self.ncols = exact.shape[1]

    def rows(self, nrows: int, copy: int) -> np.ndarray:
        """Return which row of the tile each row of a copy is."""
        return (np.arange(nrows) + self.step * copy) % TILE_ROWS

    def checked(self, nrows: int, copy: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the 64 rows of a copy that are checked: their numbers, and their weights."""
        picked = np.linspace(0, nrows - 1, 64).astype(int)
        return picked, self.exact[self.rows(nrows, copy)[picked]]

    def error(self, output: np.ndarray, activations: np.ndarray, copy: int) -> float:
        """Relative L2 distance of 64 rows of an output [M, nrows] from the float64 product."""
        picked, exact = self.checked(output.shape[1], copy)
        return distance(output[:, picked], activations.astype(np.float64) @ exact.T)


def gaussian(ncols: int) -> np.ndarray:
    """Return a tile in float32, a product with which is as large as its activations."""
    values = np.random.default_rng(ncols).standard_normal((TILE_ROWS, ncols), dtype=np.float32)
    values *= np.float32(ncols**-0.5)
    return values


def distance(output: np.ndarray, exact: np.ndarray) -> float:
    """Relative L2 distance of an output from what it should be."""
    return float(np.linalg.norm(output.astype(np.float64) - exact) / np.linalg.norm(exact))


def copies_for(nbytes: int, rotate: int) -> int:
    """Return how many buffers of `nbytes` make up `rotate` bytes: two at least."""
    return max(2, -(-rotate // nbytes))


def floats(bits: np.ndarray, element: str) -> np.ndarray:
    """Return the values of two-byte floats."""
    if element == "float16":
        return bits.view(np.float16)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def measured(
    device: str,
    kind: str,
    names: dict[str, str],
    shape: tuple[int, int],
    m: int,
    times: Times,
    nbytes: int,
    error: float,
    limit: float,
) -> dict[str, Any]:
    """Return a cell of a document, all but its error; stop where the output was wrong.

    Parameters
    ----------
    names : dict
        What else the cell is of, beside its kind; the first says best what it is.
    nbytes : int
        Bytes of weights, packed or dense, that are read or written.
    error, limit : float
        Relative L2 distance of the output from what it should be, and what it has to be below.
    """
    nrows, ncols = shape
    first, *others = names.values()
    if not error < limit:
        what = " ".join((first, f"{nrows}x{ncols}", f"M={m}", kind, *others))
        raise SystemExit(f"{what}: relative error {error:.3g}, expected below {limit}")
    return {
        "device": device,
        "kind": kind,
        **names,
        "nrows": nrows,
        "ncols": ncols,
        "m": m,
        "bytes": nbytes,
        "us": round(times.median * 1e6, 3),
        "us_lowest": round(times.lowest * 1e6, 3),
        "gb_s": round(nbytes / times.median / 1e9, 1),
    }


class GpuTimer:
    """Times calls as replays of a CUDA graph on a stream of its own."""

    def __init__(self, samples: int, minimum: float) -> None:
        try:
            import cupy
        except ImportError:
            raise SystemExit(
                "The GPU benchmark needs CuPy: pip install 'cupy-cuda13x[ctk]'"
            ) from None
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
        """Time one of `calls`, captured in the order given, in as many rounds as make a graph."""
        calls = calls * rounds_of(calls)
        with self.stream:
            calls[0]()  # loads the kernel, which a capture must not
            self.stream.synchronize()
            self.stream.begin_capture()
            for call in calls:
                call()
            graph = self.stream.end_capture()
        return self.replays(lambda: graph.launch(self.stream), len(calls), **how)

    def torch_calls(self, calls: Sequence[Callable[[], Any]]) -> Times:
        """The same for calls of torch, which allocates in graphs of its own making alone."""
        import torch

        calls = list(calls) * rounds_of(calls)
        stream = torch.cuda.ExternalStream(self.stream.ptr)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            calls[0]()  # chooses the kernel, makes cuBLAS' workspace
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()

        def launch() -> None:
            with torch.cuda.stream(stream):
                graph.replay()

        return self.replays(launch, len(calls))


def rounds_of(calls: Sequence[Any]) -> int:
    """Return how often to go through `calls` for one graph."""
    return -(-GRAPH_CALLS // len(calls))


class Ceilings:
    """What the memory gives: kernels that read, copy, or do nothing."""

    def __init__(self, timer: GpuTimer, rotate: int) -> None:
        import cupy

        self.cupy, self.timer, self.rotate = cupy, timer, rotate
        source = (Path(__file__).parent / "kernels.cu").read_text()
        self.module = cupy.RawModule(code=source, options=("-std=c++17",))
        self.driver = native.Driver()
        self.sink = cupy.zeros(1, dtype=cupy.uint32)
        self.buffers: dict[str, Any] = {}
        self.known: dict[tuple[Any, ...], tuple[float, str]] = {}

    def launches(
        self, name: str, blocks: int, threads: int, overlap: bool, *arguments: Any
    ) -> Callable[[], Any]:
        function, stream = self.module.get_function(name).kernel.ptr, self.timer.stream.ptr
        launch = self.driver.launch
        return lambda: launch(function, blocks, threads, arguments, stream, overlap)

    def buffer(self, name: str, nbytes: int, copies: int) -> list[int]:
        """Return where `copies` buffers begin, of bytes that no compression makes smaller."""
        step = -(-nbytes // 256) * 256
        if name not in self.buffers or self.buffers[name].nbytes < copies * step:
            self.buffers.pop(name, None)
            words = self.cupy.arange(copies * step // 4, dtype=self.cupy.uint32)
            words *= np.uint32(2654435761)
            self.buffers[name] = words
            self.cupy.cuda.Device().synchronize()
        start = self.buffers[name].data.ptr
        return list(range(start, start + copies * step, step))

    def fastest(
        self, key: tuple[Any, ...], variants: Callable[[int, int], list[Callable[[], Any]]]
    ) -> tuple[float, str]:
        """Return seconds and name of the fastest variant: vectors a thread, threads a block."""
        if key not in self.known:
            most = 4 if key[0] == "copy" else 8
            shapes = [(n, threads) for n in (1, 2, 4, 8) if n <= most for threads in (256, 512)]
            rough = {
                shape: self.timer.calls(variants(*shape), samples=3, minimum=5e-4)
                for shape in shapes
            }
            each, threads = min(rough, key=rough.__getitem__)
            name = f"{each} x 16 B a thread, blocks of {threads}"
            self.known[key] = self.timer.calls(variants(each, threads)).median, name
        return self.known[key]

    def read(self, nbytes: int, overlap: bool) -> tuple[float, str]:
        """Seconds of the fastest kernel that only reads so many bytes, others each time; its name.

        Parameters
        ----------
        nbytes : int
            Bytes of one weight.
        overlap : bool
            Whether the next kernel may start while this one reads.
        """
        starts = self.buffer("source", nbytes, copies_for(nbytes, self.rotate))
        count = -(-nbytes // 16)
        sink = ctypes.c_void_p(self.sink.data.ptr)

        def variants(each: int, threads: int) -> list[Callable[[], Any]]:
            where = f"read_{each}", -(-count // (each * threads)), threads, overlap
            return [
                self.launches(*where, ctypes.c_void_p(start), ctypes.c_int64(count), sink)
                for start in starts
            ]

        return self.fastest(("read", nbytes, overlap), variants)

    def copy(self, nbytes: int, written: int) -> tuple[float, str]:
        """Seconds of the fastest kernel that reads `nbytes` and writes `written`, no fewer."""
        sources = self.buffer("source", nbytes, copies_for(nbytes, self.rotate))
        targets = self.buffer("target", written, copies_for(written, self.rotate))
        counts = -(-nbytes // 16), -(-written // 16)

        def variants(each: int, threads: int) -> list[Callable[[], Any]]:
            blocks = -(-counts[1] // (each * threads))
            share = -(-counts[0] // blocks)
            return [
                self.launches(
                    f"copy_{each}",
                    blocks,
                    threads,
                    False,
                    ctypes.c_void_p(source),
                    ctypes.c_int64(counts[0]),
                    ctypes.c_int64(share),
                    ctypes.c_void_p(targets[i % len(targets)]),
                    ctypes.c_int64(counts[1]),
                )
                for i, source in enumerate(sources)
            ]

        return self.fastest(("copy", nbytes, written), variants)

    def summary(self) -> dict[str, Any]:
        """Return the figures of large transfers and of an empty kernel."""
        nbytes = min(LARGE, self.cupy.cuda.runtime.memGetInfo()[0] // 8 & ~0xFFF)
        empty = {
            overlap: self.timer.calls([self.launches("empty", 1, 32, overlap)] * 256).median
            for overlap in (False, True)
        }
        return {
            "bytes": nbytes,
            "read_gb_s": round(nbytes / self.read(nbytes, False)[0] / 1e9, 1),
            "read_overlap_gb_s": round(nbytes / self.read(nbytes, True)[0] / 1e9, 1),
            "copy_gb_s": round(2 * nbytes / self.copy(nbytes, nbytes)[0] / 1e9, 1),
            "empty_us": round(empty[False] * 1e6, 3),
            "empty_overlap_us": round(empty[True] * 1e6, 3),
        }


class ProductBench:
    """What benchmarks of products have on a GPU.

    Parameters
    ----------
    result : dict
        The document, whose settings it follows and whose machine and ceilings it fills in.
    options : argparse.Namespace
        What of it was asked for.
    """

    def __init__(self, result: dict[str, Any], options: argparse.Namespace) -> None:
        settings = result["settings"]
        self.options, self.rotate = options, settings["rotate_bytes"]
        self.timer = GpuTimer(settings["samples"], settings["sample_ms"] * 1e-3)
        self.cupy = self.timer.cupy
        self.stream = bcy.Stream.from_handle(
            self.timer.stream.ptr, device=0, owner=self.timer.stream
        )
        self.functions = native.Native("cuda")
        self.ceilings = Ceilings(self.timer, self.rotate)
        result["machine"]["gpu"] = of_gpu(result["machine"]["gpu"])
        result["ceilings"] = self.ceilings.summary()

    def beside_read(self, one: dict[str, Any], times: Times, overlap: bool) -> dict[str, Any]:
        """Add to a cell how it compares with a kernel that only reads the weight."""
        seconds, reader = self.ceilings.read(one["bytes"], overlap)
        return one | {
            "overlap": overlap,
            "read_us": round(seconds * 1e6, 3),
            "read_kernel": reader,
            "percent_of_read": round(100 * seconds / times.median, 1),
        }

    def beside_copy(
        self, one: dict[str, Any], times: Times, nbytes: int, written: int
    ) -> dict[str, Any]:
        """Add to a cell how it compares with a kernel that only copies."""
        seconds, copier = self.ceilings.copy(nbytes, written)
        return one | {
            "copy_us": round(seconds * 1e6, 3),
            "copy_kernel": copier,
            "percent_of_copy": round(100 * seconds / times.median, 1),
        }


def dense_seconds(
    timer: GpuTimer, nrows: int, ncols: int, ms: Sequence[int], rotate: int
) -> dict[int, float]:
    """float16 torch.matmul over dense weights of this shape, by M; empty without torch."""
    try:
        import torch
    except ImportError:
        return {}
    copies = copies_for(2 * nrows * ncols, rotate)
    weights = [torch.randn(nrows, ncols, device="cuda", dtype=torch.float16) for _ in range(copies)]

    def one(m: int) -> float:
        x = torch.randn(m, ncols, device="cuda", dtype=torch.float16)
        y = torch.empty(m, nrows, device="cuda", dtype=torch.float16)
        calls = [partial(torch.matmul, x, weight.T, out=y) for weight in weights]
        return timer.torch_calls(calls).median

    result = {m: one(m) for m in ms}
    weights.clear()
    torch.cuda.empty_cache()
    return result


def of_gpu(known: dict[str, Any] | None) -> dict[str, Any]:
    """Add to what nvidia-smi says of the GPU what the libraries in use say."""
    import cupy

    from baracuda_cy import _cuda

    return (known or {"name": _cuda.device_name(0)}) | {
        "architectures": list(_cuda.architectures()),
        "cuda_runtime": cupy.cuda.runtime.runtimeGetVersion(),
        "cuda_driver": cupy.cuda.runtime.driverGetVersion(),
        "multiprocessors": cupy.cuda.Device(0).attributes["MultiProcessorCount"],
    }
