"""L-BFGS on many problems at once, which share their data and differ in a number such as the regularisation."""

from collections.abc import Callable

import torch
from torch import Tensor

MEMORY = 10  # pairs of steps and changes of the gradient that are kept, as in scipy
ARMIJO, HALVINGS = 1e-4, 20

Function = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def minimise(
    function: Function, start: Tensor, scale: Tensor, tolerance: float = 1e-4, iterations: int = 500
) -> tuple[Tensor, Tensor]:
    """Minimise K smooth convex functions side by side (Nocedal and Wright, Numerical Optimization, algorithm 7.5).

    A function that has converged leaves the batch, so that the others go on at less cost.

    Args:
        function: of points [d, k, c] and of the numbers int64 [k] of the functions that they belong to; gives values
            [k] and gradients [d, k, c].
        start: [d, K, c].
        scale: [d, K, 1], an estimate of the inverse of the diagonal of the second derivatives.
        tolerance: ends a function's search when no entry of its gradient is larger.
        iterations: at most.

    Returns:
        The minima [d, K, c], and whether each converged, bool [K].
    """
    found, converged = start.clone(), torch.zeros(start.shape[1], dtype=torch.bool, device=start.device)
    rows = torch.arange(start.shape[1], device=start.device)
    at, scale = start.clone(), scale.clone()
    value, gradient = function(at, rows)
    steps: list[Tensor] = []
    changes: list[Tensor] = []
    for _ in range(iterations):
        done = gradient.abs().amax((0, 2)) <= tolerance
        if done.any():
            found[:, rows], converged[rows[done]] = at, True
            keep = (~done).nonzero()[:, 0]
            rows, value = rows[keep], value[keep]
            at, gradient, scale = at[:, keep], gradient[:, keep], scale[:, keep]
            steps, changes = [s[:, keep] for s in steps], [y[:, keep] for y in changes]
        if not len(rows):
            return found, converged
        direction = _direction(gradient, scale, steps, changes)
        new, new_value, new_gradient, moved = _searched(function, at, rows, value, gradient, direction)
        if not moved.any():  # as near as the precision allows
            break
        steps, changes = [*steps, new - at][-MEMORY:], [*changes, new_gradient - gradient][-MEMORY:]
        at, value, gradient = new, new_value, new_gradient
    found[:, rows] = at
    return found, converged


def _direction(gradient: Tensor, scale: Tensor, steps: list[Tensor], changes: list[Tensor]) -> Tensor:
    """Descent directions [d, k, c] by the two loops over the pairs that are kept."""
    q, factors = gradient.clone(), []
    for s, y in zip(reversed(steps), reversed(changes), strict=True):
        product = _dot(s, y)
        rho = torch.where(product > 0, 1 / product, 0.0)  # a pair of no curvature, where a search did not move
        alpha = rho * _dot(s, q)
        q -= alpha[:, None] * y
        factors.append((rho, alpha))
    q *= scale
    if steps:  # the estimate's size is mended by the newest pair
        s, y = steps[-1], changes[-1]
        size = _dot(s, y) / _dot(y, scale * y).clamp_min(torch.finfo(y.dtype).tiny)
        q *= torch.where(size > 0, size, 1.0)[:, None]
    for s, y, (rho, alpha) in zip(steps, changes, reversed(factors), strict=True):
        q += (alpha - rho * _dot(y, q))[:, None] * s
    return -q


def _searched(
    function: Function, at: Tensor, rows: Tensor, value: Tensor, gradient: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Steps along the directions, halved where the value does not fall enough; and whether each moved."""
    slope = _dot(gradient, direction)
    direction = torch.where(slope[:, None] < 0, direction, -gradient)
    slope = torch.where(slope < 0, slope, -_dot(gradient, gradient))
    noise = 4 * torch.finfo(value.dtype).eps * value.abs()
    length = torch.ones_like(value)
    new = at + direction
    new_value, new_gradient = function(new, rows)
    for _ in range(HALVINGS):
        wrong = ~(new_value <= value + ARMIJO * length * slope + noise)
        if not wrong.any():
            break
        again = wrong.nonzero()[:, 0]
        length[again] /= 2
        new[:, again] = at[:, again] + length[again, None] * direction[:, again]
        new_value[again], new_gradient[:, again] = function(new[:, again], rows[again])
    still = (~(new_value <= value + noise)).nonzero()[:, 0]
    new[:, still], new_value[still], new_gradient[:, still] = at[:, still], value[still], gradient[:, still]
    return new, new_value, new_gradient, (new != at).any(2).any(0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """[d, k, c] x [d, k, c] -> [k]."""
    return (a * b).sum((0, 2))
