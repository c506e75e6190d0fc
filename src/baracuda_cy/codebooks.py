# SPDX-License-Identifier: Apache-2.0
"""The values of 4-bit and 8-bit codes, and the row-pair packer of NF4 on the host."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from baracuda_cy.arguments import as_float32, as_integer
from baracuda_cy.errors import InvalidProblem
from baracuda_cy.formats import Codebook, Nf4Layout, nf4_sizes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CODEBOOKS", "NF4_CODEBOOK", "dynamic_code", "nf4_pack_weight", "nf4_quantize_value"]

NF4_CODEBOOK = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The 16 values of NF4, each a float32: quantiles of the normal distribution, zero among them."""

_FP4_MAGNITUDES = (
    0.0,
    0.0052083334885537624,
    0.6666666865348816,
    1.0,
    0.3333333432674408,
    0.5,
    0.1666666716337204,
    0.25,
)

CODEBOOKS = {
    Codebook.NF4: NF4_CODEBOOK,
    Codebook.FP4: (*_FP4_MAGNITUDES, *(-value for value in _FP4_MAGNITUDES)),
}
"""The 16 values of every codebook, each a float32."""


@functools.cache
def dynamic_code() -> NDArray[np.float32]:
    """Return the 256 values that nested absmax is quantized to, ascending: bitsandbytes' own.

    Besides 0 and 1 they are, of either sign, 1, 2, 4 ... 64 means of neighbours that divide
    [0.1, 1] evenly, times 1e-6, 1e-5 ... 1 (Dettmers, 2015).

    Returns
    -------
    numpy.ndarray
        float32, read-only.

    Examples
    --------
    >>> from baracuda_cy.codebooks import dynamic_code
    >>> code = dynamic_code()
    >>> code.shape, float(code[127]), float(code[255])
    ((256,), 0.0, 1.0)
    """
    import numpy as np

    values: list[NDArray[Any]] = [np.array([0, 1], np.float32)]
    for exponent in range(7):
        count = 2**exponent
        first = np.float32(0.1)
        step = float((np.float32(1) - first) / np.float32(count))
        i = np.arange(count + 1)
        # Counted from the nearer end, each rounded to float32 once.
        ends = np.where(2 * i < count, float(first) + step * i, 1 - step * (count - i))
        ends = ends.astype(np.float32)
        means = (ends[:-1] + ends[1:]) / np.float32(2) * np.float32(10.0 ** (exponent - 6))
        values += [means, -means]
    code = np.sort(np.concatenate(values))
    code.setflags(write=False)
    return code


def _codes(weight: NDArray[np.float32], absmax: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the nearest code of each weight over its absmax, the lower one of two."""
    import numpy as np

    with np.errstate(all="ignore"):
        scaled = weight / absmax
        distance = np.abs(scaled - np.float32(NF4_CODEBOOK[0]))
        codes = np.zeros(scaled.shape, np.uint8)
        for code, value in enumerate(NF4_CODEBOOK[1:], 1):
            other = np.abs(scaled - np.float32(value))
            nearer = other < distance
            codes[nearer] = code
            distance = np.where(nearer, other, distance)
    return np.where(absmax == 0, np.uint8(7), codes)


def nf4_quantize_value(x: float, absmax: float) -> int:
    """Return the NF4 code of a value, on the host.

    The nearest value of the codebook to ``x / absmax``, a division in float32; the lower of two
    that are equally near. Code 7, which is 0, where absmax is 0; code 0 where the quotient is NaN
    or infinite.

    Parameters
    ----------
    x : float
        The value, rounded to float32.
    absmax : float
        The largest magnitude of its block, rounded to float32.

    Returns
    -------
    int
        0 to 15.

    Examples
    --------
    >>> from baracuda_cy import nf4_quantize_value
    >>> nf4_quantize_value(-2.0, 2.0), nf4_quantize_value(0.1, 2.0), nf4_quantize_value(5.0, 0.0)
    (0, 8, 7)
    """
    import numpy as np

    values = [as_float32(x, "x"), as_float32(absmax, "absmax")]
    return int(_codes(*np.array(values, np.float32)[:, None])[0])


def nf4_pack_weight(
    weight: Any, n: int, k: int, block_size: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Pack a weight into NF4 in the row-pair layout, on the host.

    Every value takes the code of `nf4_quantize_value`; NaN takes no part in a block's maximum.
    `quantize` packs in the layout of bitsandbytes, with its rounding, and is much faster.

    Parameters
    ----------
    weight : array
        ``n * k`` values of any shape, row after row, converted to float32.
    n, k : int
        Rows, an even number, and columns, a multiple of `block_size`.
    block_size : int
        Elements that share a scale.

    Returns
    -------
    packed : numpy.ndarray
        uint8, ``n * k / 2``: row 2 i in the low nibble and row 2 i + 1 in the high nibble.
    absmax : numpy.ndarray
        float32, ``n * k / block_size``.

    Raises
    ------
    InvalidProblem
        Sizes that the layout cannot express, another number of values, or values that are no real
        numbers or beyond float32.

    Examples
    --------
    >>> import numpy as np
    >>> import baracuda_cy as bcy
    >>> packed, absmax = bcy.nf4_pack_weight(np.eye(32), 32, 32, 32)
    >>> w = bcy.Nf4Tensor(packed, absmax, (32, 32), block_size=32, layout="row_pair")
    >>> bool((w.dequantize() == np.eye(32)).all())
    True
    """
    import numpy as np

    n, k = as_integer(n, "n"), as_integer(k, "k")
    block_size = as_integer(block_size, "block_size")
    nf4_sizes(n, k, block_size, Nf4Layout.ROW_PAIR)
    try:
        given = np.asanyarray(weight)
        real = np.can_cast(given.dtype, np.float32, "same_kind")  # of NumPy or of ml_dtypes
        if isinstance(given, np.ma.MaskedArray) or not real:
            raise TypeError
        with np.errstate(over="raise"):
            values = np.asarray(given, np.float32)
    except FloatingPointError:
        raise InvalidProblem(
            "weight: expected numbers that float32 can hold, got one beyond; scale it"
        ) from None
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise InvalidProblem(
            f"weight: expected real numbers on the host without a mask, got "
            f"{type(weight).__name__}; "
            "convert it, as in numpy.asarray(weight, 'float32')"
        ) from None
    if values.size != n * k:
        raise InvalidProblem(
            f"weight: expected {n * k} values ({n} rows of {k} columns), got {values.size}; "
            "correct n and k, or pass the whole weight"
        )
    blocks = values.reshape(-1, block_size)
    absmax = np.fmax.reduce(np.abs(blocks), axis=1, initial=0)
    codes = _codes(blocks, absmax[:, None]).reshape(n, k)
    packed: NDArray[Any] = codes[0::2] | codes[1::2] << 4
    return packed.reshape(-1), absmax
