# SPDX-License-Identifier: Apache-2.0
"""Turn benchmark documents into Markdown tables and a plot.

    python benchmarks/render.py benchmarks/results/*.json
    python benchmarks/render.py benchmarks/results/h100.json --plot docs/h100.svg
    python benchmarks/render.py --update README.md docs/benchmarks.md

`--update` rewrites what stands between ``<!-- benchmark: results/h100.json -->`` and
``<!-- end benchmark -->``, so that every figure in a page comes out of a measured document; with
``results/h100.json summary`` it is the document in short.
"""

import argparse
import itertools
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import harness
import targets

HERE = Path(__file__).parent
BLOCK = re.compile(
    r"(<!-- benchmark: (\S+)( summary)? -->\n).*?(<!-- end benchmark -->)", re.DOTALL
)

Key = tuple[Any, ...]


def distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def table(title: str, cells: dict[Key, str], corner: str, head: Callable[[Key], str]) -> str:
    """Return a titled Markdown table of `cells`: rows by a key's first part, columns by the rest.

    Parameters
    ----------
    title : str
        What stands above.
    cells : dict
        Text by key; a key that is missing is left empty.
    corner : str
        Head of the first column.
    head : callable
        Head of a column, from the rest of a key.
    """
    columns = distinct(key[1:] for key in cells)
    lines = [[corner, *map(head, columns)], [":--"] + ["--:"] * len(columns)]
    lines += [
        [str(row), *(cells.get((row, *column), "") for column in columns)]
        for row in distinct(key[0] for key in cells)
    ]
    return f"#### {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def column_m(column: Key) -> str:
    return f"M = {column[0]}"


def column_threads(column: Key) -> str:
    m, threads = column
    return f"M = {m}, {threads} thread{'s' * (threads > 1)}"


def peers(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield other libraries' recorded figures: of the same GPU, or of the CPU they name."""
    gpu = (result["machine"]["gpu"] or {}).get("name")
    devices = {cell["device"] for cell in result["cells"]}
    for path in sorted((HERE / "peers").glob("*.json")):
        peer = json.loads(path.read_text())
        same = peer["device"] == "cpu" or bool(gpu and gpu in peer["machine"])
        if same and peer["device"] in devices:
            yield peer


def machine_line(result: dict[str, Any]) -> str:
    machine = result["machine"]
    gpu = machine["gpu"]
    parts = [f"{machine['cpu']}, {machine['cpus']} CPUs"]
    if gpu and any(cell["device"] == "cuda" for cell in result["cells"]):
        parts = [gpu["name"]]
        if "driver" in gpu:
            parts += [f"driver {gpu['driver']}", f"SM clock as found {gpu['sm_clock_mhz']} MHz"]
    parts.append(f"Python {machine['python']}")
    parts += [f"{name} {version}" for name, version in machine["packages"].items()]
    parts += [f"commit {machine['commit']}", result["date"][:10]]
    quick = " A quick run: fewer and shorter samples." if result["settings"].get("quick") else ""
    return ", ".join(parts) + "." + quick + "\n"


def ceilings_line(result: dict[str, Any]) -> str:
    c = result["ceilings"]
    return (
        f"In the same process: {c['read_gb_s']:.0f} GB/s read ({c['read_overlap_gb_s']:.0f} where "
        f"kernels overlap), {c['copy_gb_s']:.0f} GB/s copied (read + written), "
        f"{c['empty_us']:.2f} µs for an empty kernel of a graph "
        f"({c['empty_overlap_us']:.2f} where kernels overlap).\n"
    )


def us_text(us: float) -> str:
    return f"{us:.2f}" if us < 10 else f"{us:.1f}"


def column_shape(column: Key) -> str:
    return ", ".join(map(str, column))


def pairs_of(cells: list[dict[str, Any]]) -> dict[Key, list[dict[str, Any]]]:
    """Return cells by format and M, the overlapping one before the other."""
    pairs: dict[Key, list[dict[str, Any]]] = {}
    for c in sorted(cells, key=lambda c: not c["overlap"]):
        pairs.setdefault((c["format"], c["m"]), []).append(c)
    return pairs


def product_text(pair: list[dict[str, Any]]) -> str:
    us = " / ".join(us_text(c["us"]) for c in pair)
    percent = " / ".join(f"{c['percent_of_read']:.0f}" for c in pair)
    return f"{us} ({percent} %)"


def call_text(pair: list[dict[str, Any]]) -> str:
    ratio = f" ({pair[0]['dense_ratio']:.2f}x)" if "dense_ratio" in pair[0] else ""
    return " / ".join(us_text(c["us"]) for c in pair) + ratio


def of_shape(result: dict[str, Any], cells: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the tables of a GPU's products and calls of one shape."""
    name = targets.shape_name(cells[0])
    products = pairs_of([c for c in cells if c["kind"] == "product"])
    calls = pairs_of([c for c in cells if c["kind"] == "call"])
    if products:
        yield table(
            f"{name}, product of staged activations, overlapping / not: µs (% of only reading)",
            {key: product_text(pair) for key, pair in products.items()},
            "format",
            column_m,
        )
    if calls:
        texts = {key: call_text(pair) for key, pair in calls.items()}
        for (_, m), pair in calls.items():
            if "dense_us" in pair[0]:
                texts["torch float16", m] = us_text(pair[0]["dense_us"])
        dense = any("dense_us" in pair[0] for pair in calls.values())
        unit = "µs (times as fast as torch float16)" if dense else "µs"
        yield table(
            f"{name}, whole call, float16 in and out, overlapping / not: {unit}",
            texts,
            "format",
            column_m,
        )
    for peer in peers(result):
        compared = targets.ratios((pair[0] for pair in calls.values()), peer)
        texts = {
            (c["format"], c["m"]): f"{us_text(c['us'] / ratio)} ({ratio:.2f})"
            for c, ratio in compared
        }
        if texts:
            yield table(
                f"{name}, {peer['peer']} {peer['version']}, recorded on {peer['machine']}: "
                "µs (the time of the call above over it)",
                texts,
                "format",
                column_m,
            )


def of_gpu(result: dict[str, Any]) -> Iterator[str]:
    """Yield the tables of a GPU: shape by shape, then what has a table for all shapes."""
    cells = [c for c in result["cells"] if c["device"] == "cuda"]
    multiplied = [c for c in cells if c["kind"] in ("product", "call")]
    for shape in distinct(map(targets.shape_name, multiplied)):
        yield from of_shape(result, [c for c in multiplied if targets.shape_name(c) == shape])
    yield from of_comparisons(result)
    for kind, title, key, text in (
        (
            "float",
            "One token, activations not staged, overlapping: µs (% of only reading)",
            lambda c: (c["format"], targets.shape_name(c)),
            lambda c: f"{us_text(c['us'])} ({c['percent_of_read']:.0f} %)",
        ),
        (
            "chain",
            "Overlapping calls in a row, each on the output of the one before it: "
            "µs each (% of only reading)",
            lambda c: (c["format"], targets.shape_name(c), f"M = {c['m']}"),
            lambda c: f"{us_text(c['us'])} ({c['percent_of_read']:.0f} %)",
        ),
        (
            "dequantize",
            "Unpacking the weight: µs (% of a copy that reads and writes as much)",
            lambda c: (c["format"], targets.shape_name(c), c["output"]),
            lambda c: f"{us_text(c['us'])} ({c['percent_of_copy']:.0f} %)",
        ),
    ):
        texts = {key(c): text(c) for c in cells if c["kind"] == kind}
        if texts:
            yield table(title, texts, "format", column_shape)
    if targets.GPU in (result["machine"]["gpu"] or {}).get("name", ""):
        yield from of_targets(list(targets.checks(result, peers(result))))


def of_comparisons(result: dict[str, Any]) -> Iterator[str]:
    """Yield the table of overlapping calls beside what others take, over all formats and shapes."""
    calls = [c for c in result["cells"] if c["kind"] == "call" and c.get("overlap")]
    dense = [(c, 1 / c["dense_ratio"]) for c in calls if "dense_ratio" in c]
    others = [(f"{p['peer']} as recorded", targets.ratios(calls, p)) for p in peers(result)]
    texts = {}
    for name, compared in (*others, ("float16 torch.matmul", dense)):
        for m in distinct(c["m"] for c, _ in compared):
            here = [(ratio, c) for c, ratio in compared if c["m"] == m]
            worst, cell = max(here, key=lambda one: one[0])
            mean = statistics.geometric_mean(ratio for ratio, _ in here)
            texts[f"{name}: geometric mean", m] = f"{mean:.2f}"
            where = f"{cell['format']}, {targets.shape_name(cell)}"
            texts[f"{name}: highest", m] = f"{worst:.2f} ({where})"
    if texts:
        title = "Time of a whole overlapping call over that of others, all formats and shapes"
        yield table(title, texts, "over", column_m)


def of_targets(checks: list[targets.Check], corner: str = "format") -> Iterator[str]:
    """Yield the table of the targets, then the cells that miss them; `corner` heads their rows."""

    def verdict(check: targets.Check) -> str:
        return f"misses by {check.short:.3g}" if check.short > 0 else "meets"

    texts, missed = {}, []
    for target in distinct(check.target for check in checks):
        here = [check for check in checks if check.target == target]
        rows = {check.row for check in here if check.short > 0}
        misses = {
            (c.row, c.column): f"{c.measured:.3g} (misses {c.wanted:g} by {c.short:.2g})"
            if c.short > 0
            else ""
            for c in here
            if c.row in rows
        }
        worst = max(here, key=lambda check: check.short)
        texts[target, "cells"] = str(len(here))
        texts[target, "meet it"] = str(sum(check.short <= 0 for check in here))
        texts[target, "furthest from it"] = f"{worst.row}, {worst.column}: {verdict(worst)}"
        if misses:
            missed.append(table(f"Below target: {target}", misses, corner, column_shape))
    if texts:
        yield table("Targets", texts, "target", column_shape)
    yield from missed


def of_cpu(result: dict[str, Any]) -> Iterator[str]:
    """Yield the table of the CPU backend's calls, a recorded peer's time in brackets."""
    cells = [c for c in result["cells"] if c["device"] == "cpu" and c["kind"] == "call"]
    for shape in distinct((c["nrows"], c["ncols"]) for c in cells):
        texts = {
            (c["format"], c["m"], c["threads"]): f"{c['us'] / 1e3:.2f} ms, {c['gb_s']:.1f} GB/s"
            for c in cells
            if (c["nrows"], c["ncols"]) == shape
        }
        notes = ""
        for peer in peers(result):
            for c in peer["cells"]:
                key = c["format"], c["m"], c["threads"]
                if (c["nrows"], c["ncols"]) == shape and key in texts:
                    texts[key] += f" [{c['us'] / 1e3:.2f} ms]"
            notes += (
                f"\nIn brackets {peer['peer']} {peer['version']} as recorded on another machine, "
                f"{peer['machine']}: {peer['method']}.\n"
            )
        title = "{} x {} on the CPU, whole call, float32 in and out".format(*shape)
        yield table(title, texts, "format", column_threads) + notes


def ways(cells: Iterable[dict[str, Any]], text: Callable[[dict[str, Any]], str]) -> str:
    """Return the text of the cell that overlaps and of the one that does not."""
    return " / ".join(text(c) for c in sorted(cells, key=lambda c: not c["overlap"]))


def percent_of(cell: dict[str, Any]) -> str:
    return f"{cell['percent_of_read']:.0f}"


def us_of(cell: dict[str, Any]) -> str:
    return us_text(cell["us"])


def grouped(cells: Iterable[dict[str, Any]], *fields: str) -> dict[Key, list[dict[str, Any]]]:
    """Return cells by shape and these fields."""
    groups: dict[Key, list[dict[str, Any]]] = {}
    for c in cells:
        key = (targets.shape_name(c), *(f"M = {c[f]}" if f == "m" else c[f] for f in fields))
        groups.setdefault(key, []).append(c)
    return groups


def of_nf4_products(result: dict[str, Any], cells: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the tables of products with activations of one type: `cells` are of that type."""
    ours = [c for c in cells if c["name"] == targets.OURS]
    dtype = cells[0]["dtype"]
    if ours:
        texts = {
            key: f"{ways(pair, us_of)} ({ways(pair, percent_of)} %)"
            for key, pair in grouped(ours, "m").items()
        }
        title = f"Product, {dtype} in and out, overlapping / not: µs (% of only reading)"
        yield table(title, texts, "shape", column_shape)
    growth = [c | {"ratio": ratio} for c, ratio in targets.growth(ours)]
    if growth:
        title = f"Product, {dtype}, overlapping / not: time over that of M = 1"
        yield ratio_table(title, growth, "m")
    for name in (targets.BITSANDBYTES, targets.TORCH):
        theirs = {key: c["us"] for key, (c,) in grouped(by_name(cells, name), "m").items()}
        compared = [c | {"ratio": ratio} for c, ratio in targets.over(cells, name)]
        ratios = {key: ways(pair, ratio_of) for key, pair in grouped(compared, "m").items()}
        texts = {
            key: us_text(us) + (f" ({ratios[key]})" if key in ratios else "")
            for key, us in theirs.items()
        }
        if texts:
            version = result["machine"]["packages"].get(name, "")
            whose = f"{name} {version}".strip()
            if name == targets.TORCH:
                whose = f"dense torch.matmul, {whose}"
            title = f"Product, {dtype}, {whose}: µs (the time above over it, overlapping / not)"
            yield table(title, texts, "shape", column_shape)


def by_name(cells: Iterable[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [c for c in cells if c["name"] == name]


def ratio_of(cell: dict[str, Any]) -> str:
    return f"{cell['ratio']:.2f}"


def ratio_table(title: str, cells: list[dict[str, Any]], *fields: str) -> str:
    texts = {key: ways(pair, ratio_of) for key, pair in grouped(cells, *fields).items()}
    return table(title, texts, "shape", column_shape)


def of_nf4_gpu(result: dict[str, Any]) -> Iterator[str]:
    """Yield the tables of NF4 on a GPU, each over all shapes."""
    cells = [c for c in result["cells"] if c["device"] == "cuda"]
    products = [c for c in cells if c["kind"] == "product"]
    for dtype in distinct(c["dtype"] for c in products if c["name"] == targets.OURS):
        yield from of_nf4_products(result, [c for c in products if c["dtype"] == dtype])
    compared = [c | {"ratio": r} for c, r in targets.over(cells, targets.BITSANDBYTES)]
    for kind, title in (
        ("exact", "Product with the bits of every GPU and the CPU"),
        ("nested", "Product with nested absmax"),
    ):
        ours = by_name([c for c in cells if c["kind"] == kind], targets.OURS)
        if ours:
            texts = {key: ways(pair, us_of) for key, pair in grouped(ours, "dtype", "m").items()}
            yield table(f"{title}, overlapping / not: µs", texts, "shape", column_shape)
            default = {same(c): c["us"] for c in products if c["name"] == targets.OURS}
            cost = [c | {"ratio": c["us"] / default[same(c)]} for c in ours if same(c) in default]
            if cost:
                yield ratio_table(f"{title}: time over the default's", cost, "dtype", "m")
            if here := [c for c in compared if c["kind"] == kind]:
                over = f"{title}: time over {targets.BITSANDBYTES}"
                yield ratio_table(over, here, "dtype", "m")
    unpacked = [c for c in cells if c["kind"] == "dequantize"]
    if unpacked:
        texts = {
            key: f"{us_of(c)} ({c['percent_of_copy']:.0f} %)"
            for key, (c,) in grouped(unpacked, "name", "dtype").items()
        }
        title = "Unpacking the weight: µs (% of a copy that reads and writes as much)"
        yield table(title, texts, "shape", column_shape)
    packed = [c for c in cells if c["kind"] == "quantize"]
    if packed:
        texts = {
            key: f"{us_of(c)} ({c['gb_s']:.0f})"
            for key, (c,) in grouped(packed, "name", "dtype").items()
        }
        yield table("Packing a weight: µs (GB/s, read and written)", texts, "shape", column_shape)
    if targets.GPU in (result["machine"]["gpu"] or {}).get("name", ""):
        yield from of_targets(list(targets.checks(result, ())), "shape")


def same(c: dict[str, Any]) -> Key:
    """Return what the cells of one problem have in common, whatever the kernel."""
    return c["dtype"], c["nrows"], c["ncols"], c["m"], c["overlap"]


def of_nf4_cpu(result: dict[str, Any]) -> Iterator[str]:
    """Yield the table of NF4 products on the CPU."""
    cells = [c for c in result["cells"] if c["device"] == "cpu"]
    for shape in distinct(map(targets.shape_name, cells)):
        texts = {
            (c["name"], c["m"], c["threads"]): f"{c['us'] / 1e3:.2f} ms, {c['gb_s']:.1f} GB/s"
            for c in cells
            if targets.shape_name(c) == shape
        }
        title = f"{shape} on the CPU, float32 in and out"
        yield table(title, texts, "whose", column_threads)


def summary_nf4(result: dict[str, Any]) -> Iterator[str]:
    """Yield a GPU's document of NF4 in short: its products, and the time over that of others."""
    cells = [c for c in result["cells"] if c["device"] == "cuda"]
    labels = {"product": "", "exact": ", the bits of the CPU"}
    ours = [c for c in cells if c["kind"] in labels and c["name"] == targets.OURS]
    spans: dict[Key, list[float]] = {}
    for c in ours:
        if c["overlap"]:
            label = c["dtype"] + labels[c["kind"]]
            spans.setdefault((label, c["m"]), []).append(c["percent_of_read"])
    count = len(distinct(map(targets.shape_name, ours)))
    title = f"NF4 product: % of the speed of only reading, lowest to highest of {count} shapes"
    texts = {key: f"{min(span):.0f} to {max(span):.0f}" for key, span in spans.items()}
    if texts:
        yield table(title, texts, "activations", column_m)
    products = [c for c in cells if c["kind"] == "product"]
    texts = {}
    for name, label in (
        (targets.BITSANDBYTES, targets.BITSANDBYTES),
        (targets.TORCH, "dense torch.matmul"),
    ):
        compared = [(c, r) for c, r in targets.over(products, name) if c["overlap"]]
        for m in distinct(c["m"] for c, _ in compared):
            here = [(ratio, c) for c, ratio in compared if c["m"] == m]
            worst, cell = max(here, key=lambda one: one[0])
            where = f"{cell['dtype']}, {targets.shape_name(cell)}"
            mean = statistics.geometric_mean(ratio for ratio, _ in here)
            texts[f"{label}: geometric mean", m] = f"{mean:.2f}"
            texts[f"{label}: highest", m] = f"{worst:.2f} ({where})"
    if texts:
        title = "Time of an overlapping NF4 product over that of others, all types and shapes"
        yield table(title, texts, "over", column_m)
    spans = {}
    for c in cells:
        if c["kind"] == "dequantize":
            spans.setdefault((c["name"], c["dtype"]), []).append(c["percent_of_copy"])
    if spans:
        title = "Unpacking NF4: % of a copy, lowest to highest of the shapes"
        texts = {key: f"{min(span):.0f} to {max(span):.0f}" for key, span in spans.items()}
        yield table(title, texts, "whose", column_shape)


def of_calls(result: dict[str, Any]) -> Iterator[str]:
    """Yield the table of host times."""
    for device in distinct(c["device"] for c in result["cells"]):
        yield table(
            f"Host time of a call on {device}: µs, median (lowest)",
            {
                (c["call"], c["array"]): f"{c['us']:.2f} ({c['us_lowest']:.2f})"
                for c in result["cells"]
                if c["device"] == device
            },
            "call",
            lambda column: column[0],
        )


def of_counters(result: dict[str, Any]) -> Iterator[str]:
    """Yield a table for each shape of what keeps the GPU busy."""
    for shape, cells in grouped(result["cells"]).items():
        texts = {}
        for c in cells:
            busy = " / ".join(f"{c[name]:.0f}" for name in ("dram", "shared", "issue", "alu"))
            column = "float plan, M = 1" if c["kind"] == "float" else f"M = {c['m']}"
            texts[c["format"], column] = f"{busy}; {c['instructions']:.0f}"
        title = f"{shape[0]}: DRAM / shared memory and L1 / issue slots / ALU, % busy; instructions"
        yield table(title, texts, "format", column_shape)


def summary(result: dict[str, Any]) -> str:
    """Return a GPU's document in short: percent of only reading, and what others take."""
    if result["benchmark"] == "nf4":
        return "\n".join([machine_line(result), *summary_nf4(result)])
    spans: dict[Key, list[dict[str, Any]]] = {}
    for c in result["cells"]:
        if c["kind"] == "product" and c.get("overlap"):
            label = f"{c['format']}, {targets.bits(c):g} bits"
            spans.setdefault((label, c["m"]), []).append(c)
    texts = {}
    for key, cells in spans.items():
        percents = [c["percent_of_read"] for c in cells]
        texts[key] = f"{min(percents):.0f} to {max(percents):.0f}"
    title = (
        "Product of staged activations: % of the speed of only reading, "
        f"lowest to highest of {len(distinct(map(targets.shape_name, result['cells'])))} shapes"
    )
    parts = [machine_line(result), table(title, texts, "format", column_m), *of_comparisons(result)]
    return "\n".join(parts)


def tables(result: dict[str, Any]) -> str:
    """Return a document as Markdown: the machine, then its tables."""
    parts = [machine_line(result)]
    if result["ceilings"]:
        parts.append(ceilings_line(result))
    if result["benchmark"] == "gguf":
        parts += [*of_gpu(result), *of_cpu(result)]
    elif result["benchmark"] == "nf4":
        parts += [*of_nf4_gpu(result), *of_nf4_cpu(result)]
    elif result["benchmark"] == "counters":
        parts += of_counters(result)
    else:
        parts += of_calls(result)
    return "\n".join(parts)


def publish(result: dict[str, Any], output: str | None) -> dict[str, Any]:
    """Write a document that was measured where it was asked for, and print it; return it."""
    harness.save(result, output)
    print(tables(result))
    return result


def update(page: str, base: Path = HERE) -> str:
    """Return a page with its benchmark blocks rendered from the documents they name."""

    def block(m: re.Match[str]) -> str:
        text = (summary if m[3] else tables)(harness.load(base / m[2]))
        return f"{m[1]}\n{text}\n{m[4]}"

    return BLOCK.sub(block, page)


def percents(result: dict[str, Any]) -> dict[str, dict[Key, float]]:
    """Return, by what was timed, percent of only reading by shape, format and M.

    Kernels overlap. A recorded peer is held against the same kernel that only reads.
    """
    found: dict[str, dict[Key, float]] = {}
    read: dict[Key, float] = {}
    for name, kind in (("product of staged activations", "product"), ("whole call", "call")):
        cells = [c for c in result["cells"] if c["kind"] == kind and c.get("overlap")]
        keyed = {(targets.shape_name(c), c["format"], c["m"]): c for c in cells}
        found[name] = {key: c["percent_of_read"] for key, c in keyed.items()}
        read |= {key: c["read_us"] for key, c in keyed.items()}
    for peer in peers(result):
        keyed = {(targets.shape_name(c), c["format"], c["m"]): c["us"] for c in peer["cells"]}
        name = f"{peer['peer']} as recorded, whole call"
        found[name] = {key: 100 * read[key] / us for key, us in keyed.items() if key in read}
    return {name: cells for name, cells in found.items() if cells}


def plot(result: dict[str, Any], path: str) -> None:
    """Draw percent of only reading by format and M: a column a shape, a row what was timed."""
    import matplotlib as mpl

    mpl.use("svg" if path.endswith(".svg") else "agg")
    from matplotlib import pyplot as plt

    found = percents(result) if result["benchmark"] == "gguf" else {}
    if not found:
        raise SystemExit("nothing to draw: the document has no overlapping products or calls")
    keys = distinct(key for cells in found.values() for key in cells)
    shapes, formats, ms = (distinct(key[i] for key in keys) for i in range(3))
    style = {
        "font.size": 7,
        "font.sans-serif": ["DejaVu Sans"],
        "svg.fonttype": "none",
        "svg.hashsalt": "benchmark",
    }
    with mpl.rc_context(style):
        size = 1 + 2.4 * len(shapes), 0.6 + (0.5 + 0.16 * len(formats)) * len(found)
        figure, axes = plt.subplots(
            len(found), len(shapes), figsize=size, squeeze=False, layout="constrained",
            sharex=True, sharey=True,
        )  # fmt: skip
        for row, (name, cells) in zip(axes, found.items(), strict=True):
            for axis, shape in zip(row, shapes, strict=True):
                values = [[cells.get((shape, f, m), float("nan")) for m in ms] for f in formats]
                axis.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
                for y, x in itertools.product(range(len(formats)), range(len(ms))):
                    value = values[y][x]
                    if value == value:
                        color = "white" if value < 60 else "black"
                        axis.text(x, y, f"{value:.0f}", color=color, ha="center", va="center")
                axis.set_xticks(range(len(ms)), ms)
                axis.set_yticks(range(len(formats)), formats)
                axis.tick_params(length=0)
            row[0].set_ylabel(name)
        for axis, shape in zip(axes[0], shapes, strict=True):
            axis.set_title(shape)
        for axis in axes[-1]:
            axis.set_xlabel("M (tokens)")
        gpu = (result["machine"]["gpu"] or {}).get("name", "")
        figure.suptitle(f"% of the speed of a kernel that only reads the weight, {gpu}")
        figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)
        plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("documents", nargs="*", metavar="JSON")
    parser.add_argument("--update", nargs="+", default=[], metavar="PAGE", help="pages to render")
    parser.add_argument("--plot", metavar="FILE", help="draw the first document; needs matplotlib")
    options = parser.parse_args(arguments)
    for path in options.documents:
        print(tables(harness.load(path)))
    for path in map(Path, options.update):
        path.write_text(update(path.read_text()))
    if options.plot:
        plot(harness.load(options.documents[0]), options.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
