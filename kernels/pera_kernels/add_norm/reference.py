"""Definition of add_norm in plain PyTorch."""

from collections.abc import Sequence

from torch import Tensor

from ..packing import kept_groups, num_tokens
from ..sequence_add.reference import sequence_add
from ..sequence_norm.reference import sequence_norm


def add_norm(
    x: Tensor,
    y: Tensor | None,
    y_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    groups: Sequence[int],
    add_keep: Tensor | None = None,
    add_counts: Sequence[int] = (),
    norm_keep: Tensor | None = None,
    norm_counts: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """See ``pera_kernels.add_norm``; differentiable in x, y, y_bias, weight and bias. Subsets come without places.

    Half types are widened to float32 around the sum, which is rounded once.
    """
    wide = x.double() if x.dtype.itemsize == 8 else x.float()
    if y is not None:
        branch = y.to(wide.dtype)
        if y_bias is not None:
            branch = branch + y_bias.to(wide.dtype)
        assert branch.shape[0] == num_tokens(kept_groups(groups, None if add_keep is None else add_counts))
        wide = sequence_add(wide, branch, add_keep, groups, add_counts)
    stream = wide.to(x.dtype)
    if weight is None or bias is None:
        return stream, stream.new_empty(0, stream.shape[1])
    return stream, sequence_norm(stream, weight, bias, eps, norm_keep, groups, norm_counts)
