"""Computes csrc/kernels/tanh-table-inl.h: the polynomials of the AVX-512 kernels' float32 tanh.

    python tools/tanh_table.py > csrc/kernels/tanh-table-inl.h

The range of |x| is cut into 32 pieces, by the three topmost bits of the mantissa of |x| + OFFSET.
In each of them tanh|x| = c0 + c1 t + ... + c4 t^4 with t = |x| - center. The center is a float
whose tanh is nearly a float, too (after S. Gal, "Computing elementary functions: a new approach for
achieving high accuracy and good performance", 1986), so that c0 adds no error; c1 to c4 minimise
the largest relative error (Lawson's algorithm). The first piece has center 0 and c1 = 1, so that
small numbers keep their digits.
"""

from __future__ import annotations

import numpy as np
from mpmath import cos, lu_solve, matrix, mp, mpf, pi, tanh

PIECES, TERMS = 32, 5
OFFSET = 0.625
SHIFT = 20  # bits of a float below those that number the pieces
SATURATES = 9.1  # tanh rounds to 1 from here on
POINTS, ROUNDS = 24, 24  # of a piece; of Lawson's algorithm
CENTERS = 3000  # tried to either side of the middle

HEAD = """\
// float32's tanh in 32 intervals of |x|, a polynomial of degree 4 each: tanh|x| = c0 + c1 t + ... +
// c4 t^4, t = |x| - center. Made by tools/tanh_table.py, which has the method.
#pragma once

namespace charrnn_fast {
namespace {

// clang-format off"""
TAIL = """\
};
// clang-format on

}  // namespace
}  // namespace charrnn_fast"""


def first_piece() -> int:
    return int(np.float32(OFFSET).view(np.uint32)) >> SHIFT


def start_of(piece: int) -> float:
    return float(np.uint32((first_piece() + piece) << SHIFT).view(np.float32)) - OFFSET


def as_float(value) -> float:
    return float(np.float32(float(value)))


def fit(points, target, powers, weight) -> list[float]:
    """Coefficients of the powers for which the weighted error at the points is least."""
    rows = [[power(x) for power in powers] for x in points]
    wanted = [target(x) for x in points]
    weights = [weight(x) for x in points]
    n, lawson, best = len(powers), [mpf(1)] * len(points), None
    for _ in range(ROUNDS):
        normal, right = matrix(n, n), matrix(n, 1)
        for row, value, w, factor in zip(rows, wanted, weights, lawson, strict=True):
            for i in range(n):
                right[i] += factor * w**2 * row[i] * value
                for j in range(n):
                    normal[i, j] += factor * w**2 * row[i] * row[j]
        c = lu_solve(normal, right)
        errors = [
            abs(w * (sum(row[i] * c[i] for i in range(n)) - value))
            for row, value, w in zip(rows, wanted, weights, strict=True)
        ]
        worst = max(errors)
        if best is None or worst < best[0]:
            best = (worst, list(c))
        scaled = [error / worst + mpf("1e-3") for error in errors]
        lawson = [factor * s for factor, s in zip(lawson, scaled, strict=True)]
        mean = sum(lawson) / len(lawson)
        lawson = [factor / mean for factor in lawson]
    return [as_float(c) for c in best[1]]


def center_near(middle: float) -> float:
    """A float whose tanh is a float, nearly; the middle is as good as a place close to it."""
    step = float(np.spacing(np.float32(middle)))

    def rounding(center: float):
        exact = tanh(mpf(center))
        return abs(exact - as_float(exact)) / exact

    best = as_float(middle)
    for k in range(1, CENTERS):
        for center in (as_float(middle) - k * step, as_float(middle) + k * step):
            if rounding(center) < rounding(best):
                best = center
        if rounding(best) < 1e-10:
            break
    return best


def piece(number: int) -> list[float]:
    """The center, then c0 to c4."""
    low, high = mpf(start_of(number)), mpf(min(start_of(number + 1), SATURATES))
    points = [
        (low + high) / 2 + (high - low) / 2 * cos(pi * (2 * k + 1) / (2 * POINTS))
        for k in range(POINTS)
    ]
    if number == 0:
        powers = [lambda x, k=k: x**k for k in range(TERMS - 2)]
        return [0.0, 0.0, 1.0, *fit(points, lambda x: (tanh(x) / x - 1) / x, powers, lambda x: x)]
    center = center_near(float((low + high) / 2))
    c0 = as_float(tanh(mpf(center)))
    powers = [lambda x, k=k: (x - center) ** k for k in range(1, TERMS)]
    return [center, c0, *fit(points, lambda x: tanh(x) - c0, powers, lambda x: 1 / tanh(x))]


def main() -> None:
    mp.dps = 30
    table = [piece(number) for number in range(PIECES)]
    # A permutation reads the low five bits of a piece's number.
    turned = [table[(place - first_piece()) % PIECES] for place in range(PIECES)]
    print(HEAD)
    print(f"constexpr float kTanhOffset = {OFFSET}f, kTanhSaturates = {SATURATES}f;")
    print(f"constexpr int kTanhShift = {SHIFT};")
    print("// The centers, then c0 to c4.")
    print(f"alignas(64) constexpr float kTanhPieces[{1 + TERMS}][{PIECES}] = {{")
    for row in zip(*turned, strict=True):
        for first in range(0, PIECES, 4):
            numbers = ", ".join(f"{value:.9e}f" for value in row[first : first + 4])
            print("    " + ("{" if first == 0 else " ") + numbers, end="")
            print("}," if first == PIECES - 4 else ",")
    print(TAIL)


if __name__ == "__main__":
    main()
