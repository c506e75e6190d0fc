# SPDX-License-Identifier: Apache-2.0
"""Turn benchmark documents into Markdown tables and a plot.

    python benchmarks/render.py benchmarks/results/*.json
    python benchmarks/render.py benchmarks/results/h100.json --plot h100.svg
    python benchmarks/render.py --update README.md docs/benchmarks.md

`--update` rewrites what stands between ``<!-- benchmark: results/h100.json -->`` and
``<!-- end benchmark -->``, so that every figure in a page comes out of a measured document.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import harness

HERE = Path(__file__).parent
BLOCK = re.compile(r"(<!-- benchmark: (\S+) -->\n).*?(<!-- end benchmark -->)", re.DOTALL)

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
        f"In the same process: {c['read_gb_s']:.0f} GB/s read, {c['copy_gb_s']:.0f} GB/s copied "
        f"(read + written), {c['empty_node_us']:.2f} µs for an empty kernel of a graph.\n"
    )


def product_text(cell: dict[str, Any]) -> str:
    return f"{cell['us']:.1f} ({cell['gb_s']:.0f}, {cell['percent_of_read']:.0f} %)"


def call_text(cell: dict[str, Any]) -> str:
    ratio = f" ({cell['dense_ratio']:.2f}x)" if "dense_ratio" in cell else ""
    return f"{cell['us']:.1f}{ratio}"


def of_gpu(result: dict[str, Any]) -> Iterator[str]:
    """Yield the tables of a GPU's products and calls, shape by shape."""
    cells = [c for c in result["cells"] if c["device"] == "cuda"]
    for shape in distinct((c["nrows"], c["ncols"]) for c in cells):
        here = [c for c in cells if (c["nrows"], c["ncols"]) == shape]
        name = "{} x {}".format(*shape)
        calls = {(c["format"], c["m"]): c for c in here if c["kind"] == "call"}
        products = {(c["format"], c["m"]): c for c in here if c["kind"] == "product"}
        if products:
            yield table(
                f"{name}, product of staged activations: µs (GB/s of weights, % of only reading)",
                {key: product_text(c) for key, c in products.items()},
                "format",
                column_m,
            )
        if calls:
            texts = {key: call_text(c) for key, c in calls.items()}
            for (_, m), c in calls.items():
                if "dense_us" in c:
                    texts["torch float16", m] = f"{c['dense_us']:.1f}"
            dense = any("dense_us" in c for c in calls.values())
            unit = "µs (times as fast as torch float16)" if dense else "µs"
            yield table(
                f"{name}, whole call, float16 in and out: {unit}",
                texts,
                "format",
                column_m,
            )
        for peer in peers(result):
            theirs = {
                (c["format"], c["m"]): c["us"]
                for c in peer["cells"]
                if (c["nrows"], c["ncols"]) == shape
            }
            texts = {
                key: f"{theirs[key]:.1f} ({theirs[key] / c['us']:.2f})"
                for key, c in calls.items()
                if key in theirs
            }
            if texts:
                yield table(
                    f"{name}, {peer['peer']} {peer['version']}, recorded on {peer['machine']}: "
                    "µs (over the time of the call above)",
                    texts,
                    "format",
                    column_m,
                )


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


def tables(result: dict[str, Any]) -> str:
    """Return a document as Markdown: the machine, then its tables."""
    parts = [machine_line(result)]
    if result["ceilings"]:
        parts.append(ceilings_line(result))
    if result["benchmark"] == "gguf":
        parts += [*of_gpu(result), *of_cpu(result)]
    else:
        parts += of_calls(result)
    return "\n".join(parts)


def update(page: str, base: Path = HERE) -> str:
    """Return a page with its benchmark blocks rendered from the documents they name."""
    return BLOCK.sub(lambda m: f"{m[1]}\n{tables(harness.load(base / m[2]))}\n{m[3]}", page)


def plot(result: dict[str, Any], path: str) -> None:
    """Draw how many times as fast as float16 torch.matmul calls are over M, a panel a shape."""
    import matplotlib as mpl

    mpl.use("svg" if path.endswith(".svg") else "agg")
    from matplotlib import pyplot as plt

    cells = [c for c in result["cells"] if c["kind"] == "call" and "dense_ratio" in c]
    if not cells:
        raise SystemExit("nothing to draw: the document has no torch.matmul beside its calls")
    shapes = distinct((c["nrows"], c["ncols"]) for c in cells)
    size = (3.4 * len(shapes), 3.4)
    figure, axes = plt.subplots(
        1, len(shapes), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        for name in distinct(c["format"] for c in cells):
            curve = [
                (c["m"], c["dense_ratio"])
                for c in cells
                if (c["nrows"], c["ncols"], c["format"]) == (*shape, name)
            ]
            axis.plot(*zip(*curve, strict=True), marker=".", label=name)
        axis.axhline(1, color="0.6", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set(title="{} x {}".format(*shape), xlabel="M (tokens)")
    axes[0, 0].set_ylabel("times as fast as float16 torch.matmul")
    axes[0, -1].legend(fontsize="x-small", ncols=2)
    figure.savefig(path)
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
