"""Definition of mask_tokens in plain PyTorch."""

import torch
from torch import Tensor


def mask_tokens(tokens: Tensor, mask_token: Tensor, pos: Tensor, index: Tensor, rest: int = 0) -> Tensor:
    """See ``pera_kernels.mask_tokens``; differentiable in tokens, mask_token and pos."""
    n_seq = index.shape[0]
    tokens, others = tokens.split([tokens.shape[0] - rest, rest])
    new = (mask_token + pos[1 + index.long()]).to(tokens.dtype)
    grown = torch.cat([tokens.view(n_seq, tokens.shape[0] // n_seq, tokens.shape[1]), new], dim=1).flatten(0, 1)
    return torch.cat([grown, others])
