# SPDX-License-Identifier: Apache-2.0
"""What limits a product of packed GGUF weights: Nsight Compute's counters, format x shape x M.

    python benchmarks/counters.py --output benchmarks/results/h100-counters.json
    python benchmarks/counters.py --formats Q4_K --shapes 4096x4096 --m 1 8

Every product of float16 activations runs once, caches cold and nothing beside it, under `ncu`,
which must be installed and allowed to read counters. So a launch takes longer here than in a row of
overlapping ones; shares of what the GPU can do at most are what to read. Needs CuPy.
"""

import argparse
import csv
import io
import shutil
import subprocess
import sys
from typing import Any

import harness
import native
import numpy as np
import render
from bench_gguf import Weights, format_argument

import baracuda_cy as bcy

# Percent of the most there can be, over the whole launch.
PERCENT = {
    "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2": "lts__t_sectors.avg.pct_of_peak_sustained_elapsed",
    "shared": "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    "issue": "sm__inst_issued.avg.pct_of_peak_sustained_elapsed",
    "alu": "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_elapsed",
    "fma": "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_elapsed",
}
KINDS = ("product", "float")
TIME, INSTRUCTIONS = "gpu__time_duration.sum", "smsp__inst_executed.sum"
GROUP = 16 * 32  # weights: what a tensor-core instruction of a warp takes, at M <= 8


def launches(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what each launch multiplies, in order."""
    return [
        {"kind": kind, "format": name, "nrows": nrows, "ncols": ncols, "m": m}
        for name in options.formats
        for nrows, ncols in map(harness.sizes, options.shapes)
        for kind in options.kinds
        for m in options.m
        if kind == "product" or m == 1
    ]


def launch(options: argparse.Namespace) -> None:
    """Launch everything once, for `ncu` to look at."""
    import cupy

    functions = native.Native("cuda")
    stream = bcy.Stream.from_handle(cupy.cuda.get_current_stream().ptr, device=0)
    made: dict[tuple[str, int], Weights] = {}
    for one in launches(options):
        nrows, ncols, m = one["nrows"], one["ncols"], one["m"]
        key = one["format"], ncols
        if key not in made:
            made[key] = Weights(*key)
        weights = made[key]
        packed = cupy.asarray(weights.tile)[cupy.asarray(weights.rows(nrows, 0))].ravel()
        x = cupy.asarray(np.random.default_rng(m).standard_normal((m, ncols)).astype(np.float16))
        y = cupy.empty((m, nrows), cupy.float16)
        if one["kind"] == "float":
            descriptor = weights.descriptor(bcy.GgufMmvqDescriptor, nrows, m, "float16")
            plan = bcy.GgufMmvqPlan.select("cuda:0", descriptor)
            plan.run(packed, x, y, stream=stream)
            continue
        arguments = weights.arguments(
            nrows, m, "float16", weight=packed.data.ptr, x=x.data.ptr, y=y.data.ptr
        )
        nbytes = functions.workspace_size(native.address(arguments))
        workspace = cupy.empty(nbytes, cupy.uint8)
        arguments.workspace = workspace.data.ptr
        functions.stage(native.address(arguments), stream.handle)
        arguments.x = None
        functions.matmul(native.address(arguments), stream.handle)
        cupy.cuda.Device().synchronize()


def counted(text: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the cells of what `ncu --csv --page raw` printed."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))[1:]  # below the units
    expected = launches(options)
    if len(rows) != len(expected):
        raise SystemExit(
            f"ncu counted {len(rows)} products, expected {len(expected)}; it said:\n{text[-2000:]}"
        )
    cells = []
    for one, row in zip(expected, rows, strict=True):
        number = {
            name: float(value.replace(",", ""))
            for name, value in row.items()
            if name in (TIME, INSTRUCTIONS, *PERCENT.values())
        }
        groups = one["nrows"] * one["ncols"] / GROUP
        cells.append(
            {"device": "cuda"}
            | one
            | {"us": round(number[TIME] / 1e3, 3)}
            | {name: round(number[metric], 1) for name, metric in PERCENT.items()}
            | {"instructions": round(number[INSTRUCTIONS] / groups, 1)}
        )
    return cells


def main(arguments: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.document_arguments(parser)
    format_argument(parser)
    harness.product_arguments(parser, KINDS)
    parser.set_defaults(shapes=harness.SHAPES, m=harness.MS, kinds=KINDS)
    parser.add_argument("--launch", action="store_true", help="what this starts under ncu")
    options = parser.parse_args(arguments)
    if options.launch:
        launch(options)
        return {}
    ncu = shutil.which("ncu")
    if ncu is None:
        raise SystemExit("ncu was not found; it comes with CUDA, in Nsight Compute")
    metrics = ",".join([TIME, INSTRUCTIONS, *PERCENT.values()])
    command = [
        ncu,
        "--csv",
        "--page",
        "raw",
        "--metrics",
        metrics,
        "--kernel-name",
        "regex:product",
    ]
    again = [sys.executable, __file__, "--launch", *arguments]
    done = subprocess.run([*command, *again], capture_output=True, text=True, check=False)
    result = harness.document("counters", {}, harness.machine(options.commit))
    result["cells"] = counted(done.stdout + done.stderr, options)
    return render.publish(result, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
