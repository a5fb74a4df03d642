"""Triton kernels of KoLeo's part on the rows alone, in float64, between its matrix products.

With PyTorch's operators these few kilobytes are 72 launches more. The maths is that of ``gram``, whose products stay
with cuBLAS: ``koleo_neighbours_kernel`` finds each row's neighbour and D, ``koleo_distances_kernel`` the loss's terms
from D and G D; backward, ``koleo_bwd_kernel`` makes the rows' gradient and the two factors of W's, and
``koleo_matrix_kernel`` scales their product. A program writes what is its own: no atomics, equal bits on every repeat.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import products
from ..aot import Variant
from ..distillation_loss.triton import Other
from ..distillation_loss.weight_norm import accumulation_dtype
from ..launching import on_their_device
from . import gram as plain

MAX_DIM = 2048  # a row in float64 has to fit one block's registers
MAX_ROWS = 4096  # rows of a crop, likewise
TILE = 4  # rows that one iteration of koleo_bwd_kernel looks through; more of them spill on some cards
BLOCK_ROWS = 128
NUM_WARPS = 4
EPS = tl.constexpr(plain.EPS)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _at_least(x, least):
    """clamp_min that keeps a NaN, as PyTorch's does: the step's check of its losses must see it."""
    return tl.where(x < least, least, x)


@triton.jit
def koleo_neighbours_kernel(
    dots_ptr,  # (R, R) float64, of the logits
    rows_ptr,  # (R, D)
    norms_ptr,  # (R,) float64
    neighbours_ptr,  # (R,) int64
    differences_ptr,  # (R, D) float64
    rows,
    size,  # rows of a crop
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = row // size * size
    place = tl.arange(0, BLOCK_G)
    other = first + place
    inside = place < size
    lengths = tl.sqrt(_at_least(tl.load(dots_ptr + other * (rows + 1), mask=inside, other=1.0), 0.0))
    norm = tl.sqrt(_at_least(tl.load(dots_ptr + row * (rows + 1)), 0.0))
    length = _at_least(norm, EPS)
    cosines = tl.load(dots_ptr + row * rows + other, mask=inside, other=0.0) / length / _at_least(lengths, EPS)
    cosines = tl.where(inside & (other != row), cosines, float("-inf"))
    # A row alone in its crop is its own neighbour; where all is NaN any row of the crop will do.
    neighbour = first + tl.minimum(tl.argmax(cosines, 0), size - 1)
    other_length = _at_least(tl.sqrt(_at_least(tl.load(dots_ptr + neighbour * (rows + 1)), 0.0)), EPS)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    x = tl.load(rows_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float64)
    y = tl.load(rows_ptr + neighbour * D + cols, mask=mask, other=0.0).to(tl.float64)
    tl.store(norms_ptr + row, norm)
    tl.store(neighbours_ptr + row, neighbour)
    tl.store(differences_ptr + row * D + cols, x / length - y / other_length, mask=mask)


@triton.jit
def koleo_distances_kernel(
    differences_ptr,  # (R, D) float64: D
    products_ptr,  # (R, D) float64: D G
    gram_rows_ptr,  # (R, D) float64: X G
    total_ptr,  # (D,) float32: s
    distances_ptr,  # (R,) float64
    terms_ptr,  # (R,) float64, whose sum is the loss
    kept_rows_ptr,  # (R, D) float32: X G
    kept_differences_ptr,  # (R, D) float32: D G + eps s
    size,
    prototypes,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    place = row * D + cols
    difference = tl.load(differences_ptr + place, mask=mask, other=0.0)
    product = tl.load(products_ptr + place, mask=mask, other=0.0)
    total = tl.load(total_ptr + cols, mask=mask, other=0.0).to(tl.float64)
    square = tl.sum(product * difference, 0) + 2 * EPS * tl.sum(total * difference, 0)
    distance = tl.sqrt(_at_least(square + tl.cast(prototypes, tl.float64) * (EPS * EPS), 0.0))
    tl.store(distances_ptr + row, distance)
    tl.store(terms_ptr + row, -tl.log(distance + EPS) / size)
    gram_row = tl.load(gram_rows_ptr + place, mask=mask, other=0.0)
    tl.store(kept_rows_ptr + place, gram_row.to(tl.float32), mask=mask)
    tl.store(kept_differences_ptr + place, (product + total * EPS).to(tl.float32), mask=mask)


@triton.jit
def koleo_bwd_kernel(
    grad_ptr,  # () float32
    rows_ptr,  # (R, D)
    norms_ptr,  # (R,) float64
    neighbours_ptr,  # (R,) int64
    distances_ptr,  # (R,) float64
    gram_rows_ptr,  # (R, D) float32
    gram_differences_ptr,  # (R, D) float32
    grad_rows_ptr,  # (R, D)
    factor_ptr,  # (2 R, D) float32: Z = [D; X]
    weighted_ptr,  # (2 R, D) float32: diag(pull, turn) Z
    rows,
    size,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = row // size * size
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    place = row * D + cols
    # d loss / d (distance^2) * 2: the gradient of W D + eps is `pull` times itself.
    upstream = -tl.load(grad_ptr).to(tl.float64) / size
    distance = tl.load(distances_ptr + row)
    pull = upstream / ((distance + EPS) * distance)
    grad_point = pull * tl.load(gram_differences_ptr + place, mask=mask, other=0.0).to(tl.float64)
    for start in range(0, size, TILE):  # the rows whose neighbour this one is, in their order
        near = start + tl.arange(0, TILE)
        other = first + near
        chosen = tl.load(neighbours_ptr + other, mask=near < size, other=-1) == row
        distances = tl.load(distances_ptr + other, mask=chosen, other=1.0)
        pulls = tl.where(chosen, upstream / ((distances + EPS) * distances), 0.0)
        both = chosen[:, None] & mask[None, :]
        products = tl.load(gram_differences_ptr + other[:, None] * D + cols[None, :], mask=both, other=0.0)
        grad_point -= tl.sum(pulls[:, None] * products.to(tl.float64), 0)
    x = tl.load(rows_ptr + place, mask=mask, other=0.0).to(tl.float64)
    norm = tl.load(norms_ptr + row)
    length = _at_least(norm, EPS)
    neighbour = tl.load(neighbours_ptr + row)
    y = tl.load(rows_ptr + neighbour * D + cols, mask=mask, other=0.0).to(tl.float64)
    difference = x / length - y / _at_least(tl.load(norms_ptr + neighbour), EPS)
    # The norm's own gradient, over the norm (as the norm's gradient for x is G x / n); none where it is clamped.
    turn = tl.where(norm > EPS, -tl.sum(grad_point * x, 0) / (length * length * length), 0.0)
    gram_row = tl.load(gram_rows_ptr + place, mask=mask, other=0.0).to(tl.float64)
    grad_row = grad_point / length + turn * gram_row
    tl.store(grad_rows_ptr + place, grad_row.to(grad_rows_ptr.dtype.element_ty), mask=mask)
    below = (row + rows) * D + cols
    tl.store(factor_ptr + place, difference.to(tl.float32), mask=mask)
    tl.store(factor_ptr + below, x.to(tl.float32), mask=mask)
    tl.store(weighted_ptr + place, (pull * difference).to(tl.float32), mask=mask)
    tl.store(weighted_ptr + below, (turn * x).to(tl.float32), mask=mask)


@triton.jit
def koleo_matrix_kernel(
    matrix_ptr,  # (D, D) float32
    largest_ptr,  # () float32, of the matrix
    weighted_ptr,  # (2 R, D) float32: its first R rows are pull D
    out_ptr,  # (D, D), dtype of products
    scale_ptr,  # () float32
    shift_ptr,  # (D,) float32: eps sum pull D
    rows,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    scale = _at_least(tl.load(largest_ptr), TINY)
    values = tl.load(matrix_ptr + row * D + cols, mask=mask, other=0.0)
    tl.store(out_ptr + row * D + cols, tl.div_rn(values, scale).to(out_ptr.dtype.element_ty), mask=mask)
    shift = 0.0
    for start in range(0, rows, BLOCK_R):
        place = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        shift += tl.sum(tl.load(weighted_ptr + place * D + row, mask=place < rows, other=0.0), 0)
    tl.store(shift_ptr + row, shift * EPS)
    tl.store(scale_ptr, scale, mask=row == 0)


def why_not(rows: Tensor, num_crops: int) -> str | None:
    """Why these kernels cannot take rows [R, d] of so many crops, or None."""
    if rows.dtype == torch.float64:
        return "float64 runs in PyTorch only"
    if rows.shape[0] == 0 or rows.shape[1] == 0:
        return "there is nothing to launch for"
    if rows.shape[1] > MAX_DIM or rows.shape[0] // num_crops > MAX_ROWS:
        return f"rows of more than {MAX_DIM} values or crops of more than {MAX_ROWS} rows do not fit one block"
    return None


def _columns(dim: int) -> dict[str, int]:
    return {"D": dim, "BLOCK_D": triton.next_power_of_2(dim)}


@on_their_device
def forward(
    rows: Tensor, gram: Tensor, total: Tensor, prototypes: int, num_crops: int, inverse_norms: Tensor
) -> plain.Forward:
    """As ``gram``'s forward, from G (d, d) and s (d,), float32, of so many prototypes."""
    rows, (count, dim) = rows.contiguous(), rows.shape
    size = count // num_crops
    x, wide = rows.double(), gram.double()
    gram_rows = x @ wide
    dots = gram_rows @ x.t()
    norms, distances, terms = (x.new_empty(count) for _ in range(3))
    neighbours = torch.empty(count, dtype=torch.int64, device=rows.device)
    differences = torch.empty_like(x)
    koleo_neighbours_kernel[(count,)](
        dots, rows, norms, neighbours, differences, count, size,
        BLOCK_G=triton.next_power_of_2(size), **_columns(dim), num_warps=NUM_WARPS,
    )  # fmt: skip
    kept_rows, kept_differences = (torch.empty_like(x, dtype=accumulation_dtype(rows.dtype)) for _ in range(2))
    koleo_distances_kernel[(count,)](
        differences, differences @ wide, gram_rows, total, distances, terms, kept_rows, kept_differences, size,
        prototypes, **_columns(dim), num_warps=NUM_WARPS,
    )  # fmt: skip
    loss = terms.sum().to(kept_rows.dtype)
    pairs = plain.Pairs(norms, neighbours, distances, kept_rows, kept_differences)
    return plain.Forward(loss, pairs, inverse_norms)


@on_their_device
def differentiate(grad: Tensor, rows: Tensor, pairs: plain.Pairs, num_crops: int) -> tuple[Tensor, Other]:
    """As ``gram.differentiate``: the gradient of rows (R, d), in their dtype, and that of W."""
    gram_rows = pairs.gram_rows
    rows, (count, dim) = rows.contiguous(), rows.shape
    grad_rows = torch.empty_like(rows)
    factor, weighted = (gram_rows.new_empty(2 * count, dim) for _ in range(2))
    koleo_bwd_kernel[(count,)](
        grad, rows, *pairs, grad_rows, factor, weighted, count, count // num_crops,
        **_columns(dim), TILE=TILE, num_warps=NUM_WARPS,
    )  # fmt: skip
    matrix = weighted.t() @ factor
    narrow = torch.empty_like(matrix, dtype=products.product_dtype(rows.dtype, rows.device))
    scale, shift = matrix.new_empty(()), matrix.new_empty(dim)
    koleo_matrix_kernel[(dim,)](
        matrix, torch.linalg.vector_norm(matrix, torch.inf), weighted, narrow, scale, shift, count,
        **_columns(dim), BLOCK_R=BLOCK_ROWS, num_warps=NUM_WARPS,
    )  # fmt: skip
    return grad_rows, Other(narrow, scale, shift)


def _variants() -> list[Variant]:
    name, wide, single, half, size = "vit_s16, vit_b16, vit_g16 bf16", "*fp64", "*fp32", "*bf16", "i32"
    columns = _columns(384)
    per_row = {"rows_ptr": half, "norms_ptr": wide, "neighbours_ptr": "*i64", "distances_ptr": wide}
    counts = {"rows": size, "size": size, "prototypes": size}
    matrices = {"differences_ptr": wide, "products_ptr": wide, "gram_rows_ptr": wide}
    kept = {"kept_rows_ptr": single, "kept_differences_ptr": single, "total_ptr": single, "terms_ptr": wide}
    backward = {"grad_ptr": single, "gram_rows_ptr": single, "gram_differences_ptr": single, "grad_rows_ptr": half}
    factors = {"factor_ptr": single, "weighted_ptr": single}
    scaled = {"matrix_ptr": single, "largest_ptr": single, "out_ptr": half, "scale_ptr": single, "shift_ptr": single}
    return [
        Variant(
            name, koleo_neighbours_kernel, {"dots_ptr": wide, **per_row, **matrices, **counts},
            {**columns, "BLOCK_G": 64}, NUM_WARPS,
        ),
        Variant(name, koleo_distances_kernel, {**per_row, **matrices, **kept, **counts}, columns, NUM_WARPS),
        Variant(
            name, koleo_bwd_kernel, {**per_row, **backward, **factors, **counts}, {**columns, "TILE": TILE}, NUM_WARPS
        ),
        Variant(
            name, koleo_matrix_kernel, {**scaled, **factors, **counts}, {**columns, "BLOCK_R": BLOCK_ROWS}, NUM_WARPS
        ),
    ]  # fmt: skip


VARIANTS = _variants()
