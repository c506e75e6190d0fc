# SPDX-License-Identifier: Apache-2.0
"""Make the files beside this one: what genuine bitsandbytes and transformers write and compute.

    pip install bitsandbytes==0.50.2 transformers accelerate torch==2.13.0+cpu
    python tests/golden/make_bitsandbytes.py

bitsandbytes runs on the CPU. Its `dequantize_4bit` is called on the weight as one row: on a matrix
its AVX-512 path takes the wrong absmax where the columns are no multiple of the block size.
"""

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # bitsandbytes compiles what it computes for odd counts

import copy
import shutil
from pathlib import Path

import bitsandbytes
import numpy as np
import safetensors
import torch
import transformers
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CODEBOOKS = ["nf4", "fp4"]


def bits(tensor):
    """A tensor as NumPy integers of its size: NumPy has no bfloat16, and bits are compared."""
    tensor = tensor.detach().contiguous().reshape(-1)
    size = tensor.element_size()
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[size]).numpy().copy()


def dequantize(codes, state, dtype):
    """A weight as bitsandbytes unpacks it, as one row."""
    state = copy.copy(state)
    state.shape, state.dtype = torch.Size((1, state.shape.numel())), dtype
    return dequantize_4bit(codes, state)


def values(rng, block_size, codebook):
    """Blocks of weights, of values at and beside the thresholds, of zeros, of the very large and
    the very small, and a short block at the end; an odd count.
    """
    book = np.sort(np.unique(get_4bit_type(codebook, "cpu").numpy()))
    middles = (book[1:] + book[:-1]) / np.float32(2)
    exact = np.concatenate([book, middles])
    ties = np.concatenate(
        [exact, np.nextafter(exact, np.float32(-2)), np.nextafter(exact, np.float32(2))]
    )
    ties = np.clip(ties, -1, 1).astype(np.float32)
    if ties.size % (block_size - 1):
        ties = np.resize(ties, -(-ties.size // (block_size - 1)) * (block_size - 1))
    ties = ties.reshape(-1, block_size - 1)
    ones = np.where(np.arange(len(ties)) % 2, -1, 1).astype(np.float32)
    ties = np.concatenate([ties, ones[:, None]], axis=1).reshape(-1)  # absmax is 1 in each block
    normal = rng.normal(0, 0.02, block_size).astype(np.float32)
    blocks = [normal, ties]
    if block_size <= 512:  # enough for what does not depend on the block size
        small = np.zeros(block_size, np.float32)
        small[::3] = -0.0
        blocks += [
            small,
            rng.normal(0, 1e4, block_size).astype(np.float32).clip(-65504, 65504),
            np.full(block_size, -0.3, np.float32),
            rng.uniform(-1, 1, block_size).astype(np.float32) * np.float32(3e-39),
            rng.standard_t(3, 3 * block_size).astype(np.float32),
        ]
    tail = rng.normal(0, 0.02, block_size - 7).astype(np.float32)
    whole = np.concatenate([*blocks, tail])
    return whole[: whole.size - (whole.size + 1) % 2]


def vectors():
    """Inputs, and what quantize_4bit and dequantize_4bit make of them."""
    out = {}
    rng = np.random.default_rng(4)
    for codebook in CODEBOOKS:
        out[f"{codebook}/codebook"] = bits(get_4bit_type(codebook, "cpu"))
        for block_size in BLOCK_SIZES:
            plain = torch.from_numpy(values(rng, block_size, codebook))
            for name, dtype in DTYPES.items():
                key = f"{codebook}/{block_size}/{name}"
                weight = plain.to(dtype)
                codes, state = quantize_4bit(weight, blocksize=block_size, quant_type=codebook)
                out[f"{key}/input"] = bits(weight)
                out[f"{key}/codes"] = bits(codes)
                out[f"{key}/absmax"] = bits(state.absmax)
                if name == "float32":
                    for output, to in DTYPES.items():
                        out[f"{codebook}/{block_size}/values/{output}"] = bits(
                            dequantize(codes, state, to)
                        )
        for label, count in {"zero tail": 64 + 5, "one": 1, "two": 2, "block": 64}.items():
            weight = torch.zeros(count)
            weight[: min(count, 64) // 2] = 0.25
            codes, state = quantize_4bit(weight, blocksize=64, quant_type=codebook)
            key = f"{codebook}/{label}"
            out[f"{key}/input"], out[f"{key}/codes"] = bits(weight), bits(codes)
            out[f"{key}/absmax"] = bits(state.absmax)
        out |= nested(codebook)
    return out


def nested(codebook):
    """A weight whose absmax is quantized too, in three blocks; the mean of absmax, which is taken
    from it first, is one that does not depend on the order of its sum.
    """
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        scale = rng.uniform(0.5, 2, (520, 1)).astype(np.float32)
        weight = torch.from_numpy((rng.normal(0, 0.02, (520, 32)) * scale).astype(np.float32))
        weight = torch.cat([weight.reshape(-1), weight.reshape(-1)[:17]]).to(torch.bfloat16)
        plain = quantize_4bit(weight, blocksize=32, quant_type=codebook)[1].absmax
        codes, state = quantize_4bit(
            weight, blocksize=32, quant_type=codebook, compress_statistics=True
        )
        if state.offset.item() == np.float32(plain.numpy().mean(dtype=np.float64)):
            break
    parts = {
        "input": weight,
        "codes": codes,
        "absmax": state.absmax,
        "nested_absmax": state.state2.absmax,
        "nested_code": state.state2.code,
        "offset": state.offset,
        "values/float32": dequantize(codes, state, torch.float32),
    }
    return {f"{codebook}/nested/{name}": bits(tensor) for name, tensor in parts.items()}


# ---- checkpoints ---------------------------------------------------------------------------------

# name: columns and rows of a layer, its block size and what else Params4bit is told
LAYERS = {
    "nf4_nested": (64, 48, 64, {"quant_type": "nf4", "compress_statistics": True}),
    "nf4_plain": (128, 24, 128, {"quant_type": "nf4", "compress_statistics": False}),
    "fp4_nested": (64, 48, 64, {"quant_type": "fp4", "compress_statistics": True}),
    "fp4_plain": (96, 10, 32, {"quant_type": "fp4", "compress_statistics": False}),
    "bf16_storage": (
        64,
        32,
        64,
        {"quant_type": "nf4", "compress_statistics": True, "quant_storage": torch.bfloat16},
    ),
    "f16_storage": (
        64,
        16,
        32,
        {"quant_type": "nf4", "compress_statistics": False, "quant_storage": torch.float16},
    ),
    "f32_storage": (
        80,
        16,
        64,
        {"quant_type": "fp4", "compress_statistics": True, "quant_storage": torch.float32},
    ),
    "odd": (37, 5, 64, {"quant_type": "nf4", "compress_statistics": True}),
    "straddling": (192, 48, 128, {"quant_type": "nf4", "compress_statistics": True}),
    "nested_twice": (64, 160, 32, {"quant_type": "nf4", "compress_statistics": True}),
}


def expected(state_dict, dtypes=("float32", "float16", "bfloat16")):
    """What bitsandbytes reads of the weights in a state_dict, and their types as it says them."""
    out = {}
    for key in state_dict:
        name, dot, _ = key.rpartition(".quant_state.")
        if dot:
            parts = {
                part.removeprefix(f"{name}."): tensor
                for part, tensor in state_dict.items()
                if part.startswith(f"{name}.")
            }
            state = QuantState.from_dict(parts, device=torch.device("cpu"))
            out[f"{name}/shape"] = np.array(state.shape)
            out[f"{name}/about"] = np.array(
                [state.quant_type, str(state.blocksize), str(state.dtype).removeprefix("torch.")]
            )
            for output in dtypes:
                values = dequantize(state_dict[name], state, DTYPES[output])
                out[f"{name}/{output}"] = bits(values)
    return out


def layers():
    """A file with the state_dict of Linear4bit layers."""
    torch.manual_seed(1)
    model = torch.nn.Module()
    for number, (name, (ncols, nrows, block_size, how)) in enumerate(LAYERS.items()):
        layer = Linear4bit(ncols, nrows, bias=number % 2 == 0)
        dtype = list(DTYPES.values())[number % 3]
        weight = torch.randn(nrows, ncols) * 0.02
        layer.weight = Params4bit(weight.to(dtype), blocksize=block_size, module=layer, **how)
        model.add_module(name, layer)
    model.register_buffer("steps", torch.arange(3))
    model.register_buffer("brain", torch.linspace(-1, 1, 5).to(torch.bfloat16))
    model.to("cpu")  # quantizes
    state_dict = model.state_dict()
    save_file(state_dict, HERE / "linear4bit.safetensors", {"format": "pt"})
    return expected(state_dict)


def llama(codebook, nested, shard_size):
    """A folder as save_pretrained writes it."""
    folder = HERE / f"llama_{codebook}"
    shutil.rmtree(folder, ignore_errors=True)
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(2)
    plain = folder / "plain"
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(plain)
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=codebook,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=how, device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    shutil.rmtree(plain)
    model.save_pretrained(folder, max_shard_size=shard_size)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return expected(model.state_dict(), ["float32"])


def main():
    versions = [bitsandbytes, torch, transformers, safetensors]
    about = np.array([f"{module.__name__} {module.__version__}" for module in versions])
    np.savez_compressed(HERE / "vectors.npz", versions=about, **vectors())
    checkpoints = {
        "linear4bit.safetensors": layers(),
        "llama_nf4": llama("nf4", True, "20KB"),
        "llama_fp4": llama("fp4", False, "1MB"),
    }
    flat = {
        f"{where}/{name}": array
        for where, arrays in checkpoints.items()
        for name, array in arrays.items()
    }
    np.savez_compressed(HERE / "checkpoints.npz", versions=about, **flat)


if __name__ == "__main__":
    main()
