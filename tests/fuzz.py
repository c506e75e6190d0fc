# SPDX-License-Identifier: Apache-2.0
"""Random problems on a GPU, bit for bit against the CPU backend: `make fuzz`.

Rows are near the numbers where another kernel is chosen, columns are any that a format allows, and
tokens are around those that a tile has. NF4's default path, whose order of summation is the GPU's
own, is compared with single tokens and with the kernels that need no workspace. Several processes
with different seeds find more, and so does `compute-sanitizer` in front of one.
"""

import argparse
import collections
import sys
import time

import numpy as np
from problems import (
    FLOATS,
    FORMATS,
    Backend,
    GgufWeight,
    Nf4Weight,
    bits,
    block_size,
    random_activations,
)

import baracuda_cy as bcy
from baracuda_cy import _cuda

TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 20, 24, 31, 32, 33, 40, 63, 64, 65)
ROWS = (512, 1024, 2048, 2560, 3072, 3584, 4096, 4608, 5120, 8192, 9216, 9728)  # of models
MOST_COLUMNS, MOST_TERMS = 8192, 40_000_000  # the CPU backend computes each of them, too
TILES = (1 / 4, 1 / 3, 1 / 2, 1, 2, 2.5, 3, 4.4, 6, 8)  # of 16 rows, to a multiprocessor
CPU, GPU = Backend("cpu"), Backend("cuda")


def random_rows(rng):
    tiles = rng.choice(TILES) * _cuda.multiprocessors() + rng.integers(-2, 3)
    near = 16 * tiles + rng.integers(-8, 8)
    rows = rng.choice([rng.integers(1, 300), rng.integers(1, 6000), near, rng.choice(ROWS)])
    return max(1, int(rows))


def random_columns(rng, multiple, terms):
    """`terms`: of each column."""
    most = max(1, min(MOST_COLUMNS, MOST_TERMS // terms) // multiple)
    columns = int(rng.integers(1, most + 1)) * multiple
    whole = columns // 2048 * 2048  # rounds of units: rows on 16-byte boundaries
    return whole if whole > 0 and whole % multiple == 0 and rng.integers(3) == 0 else columns


def random_gguf(rng, n, terms):
    name = str(rng.choice(FORMATS))
    k = random_columns(rng, block_size(name), terms)
    weight = GgufWeight(n, k, name, int(rng.integers(99)))
    if rng.integers(6) == 0:
        weight.any_scales(rng)
    return weight


def random_nf4(rng, n, terms):
    blocks, nested = int(rng.choice([32, 64, 128])), rng.choice([None, 256])
    return Nf4Weight(n, random_columns(rng, 64, terms), blocks, nested=nested)


def unpack(backend, weight, kind):
    y = backend.empty((weight.n, weight.k), kind)
    weight.unpacking(backend.device, kind).run(weight.tensor(backend), y)
    return bits(backend.get(y))


def differs_unpacked(rng, n, m, kind):
    weight = rng.choice([random_gguf, random_nf4])(rng, n, 8)
    return f"{weight.tensor()!r}, {kind}", (
        unpack(GPU, weight, kind) != unpack(CPU, weight, kind)
    ).any()


def differs_multiplied(rng, n, m, kind):
    """Where the bits are those of the CPU."""
    weight = rng.choice([random_gguf, random_gguf, random_nf4])(rng, n, n * m)
    x = random_activations(m, weight.k, kind, int(rng.integers(99)))
    how = {"overlap": bool(rng.integers(2))}
    if isinstance(weight, Nf4Weight):
        how["bit_stable_across_hardware"] = True
    elif rng.integers(3) == 0:
        how["activations"] = "float"
    got = weight.product(GPU, x, preference=bcy.PlanPreference(**how))
    asked = bcy.PlanPreference(**{key: it for key, it in how.items() if key != "overlap"})
    want = weight.product(CPU, x, preference=asked)
    return f"{weight.tensor()!r}, m={m}, {kind}, {how}", (bits(got) != bits(want)).any()


def differs_by_itself(rng, n, m, kind):
    weight = random_nf4(rng, n, n * m)
    kind = "bfloat16" if kind == "bfloat16" else "float16"
    x = random_activations(m, weight.k, kind, int(rng.integers(99)))
    got = bits(weight.product(GPU, x))
    alone = GPU.empty((m, n), kind)
    weight.plan("cuda", m, kind).run(weight.tensor(GPU), GPU.put(x), alone)
    t = int(rng.integers(m))
    single = bits(weight.product(GPU, x[t : t + 1]))
    differs = (got != bits(GPU.get(alone))).any() or (got[t : t + 1] != single).any()
    return f"{weight.tensor()!r}, m={m}, token {t}, {kind}", differs


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rng, end = np.random.default_rng(options.seed), time.monotonic() + options.seconds
    kinds = (differs_multiplied, differs_multiplied, differs_by_itself, differs_unpacked)
    count: collections.Counter[str] = collections.Counter()
    failures = 0
    while time.monotonic() < end:
        differs, kind = rng.choice(kinds), str(rng.choice(list(FLOATS)))
        n, m = random_rows(rng), int(rng.choice(TOKENS))
        problem, different = differs(rng, n, m, kind)
        count[differs.__name__] += 1
        if different:
            failures += 1
            print(f"{differs.__name__}: {problem}", flush=True)
    print(f"seed {options.seed}: {dict(count)}, {failures} failures")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
