"""KoLeo on prototype logits from sums over the prototypes, in portable PyTorch. README.md beside this has the maths.

Everything that depends on K is one of: G = W'W, s = W'1 (``gram``), or products of a few [R, d] rows with chunks of W
(``streamed``). Both end in the same few [R, d] quantities, from which the rest is written once, here. That rest is tiny
and runs in float64: the difference of two near rows is all that the loss sees of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pera_kernels import products
from pera_kernels.distillation_loss.weight_norm import (
    MAX_CHUNK,
    Chunk,
    LowRank,
    accumulation_dtype,
    chunk_size,
    chunks,
    write_grad_v,
)
from pera_kernels.products import mm

EPS = 1e-8
TINY = 1e-300  # of float64


class Pairs(NamedTuple):
    """Each row and its nearest neighbour, as the backward needs them."""

    norms: Tensor  # [R] float64, ||W x|| before it is clamped
    neighbours: Tensor  # [R] int64, into all rows
    distances: Tensor  # [R] float64
    gram_rows: Tensor  # [R, d] float32 (or 64): G x
    gram_differences: Tensor  # [R, d] the same: G D + eps s, D = x/n - x_nn/n_nn


class Forward(NamedTuple):
    """Results of the forward: the loss, and the tensors that the backward needs."""

    loss: Tensor  # [] float32 (float64 for float64 rows)
    pairs: Pairs
    inverse_norms: Tensor  # [K] float32 (or 64): 1 / ||v||


def prefers_gram(rows: Tensor) -> bool:
    """Whether G [d, d] takes fewer FLOPs than two walks with the R rows (4 products of R rows against d)."""
    return 4 * rows.shape[0] >= rows.shape[1]


def forward(
    rows: Tensor,
    v: Tensor,
    g: Tensor,
    num_crops: int,
    native: bool = False,
    inverse_norms: Tensor | None = None,
    weights: Tensor | None = None,
) -> Forward:
    """Arguments as ``koleo`` takes them.

    native: with the native library's passes over the prototypes. inverse_norms: [K], 1 / ||v|| if that is known.
    weights: W [K, d] in the dtype of products, if that is known: in Triton, where the rest has kernels of its own.
    """
    known = inverse_norms is not None
    if inverse_norms is None:
        inverse_norms = torch.zeros(v.shape[0], dtype=accumulation_dtype(rows.dtype), device=v.device)
    if rows.shape[0] == 0:
        return _empty(rows, inverse_norms)
    if weights is not None:
        accumulate = accumulation_dtype(rows.dtype)
        gram = torch.empty(v.shape[1], v.shape[1], dtype=accumulate, device=v.device)
        total = weights.sum(0, dtype=accumulate)
        mm(weights.t(), weights, gram)
        from . import triton

        if triton.why_not(rows, num_crops) is None:
            return triton.forward(rows, gram, total, v.shape[0], num_crops, inverse_norms)
        return _from_gram(rows, v.shape[0], gram, total, num_crops, inverse_norms)
    return (_gram if prefers_gram(rows) else _streamed)(rows, v, g, num_crops, inverse_norms, known, native)


def _empty(rows: Tensor, inverse_norms: Tensor) -> Forward:
    dtype = accumulation_dtype(rows.dtype)
    wide, row = rows.new_empty(0, dtype=torch.float64), rows.new_empty(rows.shape, dtype=dtype)
    pairs = Pairs(wide, wide.long(), wide.clone(), row, row.clone())
    return Forward(rows.new_zeros((), dtype=dtype), pairs, inverse_norms)


def _walk(rows: Tensor, v: Tensor, g: Tensor, width: int, inverse_norms: Tensor, known: bool, native: bool):
    """The dtype of products; and the chunks of W for [width, chunk] buffers."""
    dtype = products.product_dtype(rows.dtype, rows.device)
    shape = chunk_size(width, v.shape[0]), dtype, accumulation_dtype(rows.dtype)
    return dtype, chunks(v, g, *shape, native, inverse_norms, known)


def _gram(
    rows: Tensor, v: Tensor, g: Tensor, num_crops: int, inverse_norms: Tensor, known: bool, native: bool
) -> Forward:
    """One walk over the prototypes: G = W'W and s = W'1, 2 K d d FLOPs whatever the batch."""
    dtype, walk = _walk(rows, v, g, min(v.shape[1], MAX_CHUNK), inverse_norms, known, native)
    accumulate = accumulation_dtype(rows.dtype)
    gram = torch.zeros(v.shape[1], v.shape[1], dtype=accumulate, device=v.device)
    total = torch.zeros(v.shape[1], dtype=accumulate, device=v.device)
    for chunk in walk:
        weights = (chunk.direction * chunk.scale[:, None]).to(dtype)
        gram.add_(torch.mm(weights.t(), weights))
        total.add_(weights.sum(0, dtype=accumulate))
    return _from_gram(rows, v.shape[0], gram, total, num_crops, inverse_norms)


def _from_gram(rows: Tensor, k: int, gram: Tensor, total: Tensor, num_crops: int, inverse_norms: Tensor) -> Forward:
    """The forward from G [d, d] and s [d] of k prototypes."""
    accumulate = accumulation_dtype(rows.dtype)
    x, wide = rows.double(), gram.double()
    gram_rows = x @ wide
    dots = gram_rows @ x.t()
    norms = dots.diagonal().clamp_min(0).sqrt()
    neighbours = nearest(dots, norms, num_crops)
    differences = normalised_differences(x, norms, neighbours)
    gram_differences = differences @ wide
    # ||W D + eps||^2 = D'GD + 2 eps s'D + K eps^2, of a difference vector: no cancellation.
    squares = (gram_differences * differences).sum(1) + 2 * EPS * (differences @ total.double()) + k * EPS**2
    gram_differences += EPS * total
    return _finish(norms, neighbours, squares, gram_rows, gram_differences, inverse_norms, num_crops, accumulate)


def _streamed(
    rows: Tensor, v: Tensor, g: Tensor, num_crops: int, inverse_norms: Tensor, known: bool, native: bool
) -> Forward:
    """Two walks with the R rows, 8 R K d FLOPs: one for norms and neighbours, one for the chosen differences."""
    accumulate = accumulation_dtype(rows.dtype)
    dtype, walk = _walk(rows, v, g, rows.shape[0], inverse_norms, known, native)
    x, narrow = rows.double(), rows.to(dtype)
    dots = x.new_zeros(rows.shape[0], rows.shape[0])
    gram_rows = torch.zeros(rows.shape, dtype=accumulate, device=rows.device)
    for chunk in walk:
        y = project(narrow, chunk)
        dots.add_(torch.mm(y, y.t()))
        gram_rows.add_(project_back(y, chunk))
    norms = dots.diagonal().sqrt()
    neighbours = nearest(dots, norms, num_crops)
    narrow = normalised_differences(x, norms, neighbours).to(dtype)
    squares = torch.zeros_like(norms)
    gram_differences = torch.zeros_like(gram_rows)
    for chunk in _walk(rows, v, g, rows.shape[0], inverse_norms, True, native)[1]:
        y = project(narrow, chunk).add_(EPS)
        squares.add_(y.square().sum(1))
        gram_differences.add_(project_back(y, chunk))
    return _finish(norms, neighbours, squares, gram_rows, gram_differences, inverse_norms, num_crops, accumulate)


def project(rows: Tensor, chunk: Chunk) -> Tensor:
    """``rows @ w.T`` [R, c] in the accumulation dtype."""
    return torch.mm(rows, chunk.direction.t()).to(chunk.scale.dtype).mul_(chunk.scale)


def project_back(y: Tensor, chunk: Chunk) -> Tensor:
    """``y @ w`` [R, d] in the dtype of products; y [R, c] is scaled in place."""
    return torch.mm(y.mul_(chunk.scale).to(chunk.direction.dtype), chunk.direction)


def nearest(dots: Tensor, norms: Tensor, num_crops: int) -> Tensor:
    """The row of the same crop with the largest dot product of normalised logits; itself if it is alone.

    Args:
        dots: [R, R] of the logits, all crops.
        norms: [R].

    Returns:
        int64 [R] into all rows.
    """
    count = dots.shape[0]
    size = count // num_crops
    scale = norms.clamp_min(EPS).reciprocal()
    index = torch.arange(num_crops, device=dots.device)
    shape = num_crops, size, num_crops, size
    blocks = (dots * scale[:, None] * scale).view(shape)[index, :, index]  # [num_crops, size, size]
    eye = torch.eye(size, dtype=torch.bool, device=dots.device)
    neighbour = blocks.masked_fill(eye, -torch.inf).argmax(2)
    return (neighbour + index[:, None] * size).view(count)


def normalised_differences(x: Tensor, norms: Tensor, neighbours: Tensor) -> Tensor:
    """D = x/n - x_nn/n_nn: W D is the difference of the normalised logits. [R, d] float64."""
    points = x / norms.clamp_min(EPS)[:, None]
    return points - points[neighbours]


def _finish(norms, neighbours, squares, gram_rows, gram_differences, inverse_norms, num_crops, accumulate) -> Forward:
    distances = squares.clamp_min(0).sqrt()
    loss = -(distances + EPS).log().sum() / (norms.shape[0] // num_crops)
    kept = gram_rows.to(accumulate), gram_differences.to(accumulate)
    return Forward(loss.to(accumulate), Pairs(norms, neighbours, distances, *kept), inverse_norms)


def backward(
    grad: Tensor,
    rows: Tensor,
    v: Tensor,
    g: Tensor,
    pairs: Pairs,
    inverse_norms: Tensor,
    num_crops: int,
    need_prototypes: bool = True,
    native: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, v and g for the loss's gradient ``grad`` []; pairs and norms are the forward's.

    Those of v and g, the only ones that cost a walk over the prototypes, have no elements if they are not needed.
    """
    none = v.new_empty(0), g.new_empty(0)
    if rows.shape[0] == 0:
        return torch.zeros_like(rows), *((torch.zeros_like(v), torch.zeros_like(g)) if need_prototypes else none)
    grad_rows, low_rank = differentiate(grad, rows, pairs, num_crops)
    grads = _grad_prototypes(low_rank, rows, v, g, inverse_norms, native) if need_prototypes else none
    return grad_rows.to(rows.dtype), *grads


def differentiate(grad: Tensor, rows: Tensor, pairs: Pairs, num_crops: int) -> tuple[Tensor, LowRank]:
    """Gradients of rows [R, d], float64, and of the effective prototypes W, for the loss's gradient ``grad`` []; R > 0.

    dW = W Z' diag(a) Z + 1 t' for Z = [D; x], a = [pull; turn], t = eps sum pull D; returned with about sqrt(|a|) Z for
    Z and a number of the size of 1 for a.
    """
    norms, neighbours, distances, gram_rows, gram_differences = pairs
    x = rows.double()
    clamped = norms.clamp_min(EPS)
    differences = normalised_differences(x, norms, neighbours)
    # d loss / d (distance^2) * 2: the gradient of W D + eps is `pull` times itself.
    pull = -grad.double() * num_crops / rows.shape[0] / ((distances + EPS) * distances)
    grad_differences = pull[:, None] * gram_differences  # [R, d]
    # Back to the neighbours by a product with a 0/1 matrix: index_add_ is not deterministic on a GPU.
    chosen = neighbours[None, :] == torch.arange(rows.shape[0], device=rows.device)[:, None]
    grad_points = grad_differences - chosen.double() @ grad_differences
    # The norm's own gradient, over the norm (as the norm's gradient for x is G x / n); none where it is clamped.
    turn = -(grad_points * x).sum(1) / clamped**3
    turn = torch.where(norms > EPS, turn, torch.zeros_like(turn))
    grad_rows = grad_points / clamped[:, None] + turn[:, None] * gram_rows
    shift = EPS * (pull @ differences)
    # Of each weight, 1 / distance^2 times a loss scale, either factor takes a root: alone it overflows float16. It is a
    # power of two, by which rows in a half type are multiplied exactly.
    weights = torch.cat([pull, turn])[:, None]
    root = (weights.abs().clamp_min(TINY).log2() / 2).round().exp2()
    z = torch.cat([torch.cat([differences, x]) * root, shift[None]])  # [2R + 1, d]
    narrow = z.to(products.product_dtype(rows.dtype, rows.device))
    return grad_rows, LowRank(narrow, (weights / root**2).to(accumulation_dtype(rows.dtype)))


def _grad_prototypes(
    low_rank: LowRank, rows: Tensor, v: Tensor, g: Tensor, inverse_norms: Tensor, native: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of v and g, each written once."""
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    grad_g = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    for chunk in _walk(rows, v, g, low_rank.rows.shape[0], inverse_norms, True, native)[1]:
        dz, along = low_rank.at(chunk, g[chunk.rows].detach())
        grad_g[chunk.rows, 0] = along.to(g.dtype)
        write_grad_v(grad_v[chunk.rows], dz, low_rank.rows, v[chunk.rows].detach(), along, chunk)
    return grad_v, grad_g
