# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: the JSON document, the machine it was measured on, and sampling."""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# NumPy's BLAS threads keep spinning after a product, on the CPUs that are being timed. They are
# counted when NumPy is imported, so this module comes before it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

SCHEMA = "baracuda-cy/benchmark/1"

# What products are measured on where nothing else is said.
SHAPES = ("4096x4096", "14336x4096", "4096x14336", "128256x4096")
MS = (1, 2, 4, 8, 16, 32)

# What a cell of each benchmark must have, beside anything else it says.
CELL = {
    "gguf": {
        "device": str,
        "kind": str,  # what is timed; bench_gguf.py says what there is
        "format": str,
        "nrows": int,
        "ncols": int,
        "m": int,  # tokens; 0 where the weight is only unpacked
        "us": float,  # the median of the samples
        "us_lowest": float,
        "gb_s": float,  # packed weight bytes, and dense ones that are written, over time
        "error": float,  # relative L2 against float64, over the rows that were checked
    },
    "nf4": {
        "device": str,
        "kind": str,  # what is timed; bench_nf4.py says what there is
        "name": str,  # whose: "baracuda-cy", "bitsandbytes" or "torch"
        "dtype": str,  # of the activations, or of what is unpacked to or packed
        "nrows": int,
        "ncols": int,
        "m": int,  # tokens; 0 where nothing is multiplied
        "us": float,
        "us_lowest": float,
        "gb_s": float,  # bytes of weights, scales included, that are read or written, over time
        "error": float,
    },
    # Of Nsight Compute: percent of the most there can be, and instructions of a warp for 16 x 32
    # weights; counters.py says of what.
    "counters": {
        "device": str,
        "kind": str,
        "format": str,
        "nrows": int,
        "ncols": int,
        "m": int,
        "us": float,
        "dram": float,
        "l2": float,
        "shared": float,
        "issue": float,
        "alu": float,
        "fma": float,
        "instructions": float,
    },
    "call": {"device": str, "array": str, "call": str, "us": float, "us_lowest": float},
}

PACKAGES = (
    "baracuda-cy",
    "numpy",
    "torch",
    "bitsandbytes",
    "cupy-cuda13x",
    "cupy",
    "jax",
    "apache-tvm-ffi",
    "gguf",
)


def document(benchmark: str, settings: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    """Return an empty document of this schema."""
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "settings": settings,
        "ceilings": {},
        "cells": [],
    }


def check(result: dict[str, Any]) -> dict[str, Any]:
    """Return `result` if it is a document of this schema, else raise ValueError."""
    if result.get("schema") != SCHEMA:
        raise ValueError(f"schema: expected {SCHEMA!r}, got {result.get('schema')!r}")
    if result.get("benchmark") not in CELL:
        raise ValueError(
            f"benchmark: expected one of {list(CELL)}, got {result.get('benchmark')!r}"
        )
    for field in ("machine", "settings", "ceilings"):
        if not isinstance(result.get(field), dict):
            raise ValueError(f"{field}: expected an object, got {result.get(field)!r}")
    if not isinstance(result.get("cells"), list):
        raise ValueError(f"cells: expected a list, got {result.get('cells')!r}")
    for i, cell in enumerate(result["cells"]):
        for field, kind in CELL[result["benchmark"]].items():
            value = cell.get(field)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and math.isfinite(value) if kind is float else type(value) is kind):
                raise ValueError(f"cells[{i}].{field}: expected {kind.__name__}, got {value!r}")
    return result


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check a document."""
    return check(json.loads(Path(path).read_text()))


def save(result: dict[str, Any], path: str | os.PathLike[str] | None) -> None:
    """Check a document and write it, one cell a line, so that two of them can be compared.

    Without a path it is only checked.
    """
    check(result)
    if path is None:
        return
    head = {key: value for key, value in result.items() if key != "cells"}
    cells = ",\n".join("    " + json.dumps(cell) for cell in result["cells"])
    body = json.dumps(head, indent=2)[:-2] + f',\n  "cells": [\n{cells}\n  ]\n}}\n'
    json.loads(body)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whoever is stopped while writing leaves the document that was there.
    fresh = path.with_name(path.name + ".part")
    fresh.write_text(body)
    fresh.replace(path)


def output_of(*command: str) -> str | None:
    """Return what a command prints, or None where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def machine(commit: str | None = None) -> dict[str, Any]:
    """Describe this machine and the packages in use; clocks are reported as found, never set."""
    here = Path(__file__).parent
    if commit is None:
        commit = output_of("git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12")
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "packages": versions,
        "commit": commit,
        "gpu": gpu(),
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpu() -> dict[str, Any] | None:
    """Return what nvidia-smi says of the first GPU, or None."""
    fields = {
        "name": "name",
        "driver": "driver_version",
        "sm_clock_mhz": "clocks.sm",
        "sm_clock_max_mhz": "clocks.max.sm",
        "memory_clock_mhz": "clocks.mem",
        "power_limit_w": "power.limit",
        "ecc": "ecc.mode.current",
        "memory_mib": "memory.total",
    }
    query = "--query-gpu=" + ",".join(fields.values())
    text = output_of("nvidia-smi", "--id=0", query, "--format=csv,noheader,nounits")
    if not text:
        return None
    return dict(zip(fields, map(str.strip, text.splitlines()[0].split(",")), strict=False))


class Times(NamedTuple):
    """Seconds of one call."""

    median: float
    lowest: float


def times_of(
    sample: Callable[[int], float], *, samples: int, minimum: float
) -> tuple[float, float, int]:
    """Return the median and the lowest seconds of one repetition, and how many a sample took.

    Parameters
    ----------
    sample : callable
        Runs so many repetitions and returns the seconds they took.
    samples : int
        How many times to sample.
    minimum : float
        Seconds a sample should last at least; repetitions are chosen for that.
    """
    sample(1)
    once = max(sample(2) / 2, 1e-9)
    repeats = max(1, math.ceil(minimum / once))
    times = [sample(repeats) / repeats for _ in range(samples)]
    return statistics.median(times), min(times), repeats


def walk(run: Callable[[int], Any], count: int, settings: dict[str, Any]) -> tuple[Times, int]:
    """Time calls on the CPU that go through `count` weights in turn.

    Parameters
    ----------
    run : callable
        Computes with the weight of this number.
    count : int
        Number of weights.
    settings : dict
        Of the document: how many samples, and of what length.

    Returns
    -------
    Times, int
        Of one call; and the weight that was used last.
    """
    at = 0

    def sample(repeats: int) -> float:
        nonlocal at
        start = time.perf_counter()
        for i in range(at, at + repeats):
            run(i % count)
        spent = time.perf_counter() - start
        at += repeats
        return spent

    median, lowest, _ = times_of(
        sample, samples=settings["samples"], minimum=settings["sample_ms"] * 1e-3
    )
    return Times(median, lowest), (at - 1) % count


class Progress:
    """One line on stderr: what was measured, how far along, how long it takes yet."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.monotonic()
        self.shown = self.start

    def step(self, text: str) -> None:
        self.done += 1
        spent = time.monotonic() - self.start
        left = spent / self.done * (self.total - self.done)
        line = f"[{self.done}/{self.total}] {text}  ({left:.0f} s left)"
        if sys.stderr.isatty():
            print(f"\r{line:<100}", end="\n" if self.done == self.total else "", file=sys.stderr)
        elif time.monotonic() - self.shown > 5 or self.done == self.total:
            self.shown = time.monotonic()
            print(line, file=sys.stderr, flush=True)


def choose_device(wanted: str) -> str:
    """Return "cuda" or "cpu"; "auto" takes a GPU where this build can use one."""
    from baracuda_cy import _cuda

    reason = _cuda.why_unavailable()
    if wanted == "cuda" and reason:
        raise SystemExit(f"--device cuda: {reason}")
    return wanted if wanted != "auto" else "cpu" if reason else "cuda"


def sizes(shape: str) -> tuple[int, int]:
    """Return the rows and columns of what `--shapes` takes."""
    nrows, ncols = map(int, shape.split("x"))
    return nrows, ncols


def document_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="FILE", help="write the JSON here")
    parser.add_argument("--commit", help="commit to record, where there is no git")


def common_arguments(parser: argparse.ArgumentParser) -> None:
    document_arguments(parser)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter samples")


def product_arguments(parser: argparse.ArgumentParser, kinds: Sequence[str]) -> None:
    parser.add_argument("--shapes", nargs="+", metavar="NROWSxNCOLS")
    parser.add_argument("--m", nargs="+", type=int)
    parser.add_argument("--kinds", nargs="+", choices=kinds, metavar="KIND")


def product_options(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    kinds: Mapping[str, Sequence[str]],
) -> argparse.Namespace:
    """Return the options of a benchmark that times products, all of them filled in.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        With the options that only this benchmark has.
    arguments : sequence of str or None
        The command line's; None takes them from it.
    kinds : mapping
        What there is to time, by device; what there is on the CPU there is on a GPU.
    """
    common_arguments(parser)
    product_arguments(parser, kinds["cuda"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="CPU backend")
    parser.add_argument("--rotate", type=int, metavar="MB", help="of weight copies to walk over")
    options = parser.parse_args(arguments)
    options.device = choose_device(options.device)
    cuda, known = options.device == "cuda", kinds[options.device]
    options.shapes = options.shapes or (SHAPES if cuda else SHAPES[:1])
    options.m = options.m or (MS if cuda else (1, 8))
    options.kinds = options.kinds or known
    options.rotate = options.rotate or (256 if cuda else 200)
    if unknown := set(options.kinds) - set(known):
        parser.error(
            f"--kinds on {options.device}: expected some of {', '.join(known)}, got {unknown}"
        )
    return options


def product_settings(options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Return the settings of a document of products: how they are sampled, and `more`."""
    return {
        "samples": 5 if options.quick else 11,
        "sample_ms": 1.0 if options.quick else 4.0,
        "rotate_bytes": options.rotate * 10**6,
        **more,
        "quick": options.quick,
    }
