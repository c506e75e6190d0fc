# SPDX-License-Identifier: Apache-2.0
"""Time NF4 weights, beside bitsandbytes and dense weights: kind x shape x M, on a GPU or the CPU.

    python benchmarks/bench_nf4.py --output benchmarks/results/nf4-h100.json
    python benchmarks/bench_nf4.py --shapes 4096x4096 --m 1 8 --dtypes float16 --quick
    python benchmarks/bench_nf4.py --kinds product dequantize --names baracuda-cy
    python benchmarks/bench_nf4.py --device cpu

The method is that of bench_gguf.py; blocks of 64, in the layout of bitsandbytes. GPU: timed are

product     float16 and bfloat16 activations times the weight, output of their type
exact       the same by the kernel with the bits of every GPU and the CPU, float16 and float32
nested      the same as product, absmax quantized too
dequantize  the weight to float16 and bfloat16
quantize    a float16 weight to NF4

products with kernels free to overlap (programmatic dependent launch) and without. Where
bitsandbytes is installed it does the same on the same copies of the weight in graphs of torch
(except for quantize: it runs on the default stream, which no graph captures), and torch.matmul
multiplies the dense weight. Beside them stand kernels that only read, or copy, as many bytes.

CPU: product, float32 in and out; one thread and two.

64 rows of the last output of every cell are compared with float64. The document is written after
each shape.
"""

import argparse
import ctypes
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import harness
import native
import numpy as np
import render
from gpu import (
    TILE_ROWS,
    ProductBench,
    Tile,
    copies_for,
    distance,
    floats,
    gaussian,
    measured,
)
from harness import SHAPES, Times
from targets import BITSANDBYTES, OURS, TORCH

import baracuda_cy as bcy

BLOCK = 64
NESTED_BLOCK = 256
NAMES = (OURS, BITSANDBYTES, TORCH)
# Relative L2 at most: about four times what rounding the weight and the output costs.
LIMIT = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}
QUANTIZE_LIMIT = 1e-9  # the codes are those of the CPU
PEER_LIMIT = 2e-2  # theirs may round more, but it is to be the same product


class Scope(NamedTuple):
    """What of a kind is timed on a GPU."""

    dtypes: tuple[str, ...]
    ms: tuple[int, ...] | None = None  # all that were asked for
    left_out: tuple[str, ...] = ()  # shapes


HALVES = ("float16", "bfloat16")
KINDS = {
    "product": Scope(HALVES),
    "exact": Scope(("float16", "float32"), (1, 2, 4, 8)),
    "nested": Scope(("float16",), (1, 8), SHAPES[2:]),
    "dequantize": Scope(HALVES, (0,)),
    "quantize": Scope(("float16",), (0,), SHAPES[2:]),
}


class Weights(Tile):
    """A quantized tile, and weights of any number of rows made of it.

    Parameters
    ----------
    ncols : int
        K, a multiple of 128.
    nested : bool
        Whether absmax is quantized too.
    """

    def __init__(self, ncols: int, nested: bool = False) -> None:
        self.values = gaussian(ncols).astype(np.float16)
        packed = bcy.quantize(self.values, "nf4", block_size=BLOCK, nested=nested)
        group = BLOCK * NESTED_BLOCK  # elements under one scale of absmax, which stay together
        super().__init__(
            np.asarray(bcy.dequantize(packed, "float32")).astype(np.float64),
            step=group // math.gcd(group, ncols) if nested else 7,
        )
        self.codes = np.asarray(packed.data).reshape(TILE_ROWS, -1)
        self.absmax = np.asarray(packed.absmax).reshape(TILE_ROWS, -1)
        self.nested = packed.nested

    def copy(
        self, nrows: int, number: int, asarray: Callable[[Any], Any] = np.asarray
    ) -> bcy.Nf4Tensor:
        """Return a copy of the weight, over what `asarray` makes of NumPy arrays."""
        rows = asarray(self.rows(nrows, number))
        nested = None
        if self.nested is not None:
            group = BLOCK * NESTED_BLOCK
            first = number * self.step * self.ncols // group
            groups = np.arange(first, first - (-nrows * self.ncols // group))
            nested = bcy.NestedAbsmax(
                asarray(self.nested.code),
                asarray(self.nested.absmax[groups % self.nested.count]),
                self.nested.offset,
                NESTED_BLOCK,
            )
        return bcy.Nf4Tensor(
            asarray(self.codes)[rows].ravel(),
            asarray(self.absmax)[rows].ravel(),
            shape=(nrows, self.ncols),
            block_size=BLOCK,
            nested=nested,
        )

    def copies(
        self, nrows: int, rotate: int, asarray: Callable[[Any], Any] = np.asarray
    ) -> list[bcy.Nf4Tensor]:
        """Return the copies that calls walk over."""
        first = self.copy(nrows, 0, asarray)
        count = copies_for(first.nbytes, rotate)
        return [first, *(self.copy(nrows, i, asarray) for i in range(1, count))]


def rounded(values: np.ndarray, element: str) -> np.ndarray:
    """Round float32 to an element; bfloat16, which NumPy does not know, looks like float16."""
    if element != "bfloat16":
        return values.astype(element)
    bits = values.view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # of ties the even one
    return nearest.astype(np.uint16).view(np.float16)


def read(array: np.ndarray, element: str) -> np.ndarray:
    """Return the values of what `rounded` returns."""
    return floats(array.view(np.uint16), element) if element == "bfloat16" else array


def cell(
    device: str,
    kind: str,
    name: str,
    dtype: str,
    shape: tuple[int, int],
    m: int,
    times: Times,
    nbytes: int,
    error: float,
) -> dict[str, Any]:
    """Return one cell of the document; stop where the output was wrong."""
    limit = QUANTIZE_LIMIT if kind == "quantize" else LIMIT[dtype]
    if name != OURS:
        limit = PEER_LIMIT
    names = {"name": name, "dtype": dtype}
    one = measured(device, kind, names, shape, m, times, nbytes, error, limit)
    return one | {"error": float(f"{error:.3g}")}


class Bitsandbytes:
    """bitsandbytes on the memory of our weights, on the device they are on."""

    def __init__(self) -> None:
        import bitsandbytes
        import torch

        self.torch, self.functional = torch, bitsandbytes.functional
        self.matmul = bitsandbytes.matmul_4bit

    def packed(self, w: bcy.Nf4Tensor, dtype: str) -> tuple[Any, Any]:
        """Return a weight as bitsandbytes has it: its bytes and its state."""
        share, state = self.torch.from_dlpack, self.functional.QuantState
        codes, absmax = share(w.data).view(-1, 1), share(w.absmax)
        outer: dict[str, Any] = {}
        if w.nested is not None:
            scales, table = share(w.nested.absmax), share(w.nested.code)
            outer["state2"] = state(
                absmax=scales,
                code=table,
                blocksize=w.nested.block_size,
                dtype=self.torch.float32,
            )
            outer["offset"] = self.torch.tensor(w.nested.offset, device=codes.device)
        return codes, state(
            absmax=absmax,
            shape=self.torch.Size(w.shape),
            code=self.functional.get_4bit_type("nf4", device=codes.device),
            blocksize=w.block_size,
            quant_type="nf4",
            dtype=getattr(self.torch, dtype),
            **outer,
        )

    def packed_for_cpu(self, w: bcy.Nf4Tensor, dtype: str) -> tuple[Any, Any]:
        """Return a weight as its Linear4bit has it on this CPU."""
        codes, state = self.packed(w, dtype)
        if self.functional.has_avx512bf16() and w.nrows % 32 == 0:
            return self.functional._convert_weight_packed_for_cpu(codes, state)
        return codes, state


def peers(names: list[str], device: str) -> tuple[Bitsandbytes | None, Any]:
    """Return bitsandbytes and torch: None where not asked for, or not to be had on `device`."""
    if not {BITSANDBYTES, TORCH} & set(names):
        return None, None
    try:
        import torch
    except ImportError:
        return None, None
    if device == "cuda" and not torch.cuda.is_available():
        return None, None
    theirs = None
    if BITSANDBYTES in names:
        try:
            theirs = Bitsandbytes()
        except ImportError as error:
            print(f"Without bitsandbytes: {error}", file=sys.stderr)
    return theirs, torch if TORCH in names else None


# ---- GPU -----------------------------------------------------------------------------------------


class GpuBench(ProductBench):
    """Times what there is to time of a shape on the GPU."""

    def __init__(self, result: dict[str, Any], options: argparse.Namespace) -> None:
        super().__init__(result, options)
        self.bitsandbytes, self.torch = peers(options.names, "cuda")

    def cells(self, nrows: int, ncols: int) -> Iterator[dict[str, Any]]:
        """Yield the cells of one shape."""
        for nested in (False, True):
            todo = [p for p in self.problems(nrows, ncols) if (p[0] == "nested") == nested]
            if not todo:
                continue
            weights = Weights(ncols, nested)
            packed = weights.copies(nrows, self.rotate, self.cupy.asarray)
            self.cupy.cuda.Device().synchronize()
            for kind, dtype, m in todo:
                how = weights, packed, dtype
                if OURS in self.options.names:
                    if kind == "dequantize":
                        yield self.dequantize(*how)
                    elif kind == "quantize":
                        yield self.quantize(weights, nrows, dtype)
                    else:
                        yield from self.products(kind, *how, m)
                yield from self.theirs(kind, *how, m)
        yield from self.dense(nrows, ncols)
        self.cupy.get_default_memory_pool().free_all_blocks()
        if self.torch is not None or self.bitsandbytes is not None:
            import torch

            torch.cuda.empty_cache()

    def problems(self, nrows: int, ncols: int) -> Iterator[tuple[str, str, int]]:
        """Yield kind, dtype and M of what is to be timed of a shape."""
        for kind in self.options.kinds:
            dtypes, ms, left_out = KINDS[kind]
            if f"{nrows}x{ncols}" in left_out:
                continue
            for dtype in (d for d in dtypes if d in self.options.dtypes):
                for m in ms or self.options.m:
                    if m == 0 or m in self.options.m:
                        yield kind, dtype, m

    def activations(self, ncols: int, m: int, dtype: str) -> np.ndarray:
        values = np.random.default_rng(m).standard_normal((m, ncols), dtype=np.float32)
        return rounded(values, dtype)

    def upload(self, host: np.ndarray, dtype: str) -> bcy.DeviceArray:
        same = bcy.DeviceArray.from_host(host, stream=self.stream)
        return bcy.DeviceArray(host.shape, dtype, same.buffer)

    def download(self, array: bcy.DeviceArray, dtype: str) -> np.ndarray:
        known = "float16" if dtype == "bfloat16" else dtype
        same = bcy.DeviceArray(array.shape, known, array.buffer)
        return read(same.to_host(stream=self.stream), dtype)

    def products(
        self, kind: str, weights: Weights, packed: list[bcy.Nf4Tensor], dtype: str, m: int
    ) -> Iterator[dict[str, Any]]:
        """Yield the cells of a product, overlapping and not."""
        nrows, ncols = packed[0].nrows, packed[0].ncols
        host = self.activations(ncols, m, dtype)
        x = self.upload(host, dtype)
        y = bcy.DeviceArray.empty((m, nrows), dtype, stream=self.stream)
        for overlap in (True, False):
            wishes = bcy.PlanPreference(overlap=overlap, bit_stable_across_hardware=kind == "exact")
            plan = packed[0].plan(m, dtype, preference=wishes)
            workspace = bcy.DeviceArray.empty((plan.workspace_size,), "uint8", stream=self.stream)
            y.buffer.fill(0, stream=self.stream)
            run = partial(plan.run, workspace=workspace, stream=self.stream)
            times = self.timer.calls([partial(run, w, x, y) for w in packed])
            error = weights.error(self.download(y, dtype), read(host, dtype), len(packed) - 1)
            shape = nrows, ncols
            one = cell("cuda", kind, OURS, dtype, shape, m, times, packed[0].nbytes, error)
            one["math"] = plan.precision_guarantee.math_precision.name
            yield self.beside_read(one, times, overlap)

    def dequantize(
        self, weights: Weights, packed: list[bcy.Nf4Tensor], dtype: str
    ) -> dict[str, Any]:
        """Return the cell of unpacking the weight."""
        nrows, ncols = shape = packed[0].nrows, packed[0].ncols
        written = 2 * nrows * ncols
        outputs = [
            bcy.DeviceArray.empty(shape, dtype, stream=self.stream)
            for _ in range(copies_for(written, self.rotate))
        ]
        plan = bcy.Nf4DequantizePlan.select(
            "cuda:0", bcy.Nf4Descriptor(n=nrows, k=ncols, block_size=BLOCK, output=dtype)
        )
        walk = [(w, outputs[i % len(outputs)]) for i, w in enumerate(packed)]
        times = self.timer.calls([partial(plan.run, w, y, stream=self.stream) for w, y in walk])
        picked, exact = weights.checked(nrows, len(packed) - 1)
        # As the halves that CuPy knows.
        last = self.cupy.asarray(bcy.DeviceArray(shape, "float16", walk[-1][1].buffer))
        output = read(last[self.cupy.asarray(picked)].get(), dtype)
        nbytes = packed[0].nbytes
        one = cell(
            "cuda",
            "dequantize",
            OURS,
            dtype,
            shape,
            0,
            times,
            nbytes + written,
            distance(output, exact),
        )
        return self.beside_copy(one, times, nbytes, written)

    def quantize(self, weights: Weights, nrows: int, dtype: str) -> dict[str, Any]:
        """Return the cell of packing a weight, by the function behind `quantize`, which allocates.

        Its error is that of the values beside those of the CPU's codes: none.
        """
        cupy, ncols = self.cupy, weights.ncols
        count = nrows * ncols
        copies = copies_for(2 * count, self.rotate)
        tile = cupy.asarray(weights.values)
        sources = [tile[cupy.asarray(weights.rows(nrows, i))] for i in range(copies)]
        outputs = [
            (cupy.empty(count // 2, cupy.uint8), cupy.empty(count // BLOCK, cupy.float32))
            for _ in sources
        ]
        cupy.cuda.Device().synchronize()
        arguments = [
            native.Nf4QuantizeArgs(
                x=x.data.ptr,
                codes=codes.data.ptr,
                absmax=absmax.data.ptr,
                count=count,
                block_size=BLOCK,
                codebook=int(bcy.Codebook.NF4),
                x_type=native.ELEMENT[dtype],
            )
            for x, (codes, absmax) in zip(sources, outputs, strict=True)
        ]
        times = self.timer.calls(
            [
                partial(self.functions.nf4_quantize, native.address(a), self.timer.stream.ptr)
                for a in arguments
            ]
        )
        picked, exact = weights.checked(nrows, copies - 1)
        codes, absmax = (
            part.reshape(nrows, -1)[cupy.asarray(picked)].get().ravel() for part in outputs[-1]
        )
        seen = bcy.Nf4Tensor(codes, absmax, shape=exact.shape, block_size=BLOCK)
        error = distance(np.asarray(bcy.dequantize(seen, "float32")), exact)
        nbytes = 2 * count + outputs[0][0].nbytes + outputs[0][1].nbytes
        return cell("cuda", "quantize", OURS, dtype, (nrows, ncols), 0, times, nbytes, error)

    def theirs(
        self, kind: str, weights: Weights, packed: list[bcy.Nf4Tensor], dtype: str, m: int
    ) -> Iterator[dict[str, Any]]:
        """Yield the cell of bitsandbytes, which has one product for every wish."""
        if self.bitsandbytes is None or kind == "quantize":
            return
        if kind == "exact":
            kind = "product"
            if dtype in KINDS[kind].dtypes:
                return
        try:
            yield self.their_cell(self.bitsandbytes, kind, weights, packed, dtype, m)
        except RuntimeError as error:  # what it cannot do must not cost what else is measured
            nrows, ncols = packed[0].nrows, packed[0].ncols
            print(f"bitsandbytes {nrows}x{ncols} M={m} {kind} {dtype}: {error}", file=sys.stderr)

    def their_cell(
        self,
        peer: Bitsandbytes,
        kind: str,
        weights: Weights,
        packed: list[bcy.Nf4Tensor],
        dtype: str,
        m: int,
    ) -> dict[str, Any]:
        nrows, ncols = shape = packed[0].nrows, packed[0].ncols
        torch, element = peer.torch, getattr(peer.torch, dtype)
        theirs = [peer.packed(w, dtype) for w in packed]
        nbytes = packed[0].nbytes
        last = len(packed) - 1
        if kind == "dequantize":
            written = 2 * nrows * ncols
            outputs = [
                torch.empty(shape, device="cuda", dtype=element)
                for _ in range(copies_for(written, self.rotate))
            ]
            walk = [(*w, outputs[i % len(outputs)]) for i, w in enumerate(theirs)]
            unpack = peer.functional.dequantize_4bit
            times = self.timer.torch_calls(
                [partial(unpack, codes, state, out=y) for codes, state, y in walk]
            )
            picked, exact = weights.checked(nrows, last)
            output = walk[-1][2][torch.from_numpy(picked).cuda()].float().cpu().numpy()
            error = distance(output, exact)
            one = cell("cuda", kind, BITSANDBYTES, dtype, shape, 0, times, nbytes + written, error)
            return self.beside_copy(one, times, nbytes, written)
        host = read(self.activations(ncols, m, dtype), dtype).astype(np.float32)
        x = torch.from_numpy(host).to("cuda", element)
        kept: list[Any] = []  # the last output; it allocates every one

        def multiply(codes: Any, state: Any) -> None:
            kept[:] = [peer.matmul(x, codes.t(), state)]

        times = self.timer.torch_calls([partial(multiply, *w) for w in theirs])
        error = weights.error(kept[0].float().cpu().numpy(), host, last)
        one = cell("cuda", kind, BITSANDBYTES, dtype, shape, m, times, nbytes, error)
        return self.beside_read(one, times, False)

    def dense(self, nrows: int, ncols: int) -> Iterator[dict[str, Any]]:
        """Yield the cells of torch.matmul over the same weight, dense."""
        torch = self.torch
        if torch is None or "product" not in self.options.kinds:
            return
        weights = Weights(ncols)
        for dtype in (d for d in HALVES if d in self.options.dtypes):
            element = getattr(torch, dtype)
            tile = torch.from_numpy(weights.exact).to("cuda", element)
            nbytes = 2 * nrows * ncols
            copies = [
                tile[torch.from_numpy(weights.rows(nrows, i)).cuda()]
                for i in range(copies_for(nbytes, self.rotate))
            ]
            for m in self.options.m:
                host = read(self.activations(ncols, m, dtype), dtype).astype(np.float32)
                x = torch.from_numpy(host).to("cuda", element)
                y = torch.empty(m, nrows, device="cuda", dtype=element)
                times = self.timer.torch_calls(
                    [partial(torch.matmul, x, w.T, out=y) for w in copies]
                )
                error = weights.error(y.float().cpu().numpy(), host, len(copies) - 1)
                shape = nrows, ncols
                yield cell("cuda", "product", TORCH, dtype, shape, m, times, nbytes, error)
            del copies
            torch.cuda.empty_cache()


# ---- CPU -----------------------------------------------------------------------------------------


class CpuBench:
    """Times products of a weight on the CPU.

    Parameters
    ----------
    result : dict
        The document, whose settings it follows and whose machine it fills in.
    options : argparse.Namespace
        Names, threads and M.
    """

    dtype = "float32"

    def __init__(self, result: dict[str, Any], options: argparse.Namespace) -> None:
        from baracuda_cy import _cpu

        self.options, self.settings = options, result["settings"]
        self.bitsandbytes, _ = peers(options.names, "cpu")
        result["machine"]["isa"] = _cpu.isa()

    def cells(self, nrows: int, ncols: int) -> Iterator[dict[str, Any]]:
        """Yield the cells of one shape."""
        weights = Weights(ncols)
        packed = weights.copies(nrows, self.settings["rotate_bytes"])
        contenders: list[tuple[str, Callable[..., Callable[[int], None]], list[Any]]] = []
        if OURS in self.options.names:
            contenders.append((OURS, self.ours, packed))
        if self.bitsandbytes is not None:
            theirs = [self.bitsandbytes.packed_for_cpu(w, self.dtype) for w in packed]
            contenders.append((BITSANDBYTES, self.theirs, theirs))
        for name, contender, copies in contenders:
            for m in self.options.m:
                x = np.random.default_rng(m).standard_normal((m, ncols), dtype=np.float32)
                for threads in self.options.threads:
                    y = np.zeros((m, nrows), np.float32)
                    run = contender(copies, x, y, threads)
                    times, last = harness.walk(run, len(copies), self.settings)
                    error = weights.error(y, x, last)
                    shape, nbytes = (nrows, ncols), packed[0].nbytes
                    yield cell(
                        "cpu", "product", name, self.dtype, shape, m, times, nbytes, error
                    ) | {"threads": threads}

    def ours(
        self, packed: list[bcy.Nf4Tensor], x: np.ndarray, y: np.ndarray, threads: int
    ) -> Callable[[int], None]:
        wishes = bcy.PlanPreference(threads=threads)
        plan = packed[0].plan(x.shape[0], self.dtype, preference=wishes)
        return lambda i: plan.run(packed[i], x, y)

    def theirs(
        self, packed: list[tuple[Any, Any]], x: np.ndarray, y: np.ndarray, threads: int
    ) -> Callable[[int], None]:
        assert self.bitsandbytes is not None
        torch, multiply = self.bitsandbytes.torch, self.bitsandbytes.matmul
        torch.set_num_threads(threads)
        # Its library may be linked to another OpenMP than torch.
        ctypes.CDLL("libgomp.so.1").omp_set_num_threads(threads)
        given, output = torch.from_numpy(x), torch.from_numpy(y)

        def run(i: int) -> None:
            codes, state = packed[i]
            output.copy_(multiply(given, codes, state))

        return run


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", choices=LIMIT, default=list(LIMIT), metavar="DTYPE")
    parser.add_argument("--names", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME")
    kinds = {"cuda": tuple(KINDS), "cpu": ("product",)}
    options = harness.product_options(parser, arguments, kinds)
    cuda = options.device == "cuda"
    shapes = []
    for shape in options.shapes:
        nrows, ncols = harness.sizes(shape)
        if ncols % 128:
            parser.error(f"--shapes: expected NCOLS to be a multiple of 128, got {shape}")
        shapes.append((nrows, ncols))
    settings = harness.product_settings(options, block_size=BLOCK)
    result = harness.document("nf4", settings, harness.machine(options.commit))
    bench = (GpuBench if cuda else CpuBench)(result, options)
    progress = harness.Progress(len(shapes))
    for nrows, ncols in shapes:
        result["cells"] += bench.cells(nrows, ncols)
        progress.step(f"{nrows}x{ncols}")
        harness.save(result, options.output)
    return render.publish(result, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
