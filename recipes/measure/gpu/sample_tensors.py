"""Tensors to compare casts on: what training meets, and what breaks casts.

Values are those of BF16, in which training hands operands to the cast.  Each kind is made for a
format where its point lies at the format's own values, such as the middles between two of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recipes.training.fp8.formats import Format

TILE = 128


def _normal(shape: tuple[int, int], fmt: Format) -> Tensor:
    return torch.randn(shape)


def _uniform(shape: tuple[int, int], fmt: Format) -> Tensor:
    return torch.rand(shape) * 2 - 1


def _heavy_tailed(shape: tuple[int, int], fmt: Format) -> Tensor:
    """Log-normal sizes, and one value in ten thousand a thousand times larger."""
    x = torch.randn(shape) * torch.exp(2 * torch.randn(shape))
    return torch.where(torch.rand(shape) < 1e-4, x * 1e3, x)


def _wide(shape: tuple[int, int], fmt: Format) -> Tensor:
    return torch.randn(shape) * torch.exp2(torch.randint(-60, 60, shape).float())


def _zeros(shape: tuple[int, int], fmt: Format) -> Tensor:
    """Most values zero, some of them negative zeros; a whole block of 128 x 128, and whole groups
    of 32, zero.
    """
    x = torch.randn(shape) * (torch.rand(shape) > 0.7)
    x[:TILE, :TILE] = 0
    x[-32:, -32:] = 0
    return torch.where(torch.rand(shape) < 0.1, -x.abs() * 0, x)


def _all_zero(shape: tuple[int, int], fmt: Format) -> Tensor:
    return torch.zeros(shape)


def _subnormal(shape: tuple[int, int], fmt: Format) -> Tensor:
    """BF16's subnormals and smallest normals, below 2**-118: the scale would overflow FP32."""
    return _from_bits(torch.randint(0, 9 << 7, shape) | (torch.randint(0, 2, shape) << 15))


def _small_groups(shape: tuple[int, int], fmt: Format) -> Tensor:
    """Rows of ordinary values between rows around 2**-119, where the quotient nears the largest
    value of BF16 and of FP32.
    """
    x = torch.randn(shape)
    rows = torch.arange(shape[0]) % 2 == 1
    x[rows] = torch.ldexp((1 + torch.rand(int(rows.sum()), shape[1])), torch.tensor(-120.0))
    x[-TILE:] = torch.ldexp((1 + torch.rand(x[-TILE:].shape)), torch.tensor(-120.0))
    return x


def _powers_of_two(shape: tuple[int, int], fmt: Format) -> Tensor:
    return torch.exp2(torch.randint(-20, 9, shape).float()) * _signs(shape)


def _ties(shape: tuple[int, int], fmt: Format) -> Tensor:
    """The middles between neighbouring values, and the values; the largest value in every group, so
    that the scale is a power of two.
    """
    grid = torch.arange(0x7F, dtype=torch.uint8).view(fmt.dtype).float()
    grid = grid[grid.isfinite()]
    values = torch.cat([grid, (grid[1:] + grid[:-1]) / 2])
    x = values[torch.randint(len(values), shape)] * _signs(shape)
    rows, columns = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    return torch.where((rows + columns) % 32 == 0, torch.tensor(fmt.max), x)


def _saturating(shape: tuple[int, int], fmt: Format) -> Tensor:
    """Beyond the largest value, at it, and at the middle where rounding would go beyond: a delayed
    scale meets them.
    """
    values = torch.tensor(
        [fmt.max, fmt.overflow, fmt.overflow * 0.99, fmt.max * 2, fmt.max * 1e4, 1.0]
    )
    return values[torch.randint(len(values), shape)] * _signs(shape)


def _infinite(shape: tuple[int, int], fmt: Format) -> Tensor:
    return _sprinkled(shape, [torch.inf, -torch.inf])


def _nan(shape: tuple[int, int], fmt: Format) -> Tensor:
    return _sprinkled(shape, [torch.nan, -torch.nan])


def _all_nan(shape: tuple[int, int], fmt: Format) -> Tensor:
    return torch.full(shape, torch.nan)


def _one_large(shape: tuple[int, int], fmt: Format) -> Tensor:
    x = torch.randn(shape) * 1e-3
    x[shape[0] // 2, shape[1] // 3] = 1e4
    return x


def _every_bf16(shape: tuple[int, int], fmt: Format) -> Tensor:
    """Every finite number of BF16 in random order, over and over."""
    every = torch.arange(2**16)
    every = every[(every & 0x7F80) != 0x7F80]
    return _from_bits(every[torch.randperm(shape[0] * shape[1]) % len(every)].view(shape))


def _sprinkled(shape: tuple[int, int], values: list[float]) -> Tensor:
    """Ordinary values with one in two thousand of `values` in the left half."""
    x = torch.randn(shape)
    hit = (torch.rand(shape) < 5e-4) & (torch.arange(shape[1]) < shape[1] // 2)
    hit[0, 0] = True
    return torch.where(hit, torch.tensor(values)[torch.randint(len(values), shape)], x)


def _from_bits(bits: Tensor) -> Tensor:
    """Return the BF16 numbers of 16-bit patterns."""
    return (bits.to(torch.int32) << 16).view(torch.float32)


def _signs(shape: tuple[int, int]) -> Tensor:
    return torch.randint(0, 2, shape).float() * 2 - 1


KINDS: dict[str, Callable[[tuple[int, int], Format], Tensor]] = {
    "normal": _normal,
    "uniform": _uniform,
    "heavy-tailed with outliers": _heavy_tailed,
    "wide range": _wide,
    "many zeros": _zeros,
    "all zero": _all_zero,
    "subnormal": _subnormal,
    "small groups": _small_groups,
    "powers of two": _powers_of_two,
    "ties": _ties,
    "saturating": _saturating,
    "one large element": _one_large,
    "every finite BF16": _every_bf16,
    "infinite elements": _infinite,
    "NaN elements": _nan,
    "all NaN": _all_nan,
}


def make(kind: str, shape: tuple[int, int], fmt: Format, device: str, seed: int = 0) -> Tensor:
    """Return a BF16 tensor of a kind, the same numbers on every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KINDS[kind](shape, fmt).bfloat16().to(device)
