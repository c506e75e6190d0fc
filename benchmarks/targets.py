# SPDX-License-Identifier: Apache-2.0
"""What the GPU kernels are to reach on an H100, and how far a measured document is from it."""

import statistics
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Any, NamedTuple

from harness import MS, SHAPES, sizes

GPU = "H100"
SMALL, WIDE, LONG, LARGE = map(sizes, SHAPES)

# Percent of the time of only reading the weight, kernels overlapping, by M.
PRODUCT = {
    LARGE: (95, 95, 93, 92, 80, 60),
    WIDE: (88, 88, 85, 82, 68, 50),
    LONG: (88, 88, 85, 82, 68, 50),
    SMALL: (76, 76, 72, 66, 52, 40),
}
HARDER = ("Q2_K", "Q3_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4")
LENIENCE = (5, 5, 5, 5, 10, 10)  # points less for those
FLOAT = {LARGE: 90, WIDE: 80, LONG: 80}  # of only reading, M = 1, FLOAT_BITS and more
FLOAT_BITS = 4
COPY = 90  # percent of a copy, for unpacking

# A whole call's time over ggml's, by M: the geometric mean, and any cell.
PEER = "ggml"
PEER_MEAN = (0.75, 0.70, 0.50, 0.35, 0.45, 0.60)
PEER_ANY = (1.0, 1.0, 0.9, 0.7, 0.8, 0.95)
DENSE_BITS = 6.6  # a weight of no more bits is faster than a dense one in every cell


# NF4, overlapping and not: percent of only reading at M = 1, the time over that of M = 1, and the
# time over that of bitsandbytes in any cell.
OURS, BITSANDBYTES, TORCH = "baracuda-cy", "bitsandbytes", "torch"
NF4_READ = {LARGE: 90, WIDE: 80, LONG: 80}
NF4_GROWTH = {"M = 2, 4, 8": ((2, 4, 8), 1.25), "M = 16, 32": ((16, 32), 1.5)}
NF4_OVER = 1


class Check(NamedTuple):
    """One figure beside its target; `lower` says that less is better."""

    target: str
    row: str
    column: str
    measured: float
    wanted: float
    lower: bool = False

    @property
    def short(self) -> float:
        """By how much the figure misses its target; not above 0 where it meets it."""
        return (self.measured - self.wanted) * (1 if self.lower else -1)


def shape_name(cell: dict[str, Any]) -> str:
    return f"{cell['nrows']} x {cell['ncols']}"


def bits(cell: dict[str, Any]) -> float:
    """Return the bits of one element of a cell's packed weight."""
    return 8 * cell["bytes"] / (cell["nrows"] * cell["ncols"])


def ratios(
    cells: Iterable[dict[str, Any]], peer: dict[str, Any]
) -> list[tuple[dict[str, Any], float]]:
    """Return the cells a peer has too, each with its time over the peer's."""
    theirs = {(c["format"], c["nrows"], c["ncols"], c["m"]): c["us"] for c in peer["cells"]}
    keyed = [((c["format"], c["nrows"], c["ncols"], c["m"]), c) for c in cells]
    return [(c, c["us"] / theirs[key]) for key, c in keyed if key in theirs]


def way(cell: dict[str, Any]) -> str:
    """Return how a cell's kernels were launched."""
    return "overlapping" if cell["overlap"] else "not overlapping"


def growth(cells: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """Return products of several tokens, each with its time over that of one token."""
    key = itemgetter("kind", "name", "dtype", "nrows", "ncols", "overlap")
    products = [c for c in cells if c["kind"] == "product" and c["name"] == OURS]
    single = {key(c): c["us"] for c in products if c["m"] == 1}
    several = [c for c in products if c["m"] != 1 and key(c) in single]
    return [(c, c["us"] / single[key(c)]) for c in several]


def over(cells: list[dict[str, Any]], name: str) -> list[tuple[dict[str, Any], float]]:
    """Return our cells that another library has too, each with its time over theirs.

    The product with the bits of every GPU stands beside the one product that others have.
    """

    def key(c: dict[str, Any]) -> tuple[Any, ...]:
        kind = "product" if c["kind"] == "exact" else c["kind"]
        return kind, c["dtype"], c["nrows"], c["ncols"], c["m"], c.get("threads")

    theirs = {key(c): c["us"] for c in cells if c["name"] == name}
    ours = [c for c in cells if c["name"] == OURS]
    return [(c, c["us"] / theirs[key(c)]) for c in ours if key(c) in theirs]


def nf4_checks(result: dict[str, Any]) -> Iterator[Check]:
    """Yield every figure of a document of NF4 that has a target, beside it."""

    def check(target: str, c: dict[str, Any], *figures: Any) -> Check:
        column = f"M = {c['m']}, {way(c)}" if "overlap" in c else c["kind"]
        return Check(target, f"{shape_name(c)}, {c['dtype']}", column, *figures)

    cells = [c for c in result["cells"] if c["device"] == "cuda"]
    for c in cells:
        shape = c["nrows"], c["ncols"]
        if c["name"] == OURS and c["kind"] == "product" and c["m"] == 1 and shape in NF4_READ:
            target = "product of one token: % of only reading"
            yield check(target, c, c["percent_of_read"], NF4_READ[shape])
    for name, (ms, wanted) in NF4_GROWTH.items():
        for c, ratio in growth(cells):
            if c["m"] in ms:
                yield check(f"product, {name}: time over that of M = 1", c, ratio, wanted, True)
    for c, ratio in over(cells, BITSANDBYTES):
        yield check(f"{c['kind']}: time over {BITSANDBYTES}", c, ratio, NF4_OVER, True)
    for c in cells:
        if c["name"] == OURS and c["kind"] == "dequantize":
            yield check("dequantize: % of a copy", c, c["percent_of_copy"], COPY)


def checks(result: dict[str, Any], peers: Iterable[dict[str, Any]]) -> Iterator[Check]:
    """Yield every figure of a document that has a target, beside it."""
    if result["benchmark"] == "nf4":
        yield from nf4_checks(result)
        return
    cells = [c for c in result["cells"] if c["device"] == "cuda"]
    tabled = [c for c in cells if c.get("overlap") and c["m"] in MS]
    for c in tabled:
        shape, at = (c["nrows"], c["ncols"]), MS.index(c["m"])
        row, column = c["format"], f"M = {c['m']}"
        if c["kind"] == "product" and shape in PRODUCT:
            wanted = PRODUCT[shape][at] - (LENIENCE[at] if row in HARDER else 0)
            target = f"product, {shape_name(c)}: % of only reading"
            yield Check(target, row, column, c["percent_of_read"], wanted)
    calls = [c for c in tabled if c["kind"] == "call"]
    for peer in (p for p in peers if p["peer"] == PEER):
        over = f"call over {PEER}"
        compared = ratios(calls, peer)
        for at, m in enumerate(MS):
            here = [ratio for c, ratio in compared if c["m"] == m]
            if here:
                mean = statistics.geometric_mean(here)
                target = f"{over}: geometric mean"
                yield Check(target, "all", f"M = {m}", mean, PEER_MEAN[at], True)
        for c, ratio in compared:
            target = f"{over}: any cell of {shape_name(c)}"
            wanted = PEER_ANY[MS.index(c["m"])]
            yield Check(target, c["format"], f"M = {c['m']}", ratio, wanted, True)
    for c in calls:
        if "dense_ratio" in c and bits(c) <= DENSE_BITS:
            target = f"call, {shape_name(c)}: times as fast as float16 torch.matmul"
            yield Check(target, c["format"], f"M = {c['m']}", c["dense_ratio"], 1)
    for c in cells:
        shape = c["nrows"], c["ncols"]
        if c["kind"] == "float" and shape in FLOAT and bits(c) >= FLOAT_BITS:
            target = "activations not staged, M = 1: % of only reading"
            yield Check(target, c["format"], shape_name(c), c["percent_of_read"], FLOAT[shape])
        if c["kind"] == "dequantize":
            target = f"unpacking to {c['output']}: % of a copy"
            yield Check(target, c["format"], shape_name(c), c["percent_of_copy"], COPY)
