# SPDX-License-Identifier: Apache-2.0
"""The specification of the numbers, written a second time in NumPy, with no line of the package.

`decode` reads packed blocks; `stage`, `fine`, `staged_product`, `float_product` and `codes_product`
follow the documented orders of summation, and `fma` is an exactly rounded float32 fused
multiply-add. What the CPU backend gives must be these bits.
"""

from typing import NamedTuple

import numpy as np

F32, F64 = np.float32, np.float64

# name: (ggml type id, elements, bytes)
FORMATS = {
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "Q8_K": (15, 256, 292),
    "IQ4_NL": (20, 32, 18),
    "IQ4_XS": (23, 256, 136),
    "MXFP4": (39, 32, 17),
}

IQ4_TABLE = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int64
)
E2M1_TABLE = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int64)


def fma(a, b, c):
    """Round a * b + c to float32 once.

    The product of two float32 is exact in float64. The float64 sum is turned into round-to-odd with
    the exact error of the addition, and a value rounded to odd rounds to float32 as the exact one.
    """
    p = np.asarray(a, F32).astype(F64) * np.asarray(b, F32).astype(F64)
    c = np.asarray(c, F32).astype(F64)
    with np.errstate(invalid="ignore", over="ignore"):
        s = p + c
        back = s - p
        error = (p - (s - back)) + (c - back)
        inexact = np.isfinite(s) & (error != 0)
        bits = s.view(np.int64)
        truncated = np.where((error > 0) != (s > 0), bits - 1, bits)
        return np.where(inexact, truncated | 1, bits).view(F64).astype(F32)


class Decoded(NamedTuple):
    """Groups of 32 along K: value = scale * half_scale * code + minimum."""

    codes: np.ndarray  # int64 [N, G, 32]
    scale: np.ndarray  # float32 [N, G]
    half_scale: np.ndarray | None  # int64 [N, G, 2]
    minimum: np.ndarray | None  # float32 [N, G, 1 or 2]
    # minimum is minima * their scale, where a unit's are integers: int64 [N, U, 8 or 16] and
    # float32 [N, U].
    minima: tuple[np.ndarray, np.ndarray] | None = None

    def values(self):
        """Dequantized weights, float32 [N, K]."""
        n, g, _ = self.codes.shape
        scale = self.scale[:, :, None] * np.ones(32, F32)
        if self.half_scale is not None:
            scale = scale * np.repeat(self.half_scale, 16, axis=2).astype(F32)
        value = scale * self.codes.astype(F32)
        if self.minimum is not None:
            value = value + np.repeat(self.minimum, 32 // self.minimum.shape[2], axis=2)
        return value.reshape(n, g * 32)


def _halves(block, at):
    return np.ascontiguousarray(block[..., at : at + 2]).view(np.float16)[..., 0].astype(F32)


def _nibbles(qs):
    """16 bytes to 32 codes: low nibbles, then high ones."""
    return np.concatenate([qs & 15, qs >> 4], axis=-1).astype(np.int64)


def _k_scales(packed):
    """The 12 bytes of Q4_K and Q5_K to eight scales and eight minima."""
    p = packed.astype(np.int64)
    low_scale, low_min = p[..., 0:4] & 63, p[..., 4:8] & 63
    high_scale = (p[..., 8:12] & 15) | (p[..., 0:4] >> 6) << 4
    high_min = (p[..., 8:12] >> 4) | (p[..., 4:8] >> 6) << 4
    return np.concatenate([low_scale, high_scale], -1), np.concatenate([low_min, high_min], -1)


def _planes(qs, bits):
    """[.., 64] bytes, two halves of 32, whose fields of `bits` bits belong to groups j of 32."""
    h = qs.reshape(*qs.shape[:-1], 2, 1, 32).astype(np.int64)
    j = np.arange(8 // bits).reshape(-1, 1)
    return (h >> (bits * j)) & ((1 << bits) - 1)  # [.., 2, 8 / bits, 32]


def decode(data, name, nrows, ncols):
    """Read `nrows` x `ncols` weights of format `name` from uint8 `data`."""
    _, elements, size = FORMATS[name]
    block = np.frombuffer(np.ascontiguousarray(data), np.uint8)
    block = block[: nrows * ncols // elements * size].reshape(nrows, ncols // elements, size)
    per_block = elements // 32

    def flat(x):  # [N, blocks, groups of a block, ..] -> [N, G, ..]
        return x.reshape(nrows, block.shape[1] * per_block, *x.shape[3:])

    if name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4"):
        header = {"Q4_0": 2, "Q4_1": 4, "Q5_0": 6, "Q5_1": 8, "IQ4_NL": 2, "MXFP4": 1}[name]
        q = _nibbles(block[..., header:])
        if name in ("Q5_0", "Q5_1"):
            qh = np.ascontiguousarray(block[..., header - 4 : header]).view("<u4").astype(np.int64)
            q |= (qh >> np.arange(32) & 1) << 4
        if name == "MXFP4":
            e = block[..., 0].astype(np.int64)
            return Decoded(E2M1_TABLE[q], np.ldexp(F32(1), e - 128).astype(F32), None, None)
        d = _halves(block, 0)
        if name == "IQ4_NL":
            return Decoded(IQ4_TABLE[q], d, None, None)
        if name in ("Q4_1", "Q5_1"):
            return Decoded(q, d, None, _halves(block, 2)[..., None])
        return Decoded(q - (8 if name == "Q4_0" else 16), d, None, None)
    if name == "Q8_0":
        return Decoded(block[..., 2:].view(np.int8).astype(np.int64), _halves(block, 0), None, None)
    if name == "Q8_K":
        d = np.ascontiguousarray(block[..., :4]).view("<f4").astype(F32)
        q = block[..., 4:260].view(np.int8).astype(np.int64).reshape(*block.shape[:2], 8, 32)
        return Decoded(flat(q), flat(np.repeat(d, 8, axis=2)), None, None)
    if name == "Q2_K":
        sc = block[..., 0:16].astype(np.int64).reshape(*block.shape[:2], 8, 2)
        q = _planes(block[..., 16:80], 2).reshape(*block.shape[:2], 8, 32)
        scale = np.repeat(_halves(block, 80)[..., None], 8, axis=2)
        m, m_scale = sc >> 4, -_halves(block, 82)
        minimum = m_scale[..., None, None] * m.astype(F32)
        minima = m.reshape(*m.shape[:2], 16), m_scale
        return Decoded(flat(q), flat(scale), flat(sc & 15), flat(minimum), minima)
    if name == "Q3_K":
        p = block[..., 96:108].astype(np.int64)
        i = np.arange(16)
        sc = (p[..., i % 8] >> (4 * (i // 8)) & 15) | (p[..., 8 + i % 4] >> (2 * (i // 4)) & 3) << 4
        low = _planes(block[..., 32:96], 2).reshape(*block.shape[:2], 8, 32)
        high = block[..., None, 0:32].astype(np.int64) >> np.arange(8)[:, None] & 1
        scale = np.repeat(_halves(block, 108)[..., None], 8, axis=2)
        half_scale = (sc - 32).reshape(*sc.shape[:2], 8, 2)
        return Decoded(flat(low - 4 * (1 - high)), flat(scale), flat(half_scale), None)
    if name in ("Q4_K", "Q5_K"):
        sc, m = _k_scales(block[..., 4:16])
        low = block[..., -128:].astype(np.int64).reshape(*block.shape[:2], 4, 1, 32)
        q = (low >> np.array([[0], [4]]) & 15).reshape(*block.shape[:2], 8, 32)
        scale = _halves(block, 0)[..., None] * sc.astype(F32)
        if name == "Q5_K":
            q |= (block[..., None, 16:48].astype(np.int64) >> np.arange(8)[:, None] & 1) << 4
        m_scale = -_halves(block, 2)
        minimum = m_scale[..., None] * m.astype(F32)
        return Decoded(flat(q), flat(scale), None, flat(minimum[..., None]), (m, m_scale))
    if name == "Q6_K":
        low = block[..., :128].astype(np.int64).reshape(*block.shape[:2], 2, 1, 64)
        low = (low >> np.array([[0], [4]]) & 15).reshape(*block.shape[:2], 8, 32)
        high = _planes(block[..., 128:192], 2).reshape(*block.shape[:2], 8, 32)
        sc = block[..., 192:208].view(np.int8).astype(np.int64).reshape(*block.shape[:2], 8, 2)
        scale = np.repeat(_halves(block, 208)[..., None], 8, axis=2)
        return Decoded(flat((low | high << 4) - 32), flat(scale), flat(sc), None)
    if name == "IQ4_XS":
        g = np.arange(8)
        low = block[..., 4 + g // 2].astype(np.int64) >> (4 * (g % 2)) & 15
        high = np.ascontiguousarray(block[..., 2:4]).view("<u2").astype(np.int64) >> (2 * g) & 3
        scale = _halves(block, 0)[..., None] * ((low | high << 4) - 32).astype(F32)
        q = IQ4_TABLE[_nibbles(block[..., 8:].reshape(*block.shape[:2], 8, 16))]
        return Decoded(flat(q), flat(scale), None, None)
    raise KeyError(name)


def stage(x):
    """Stage float32 tokens [M, K]: int64 codes [M, G, 32] and float32 scales [M, G]."""
    x = np.asarray(x, F32)
    groups = x.reshape(x.shape[0], x.shape[1] // 32, 32)
    finite = np.isfinite(groups).all(axis=2)
    amax = np.abs(np.where(finite[..., None], groups, 0)).max(axis=2, initial=0)
    live = finite & (amax >= F32(1e-36))
    with np.errstate(all="ignore"):
        inverse = np.where(live, F32(127) / amax, F32(0)).astype(F32)
        scale = np.where(live, amax / F32(127), np.where(finite, F32(0), F32(np.nan))).astype(F32)
        u = np.clip(np.rint(groups * inverse[..., None]), -127, 127)
    return np.where(live[..., None], u, 0).astype(np.int64), scale


def meet(p):
    """Add up the eight partial sums, the last axis, in their fixed tree."""
    p = [p[..., i] for i in range(8)]
    with np.errstate(all="ignore"):
        even = (p[0] + p[4]) + (p[2] + p[6])
        return even + ((p[1] + p[5]) + (p[3] + p[7]))


def _scaled(integers, scale):
    """Integers times a scale of the weight, rounded once: a zero is +0, and no number gives NaN."""
    with np.errstate(all="ignore"):
        return fma(integers.astype(F32), scale, fma(scale, F32(0), F32(0)))


def _sums(weight, u, d):
    """Staged sums of what each minimum covers, float32 [M, G, 1 or 2]."""
    count = weight.minimum.shape[2]
    totals = u.reshape(*u.shape[:2], count, 32 // count).sum(axis=3)
    with np.errstate(all="ignore"):
        return d[:, :, None] * totals.astype(F32)


def _integer_sums(sums):
    """Staged sums [M, U, n] as integers of 14 bits, and their scales float32 [M, U]."""
    finite = np.isfinite(sums).all(axis=2)
    whole = np.where(finite[..., None], sums, F32(0))
    largest = np.abs(whole).max(axis=2, initial=0)
    exponent = np.maximum(largest.view(np.uint32) >> 23, 23).astype(np.int64) - 127
    codes = np.rint(whole * np.exp2(12.0 - exponent).astype(F32)[..., None]).astype(np.int64)
    scale = np.where(finite, np.exp2(exponent - 12.0), np.nan).astype(F32)
    return codes, scale


def staged_product(weight, x):
    """Product on the int8-staged path, float32 [M, N], before bias and rounding."""
    u, d = stage(x)
    m, n, groups = u.shape[0], weight.codes.shape[0], u.shape[1]
    partial = np.zeros((m, n, 8), F32)
    if weight.minimum is not None:
        sums = _sums(weight, u, d)
        if weight.minima is not None:
            t, t_scale = _integer_sums(sums.reshape(m, groups // 8, 8 * sums.shape[2]))
    with np.errstate(all="ignore"):
        for g in range(groups):
            acc = partial[:, :, g // 8 % 8]
            ug, cg, w = u[:, g], weight.codes[:, g], weight.scale[:, g]
            if weight.half_scale is None:
                dot = ug @ cg.T
            else:
                h = weight.half_scale[:, g]
                dot = ug[:, :16] @ cg[:, :16].T * h[:, 0] + ug[:, 16:] @ cg[:, 16:].T * h[:, 1]
            assert np.abs(dot).max(initial=0) < 2**24  # is a float32
            acc = fma(_scaled(dot, w[None]), d[:, g, None], acc)
            if weight.minima is not None:
                if g % 8 == 7:
                    minima, scale = weight.minima[0][:, g // 8], weight.minima[1][:, g // 8]
                    dot = t[:, g // 8] @ minima.T
                    acc = fma(_scaled(dot, scale[None]), t_scale[:, g // 8, None], acc)
            elif weight.minimum is not None:
                acc = fma(weight.minimum[None, :, g, 0], sums[:, g, 0, None], acc)
            partial[:, :, g // 8 % 8] = acc
    return meet(partial)


def fine(x):
    """Float32 tokens [M, K] as 24-bit integers: int64 [M, G, 32] and float32 scales [M, G]."""
    x = np.asarray(x, F32)
    groups = x.reshape(x.shape[0], x.shape[1] // 32, 32)
    finite = np.isfinite(groups).all(axis=2)
    whole = np.where(finite[..., None], groups, F32(0))
    largest = np.abs(whole).max(axis=2, initial=0)
    exponent = np.maximum(largest.view(np.uint32) >> 23, 23).astype(np.int64)
    codes = np.rint(whole * np.exp2(149.0 - exponent).astype(F32)[..., None]).astype(np.int64)
    scale = np.where(finite, np.exp2(exponent - 149.0), np.nan).astype(F32)
    return np.minimum(codes, 2**23 - 1), scale


def float_product(weight, x):
    """Product on the float path, float32 [M, N], before bias and rounding."""
    u, d = fine(x)
    m, n, groups = u.shape[0], weight.codes.shape[0], u.shape[1]
    partial = np.zeros((m, n, 8), F32)
    halves = [slice(0, 16), slice(16, 32)]
    with np.errstate(all="ignore"):
        for g in range(groups):
            acc = partial[:, :, g // 8 % 8]
            ug, cg, w = u[:, g], weight.codes[:, g], weight.scale[:, g]
            if weight.half_scale is None:
                terms = [(ug @ cg.T, w)]
            else:
                h = weight.half_scale[:, g].astype(F32)
                terms = [(ug[:, p] @ cg[:, p].T, w * h[:, i]) for i, p in enumerate(halves)]
            for dot, scale in terms:
                acc = fma(dot.astype(F32), scale[None] * d[:, g, None], acc)  # rounds dot once
            if weight.minimum is not None:
                sums = _sums(weight, u[:, g : g + 1], d[:, g : g + 1])[:, 0]
                for i in range(sums.shape[1]):
                    acc = fma(weight.minimum[None, :, g, i], sums[:, i, None], acc)
            partial[:, :, g // 8 % 8] = acc
    return meet(partial)


def codes_product(codes, scales, x):
    """Product of 4-bit weights, code values and scales each [N, K], and tokens [M, K]."""
    x = np.asarray(x, F32)
    (n, k), m = codes.shape, x.shape[0]
    units = -(-k // 256)
    values = np.zeros((n, units * 4, 64), F32)
    chunk_scales = np.zeros((n, units * 4), F32)
    with np.errstate(all="ignore"):
        for c in range(-(-k // 64)):
            part = slice(64 * c, min(64 * c + 64, k))
            factors = np.ascontiguousarray(scales[:, part])
            same = (factors.view(np.uint32) == factors.view(np.uint32)[:, :1]).all(axis=1)
            own = np.where(same[:, None], codes[:, part], codes[:, part] * factors)
            values[:, c, : own.shape[1]] = own
            chunk_scales[:, c] = np.where(same, factors[:, 0], F32(1))
        v = values.reshape(1, n, units, 4, 8, 4, 2)
        padded = np.zeros((m, units * 256), F32)
        padded[:, :k] = x
        a = padded.reshape(m, 1, units, 4, 8, 4, 2)
        pairs = fma(v[..., 1], a[..., 1], v[..., 0] * a[..., 0])
        words = (pairs[..., 0] + pairs[..., 1]) + (pairs[..., 2] + pairs[..., 3])
        there = np.arange(units * 4) * 64 < k
        sums = np.where(there, meet(words).reshape(m, n, units * 4) * chunk_scales, F32(0))
        sums = sums.reshape(m, n, units, 4)
        of_unit = (sums[..., 0] + sums[..., 2]) + (sums[..., 1] + sums[..., 3])
        partial = np.zeros((m, n, 8), F32)
        for u in range(units):
            partial[..., u % 8] += of_unit[..., u]
    return meet(partial)


def finish(product, bias=None, output="float32"):
    """Add the bias, round to the output's type, make every NaN the one NaN; give the bits."""
    with np.errstate(all="ignore"):
        y = product if bias is None else product + np.asarray(bias, F32)
        nan = np.isnan(y)
        if output == "float32":
            return np.where(nan, np.uint32(0x7FC00000), y.astype(F32).view(np.uint32))
        if output == "float16":
            return np.where(nan, np.uint16(0x7E00), y.astype(np.float16).view(np.uint16))
        bits = y.view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
        return np.where(nan, np.uint16(0x7FC0), rounded.astype(np.uint16))


# ---- 4-bit codebooks -----------------------------------------------------------------------------

_FP4 = [0.0, 0.0052083334885537624, 0.6666666865348816, 1, 0.3333333432674408, 0.5]
_FP4 += [0.1666666716337204, 0.25]
CODEBOOKS = {
    "NF4": np.array(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
            *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
            *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
            *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
        ],
        F32,
    ),
    "FP4": np.array([*_FP4, *(-v for v in _FP4)], F32),
}

# What nested scales are quantized to: the values of bitsandbytes' create_dynamic_map().
_MAGNITUDES = np.fromstring(
    """
5.5000004e-07 3.2500002e-06 7.75e-06 2.1249998e-05 4.375e-05 6.625e-05 8.875e-05 0.00015625001
0.00026875004 0.00038125002 0.00049375003 0.0006062501 0.00071875006 0.00083125 0.0009437501
0.0012812499 0.00184375 0.00240625 0.00296875 0.0035312497 0.00409375 0.0046562497 0.0052187503
0.00578125 0.00634375 0.00690625 0.00746875 0.00803125 0.00859375 0.009156249 0.00971875
0.01140625 0.01421875 0.01703125 0.019843752 0.02265625 0.02546875 0.028281251 0.03109375
0.03390625 0.036718752 0.03953125 0.042343747 0.04515625 0.04796875 0.05078125 0.05359375
0.05640625 0.059218753 0.06203125 0.06484375 0.067656256 0.070468746 0.07328125 0.07609375
0.07890625 0.08171876 0.08453125 0.08734375 0.09015625 0.092968754 0.09578126 0.09859375
0.107031256 0.12109375 0.13515624 0.14921875 0.16328125 0.17734376 0.19140625 0.20546874
0.21953125 0.23359375 0.24765624 0.26171875 0.27578127 0.28984374 0.30390626 0.31796873
0.33203125 0.34609374 0.36015624 0.37421876 0.38828123 0.40234375 0.41640624 0.43046874
0.44453126 0.45859373 0.47265625 0.4867187 0.50078124 0.5148437 0.5289062 0.54296875 0.5570313
0.5710938 0.58515626 0.5992187 0.61328125 0.6273438 0.6414063 0.65546876 0.6695312 0.68359375
0.6976563 0.7117188 0.72578126 0.7398437 0.75390625 0.7679688 0.78203124 0.79609376 0.8101562
0.82421875 0.8382813 0.85234374 0.86640626 0.8804687 0.89453125 0.9085938 0.92265624 0.93671876
0.9507812 0.96484375 0.9789063 0.99296874
""",
    F32,
    sep=" ",
)
NESTED_CODE = np.concatenate([-_MAGNITUDES[::-1], [F32(0)], _MAGNITUDES, [F32(1)]])


def nf4_codes(data, n, k, layout):
    """4-bit codes of a packed matrix, one a byte, [N, K]."""
    data = np.ascontiguousarray(data).reshape(-1).view(np.uint8).astype(np.int64)
    row, column = np.indices((n, k))
    if layout == "row_pair":
        return data[row // 2 * k + column] >> (row % 2 * 4) & 15
    i = row * k + column
    return data[i // 2] >> ((1 - i % 2) * 4) & 15


def nf4_absmax(absmax, nested=None):
    """Scales as float32; `nested` is (code, scales, offset, block)."""
    if nested is None:
        return np.asarray(absmax, F32)
    code, scales, offset, block = nested
    with np.errstate(all="ignore"):
        scaled = code[absmax] * scales[np.arange(len(absmax)) // block]
        return scaled + F32(offset)


def nf4_parts(data, absmax, n, k, block_size, codebook="NF4", layout="bitsandbytes", nested=None):
    """The codes' values and their scales, float32 [N, K] each."""
    codes = nf4_codes(data, n, k, layout)
    blocks = np.arange(n * k).reshape(n, k) // block_size
    return CODEBOOKS[codebook][codes], nf4_absmax(absmax, nested)[blocks]


def nf4_values(*args, **kwargs):
    """Dequantized weights, float32 [N, K], of what `nf4_parts` takes."""
    values, scales = nf4_parts(*args, **kwargs)
    with np.errstate(all="ignore"):
        return values * scales


def nf4_quantize(x, block_size, codebook="NF4"):
    """bitsandbytes' rule for float32 of any shape, as one row: packed bytes and absmax."""
    flat = np.asarray(x, F32).reshape(-1)
    values = CODEBOOKS[codebook]
    order = np.arange(16)
    if codebook == "FP4":  # -0 lies above 0: what is a little above 0 takes it
        order = np.array([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3])
    ascending = values[order]
    thresholds = (ascending[:-1] + ascending[1:]) / F32(2)
    codes = np.zeros(flat.size + flat.size % 2, np.uint8)
    absmax = np.zeros(-(-flat.size // block_size), F32)
    for b in range(len(absmax)):
        block = flat[b * block_size : (b + 1) * block_size]
        largest = np.abs(block).max()
        if len(block) == block_size:
            scaled = block * (F32(1) / max(largest, F32(1e-38)))
        else:
            largest = max(largest, F32(1e-38))
            scaled = block / largest
        absmax[b] = largest
        above = np.searchsorted(thresholds, scaled.clip(-1, 1), side="left")
        codes[b * block_size :][: len(block)] = order[above]
    if flat.size % 2:
        codes[-1] = order[7]
    return codes[0::2] << 4 | codes[1::2], absmax
