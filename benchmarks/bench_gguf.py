# SPDX-License-Identifier: Apache-2.0
"""Time packed GGUF weights times activations: format x shape x M, on a GPU or on the CPU.

    python benchmarks/bench_gguf.py --output benchmarks/results/h100.json
    python benchmarks/bench_gguf.py --formats Q4_K Q8_0 --shapes 4096x4096 --m 1 8 --quick
    python benchmarks/bench_gguf.py --kinds product chain
    python benchmarks/bench_gguf.py --device cpu

GPU: every sample replays a CUDA graph of calls that walk over copies of the weight, at least 256 MB
in all, so that no call finds its weight in the cache; reported is the median of 11 samples of at
least 4 ms. Needs CuPy. What is timed, the kernels free to overlap (programmatic dependent launch),
products and calls also without that:

product     staged activations times the weight
call        everything from float16 activations to float16 output
float       the same for one token whose activations are not staged
dequantize  the weight to float16 and bfloat16
chain       a call in a row of 32, each on the output of the one before it

Beside them stand kernels that only read, or copy, as many bytes in the same way, and float16
torch.matmul where torch is installed.

CPU: product and call, float32 in and out; the weights rotate over about 200 MB; one thread and two.

64 rows of the last output of every cell are compared with a float64 product. The document is
written after each format.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import harness
import native
import numpy as np
import render
from gpu import (
    TILE_ROWS,
    ProductBench,
    Tile,
    copies_for,
    dense_seconds,
    distance,
    floats,
    gaussian,
    measured,
)
from harness import SHAPES as SHAPES
from harness import Times

import baracuda_cy as bcy

KINDS = {"cuda": ("product", "call", "float", "dequantize", "chain"), "cpu": ("product", "call")}
ERROR_LIMIT = 2e-2  # staging costs 5e-3; anything near this is a wrong kernel
CHAIN, CHAIN_M = 32, (1, 8)


class Weights(Tile):
    """A quantized tile, and weights of any number of rows made of it.

    Parameters
    ----------
    block_format : str
        GGUF block format.
    ncols : int
        K.
    """

    def __init__(self, block_format: str, ncols: int) -> None:
        packed = bcy.quantize(gaussian(ncols), block_format)
        super().__init__(np.asarray(bcy.dequantize(packed, "float32")).astype(np.float64), step=7)
        self.format = bcy.GgufBlockFormat(block_format)
        self.tile = np.asarray(packed.data).view(np.uint8).reshape(TILE_ROWS, -1)

    def nbytes(self, nrows: int) -> int:
        return nrows * self.tile.shape[1]

    def descriptor(self, kind: type, nrows: int, m: int, element: str) -> Any:
        """Return the descriptor of a product, of class `kind`."""
        return kind(
            nrows=nrows,
            ncols=self.ncols,
            m=m,
            block_format=self.format,
            activation=element,
            output=element,
        )

    def arguments(self, nrows: int, m: int, element: str, **more: int) -> native.MatmulArgs:
        return native.MatmulArgs(
            **more,
            nrows=nrows,
            ncols=self.ncols,
            m=m,
            x_stride=self.ncols,
            y_stride=nrows,
            format=int(self.format),
            x_type=native.ELEMENT[element],
            y_type=native.ELEMENT[element],
        )


def cell(
    device: str,
    kind: str,
    weights: Weights,
    nrows: int,
    m: int,
    times: Times,
    error: float,
    written: int = 0,
) -> dict[str, Any]:
    """Return one cell of the document; stop where the output was wrong."""
    names, shape = {"format": weights.format.name}, (nrows, weights.ncols)
    nbytes = weights.nbytes(nrows) + written
    one = measured(device, kind, names, shape, m, times, nbytes, error, ERROR_LIMIT)
    return one | {"error": round(error, 6)}


# ---- GPU -----------------------------------------------------------------------------------------


class GpuBench(ProductBench):
    """Times what there is to time of a weight on the GPU."""

    def __init__(self, result: dict[str, Any], options: argparse.Namespace) -> None:
        super().__init__(result, options)
        self.dense: dict[tuple[int, int], dict[int, float]] = {}  # seconds by shape and M
        self.floats: bcy.DeviceBuffer | None = None  # what dequantizing writes

    def cells(self, weights: Weights, nrows: int) -> Iterator[dict[str, Any]]:
        """Yield the cells of one format and shape."""
        tile = self.cupy.asarray(weights.tile)
        packed = [
            tile[self.cupy.asarray(weights.rows(nrows, i))].ravel()
            for i in range(copies_for(weights.nbytes(nrows), self.rotate))
        ]
        self.cupy.cuda.Device().synchronize()
        kinds, ms = self.options.kinds, self.options.m
        shape = nrows, weights.ncols
        if "call" in kinds and shape not in self.dense:
            self.dense[shape] = dense_seconds(self.timer, *shape, ms, self.rotate)
        for m in ms:
            yield from self.products(weights, nrows, m, packed)
        if "chain" in kinds and nrows == weights.ncols:
            for m in ms:
                if m in CHAIN_M:
                    yield self.chain(weights, m, packed)
        if "dequantize" in kinds:
            for element in ("float16", "bfloat16"):
                yield self.dequantize(weights, nrows, element, packed)
        del tile, packed
        self.cupy.get_default_memory_pool().free_all_blocks()

    def activations(self, weights: Weights, m: int) -> np.ndarray:
        rng = np.random.default_rng(m)
        return rng.standard_normal((m, weights.ncols), np.float32).astype(np.float16)

    def products(
        self, weights: Weights, nrows: int, m: int, packed: list
    ) -> Iterator[dict[str, Any]]:
        """Yield the cells of products and calls for one M."""
        host = self.activations(weights, m)
        x, y = self.cupy.asarray(host), self.cupy.empty((m, nrows), dtype=self.cupy.float16)
        dense = self.dense.get((nrows, weights.ncols), {}).get(m)
        for kind, overlap, calls in self.timed(weights, nrows, m, packed, x, y):
            y.fill(0)
            self.cupy.cuda.Device().synchronize()
            times = self.timer.calls(calls)
            error = weights.error(y.get(), host, len(packed) - 1)
            one = cell("cuda", kind, weights, nrows, m, times, error)
            one = self.beside_read(one, times, overlap)
            if kind == "call" and dense:
                one["dense_us"] = round(dense * 1e6, 3)
                one["dense_ratio"] = round(dense / times.median, 3)
            yield one

    def timed(
        self, weights: Weights, nrows: int, m: int, packed: list, x: Any, y: Any
    ) -> Iterator[tuple[str, bool, list[Callable[[], Any]]]]:
        """Yield kind, overlap and calls, each on another copy of the weight."""
        kinds = self.options.kinds
        problem = weights.arguments(nrows, m, "float16")
        nbytes = self.functions.workspace_size(native.address(problem))
        workspace = self.cupy.empty(nbytes, dtype=self.cupy.uint8)
        if "product" in kinds:
            places = {"y": y.data.ptr, "workspace": workspace.data.ptr}
            staged = weights.arguments(nrows, m, "float16", x=x.data.ptr, **places)
            self.cupy.cuda.Device().synchronize()
            self.functions.stage(native.address(staged), self.timer.stream.ptr)
            for overlap in (True, False):
                arguments = [
                    weights.arguments(
                        nrows, m, "float16", weight=w.data.ptr, overlap=overlap, **places
                    )
                    for w in packed
                ]
                yield "product", overlap, [self.product(a) for a in arguments]
        if "call" in kinds:
            for overlap in (True, False):
                plan = self.plan(weights, nrows, m, overlap)
                yield "call", overlap, [self.call(plan, w, x, y, workspace) for w in packed]
        if "float" in kinds and m == 1:
            plan = bcy.GgufMmvqPlan.select(
                "cuda:0",
                weights.descriptor(bcy.GgufMmvqDescriptor, nrows, m, "float16"),
                bcy.PlanPreference(overlap=True),
            )
            yield "float", True, [self.call(plan, w, x, y, None) for w in packed]

    def plan(self, weights: Weights, nrows: int, m: int, overlap: bool) -> bcy.GgufMmvqMultiMPlan:
        return bcy.GgufMmvqMultiMPlan.select(
            "cuda:0",
            weights.descriptor(bcy.GgufMmvqMultiMDescriptor, nrows, m, "float16"),
            bcy.PlanPreference(overlap=overlap),
        )

    def product(self, arguments: native.MatmulArgs) -> Callable[[], Any]:
        return lambda: self.functions.matmul(native.address(arguments), self.timer.stream.ptr)

    def call(self, plan: Any, w: Any, x: Any, y: Any, workspace: Any) -> Callable[[], Any]:
        return lambda: plan.run(w, x, y, workspace=workspace, stream=self.stream)

    def chain(self, weights: Weights, m: int, packed: list) -> dict[str, Any]:
        """Return the cell of calls of which each takes the output of the one before it."""
        n = weights.ncols
        plan = self.plan(weights, n, m, True)
        workspace = self.cupy.empty(plan.workspace_size, dtype=self.cupy.uint8)
        x = self.cupy.asarray(self.activations(weights, m))
        outputs = [self.cupy.empty((m, n), dtype=self.cupy.float16) for _ in range(2)]
        self.cupy.cuda.Device().synchronize()
        calls = []
        for i in range(CHAIN * -(-len(packed) // CHAIN)):
            source = outputs[(i - 1) % 2] if i % CHAIN else x
            w = packed[i % len(packed)]
            calls.append(self.call(plan, w, source, outputs[i % 2], workspace))
        times = self.timer.calls(calls)
        before, last = (outputs[i % 2].get() for i in (len(calls) - 2, len(calls) - 1))
        error = weights.error(last, before, (len(calls) - 1) % len(packed))
        one = cell("cuda", "chain", weights, n, m, times, error)
        return self.beside_read(one, times, True)

    def dequantize(
        self, weights: Weights, nrows: int, element: str, packed: list
    ) -> dict[str, Any]:
        """Return the cell of unpacking the weight."""
        shape = nrows, weights.ncols
        written = 2 * nrows * weights.ncols
        copies = copies_for(written, self.rotate)
        if self.floats is None or self.floats.nbytes < copies * written:
            self.floats = None
            self.floats = bcy.DeviceBuffer(copies * written, stream=self.stream)
        outputs = [
            bcy.DeviceArray(shape, element, self.floats, offset=i * written) for i in range(copies)
        ]
        plan = bcy.GgufDequantizePlan.select(
            "cuda:0",
            bcy.GgufDequantizeDescriptor(
                nrows=nrows, ncols=weights.ncols, block_format=weights.format, output=element
            ),
        )

        def call(i: int) -> Callable[[], Any]:
            return lambda: plan.run(packed[i], outputs[i % copies], stream=self.stream)

        times = self.timer.calls([call(i) for i in range(len(packed))])
        picked, exact = weights.checked(nrows, len(packed) - 1)
        last = (len(packed) - 1) % copies
        # As the halves that CuPy knows.
        bits = self.cupy.asarray(
            bcy.DeviceArray(shape, "float16", self.floats, offset=last * written)
        )
        output = floats(bits[self.cupy.asarray(picked)].get().view(np.uint16), element)
        error = distance(output, exact)
        one = cell("cuda", "dequantize", weights, nrows, 0, times, error, written)
        one["output"] = element
        return self.beside_copy(one, times, weights.nbytes(nrows), written)


# ---- CPU -----------------------------------------------------------------------------------------


class CpuBench:
    """Times products and calls of a weight on the CPU.

    Parameters
    ----------
    result : dict
        The document, whose settings it follows and whose machine it fills in.
    options : argparse.Namespace
        Kinds, threads and M.
    """

    def __init__(self, result: dict[str, Any], options: argparse.Namespace) -> None:
        from baracuda_cy import _cpu

        self.options, self.settings = options, result["settings"]
        self.functions = native.Native("cpu")
        result["machine"]["isa"] = _cpu.isa()

    def cells(self, weights: Weights, nrows: int) -> Iterator[dict[str, Any]]:
        """Yield the cells of one format and shape."""
        copies = copies_for(weights.nbytes(nrows), self.settings["rotate_bytes"])
        packed = [weights.tile[weights.rows(nrows, i)].ravel() for i in range(copies)]
        for m in self.options.m:
            for threads in self.options.threads:
                for kind, times, error in self.products(weights, nrows, m, threads, packed):
                    yield cell("cpu", kind, weights, nrows, m, times, error) | {"threads": threads}

    def products(
        self, weights: Weights, nrows: int, m: int, threads: int, packed: list[np.ndarray]
    ) -> Iterator[tuple[str, Times, float]]:
        """Yield kind, times and error of the call, and of the product on what was staged."""
        x = np.random.default_rng(m).standard_normal((m, weights.ncols), dtype=np.float32)
        y = np.zeros((m, nrows), dtype=np.float32)
        plan = bcy.GgufMmvqMultiMPlan.select(
            "cpu",
            weights.descriptor(bcy.GgufMmvqMultiMDescriptor, nrows, m, "float32"),
            bcy.PlanPreference(threads=threads),
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
        self.functions.stage(native.address(arguments[0]), threads)

        def call(i: int) -> None:
            plan.run(packed[i], x, y, workspace=workspace)

        def product(i: int) -> None:
            self.functions.matmul(native.address(arguments[i]), threads)

        for kind, run in (("call", call), ("product", product)):
            if kind not in self.options.kinds:
                continue
            y.fill(0)
            times, last = harness.walk(run, len(packed), self.settings)
            yield kind, times, weights.error(y, x, last)


def format_argument(parser: argparse.ArgumentParser) -> None:
    every = [f.name for f in bcy.GgufBlockFormat]
    parser.add_argument("--formats", nargs="+", default=every, choices=every, metavar="FORMAT")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    format_argument(parser)
    options = harness.product_options(parser, arguments, KINDS)
    cuda = options.device == "cuda"
    settings = harness.product_settings(options, element="float16" if cuda else "float32")
    result = harness.document("gguf", settings, harness.machine(options.commit))
    bench = (GpuBench if cuda else CpuBench)(result, options)
    progress = harness.Progress(len(options.formats) * len(options.shapes))
    for block_format in options.formats:
        for shape in options.shapes:
            nrows, ncols = harness.sizes(shape)
            result["cells"] += bench.cells(Weights(block_format, ncols), nrows)
            progress.step(f"{block_format} {shape}")
        harness.save(result, options.output)
    return render.publish(result, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
