"""Integrals and quantiles by Gauss-Legendre quadrature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def integrals(nodes: Sequence[float], start: float, end: float, rate: float = 0.0) -> list[float]:
    """For each Lagrange polynomial L of the nodes, the integral of exp(rate * (u - end)) * L(u) from start to end."""
    points, weights = np.polynomial.legendre.leggauss(32)
    u = start + (end - start) * (points + 1) / 2
    weights = weights * np.exp(rate * (u - end)) * (end - start) / 2
    found: list[float] = []
    for node in nodes:
        others = [other for other in nodes if other != node]
        found.append(float(np.sum(weights * math.prod((u - other) / (node - other) for other in others))))
    return found


def beta_quantile(q: Array) -> Array:
    """Quantiles of the beta distribution with both parameters 0.6 (Lee et al. 2024), by bisection of its integral.

    With u = sin(theta) ** 2, and theta as a fifth power, the density becomes smooth up to the middle, so that
    Gauss-Legendre quadrature is exact.
    """
    nodes, weights = np.polynomial.legendre.leggauss(60)
    fifth = (nodes + 1) / 2

    def mass(theta: Array) -> Array:
        angle = theta[:, None] * fifth**5
        density = 2 * (np.sin(angle) * np.cos(angle)) ** 0.2 * 5 * fifth**4
        return (density * weights).sum(1) * theta / 2

    q = np.asarray(q, dtype=np.float64)
    low, high = np.zeros_like(q), np.full_like(q, math.pi / 2)
    whole = 2 * mass(np.array([math.pi / 4]))
    for _ in range(60):
        middle = (low + high) / 2
        below = np.where(middle < math.pi / 4, mass(middle), whole - mass(math.pi / 2 - middle)) < q * whole
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(q <= 0, 0.0, np.where(q >= 1, 1.0, np.sin((low + high) / 2) ** 2))
