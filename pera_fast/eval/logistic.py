"""Logistic regression on features, for many strengths of regularisation at once: the field's linear probe."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pera_fast.eval.lbfgs import minimise

STRENGTHS = 10.0 ** torch.linspace(-6, 5, 40, dtype=torch.float64)  # values of C: the range of DINOv2's linear probe
# Numbers in the largest tensors of one batch of problems. On a CPU few at a time are quicker, each batch beginning
# where the last ended: 40 values of C, 1680 x 384 features, 21 classes, one core: 3.1 s by 4, 4.0 s all at once.
_BUDGET = {"cpu": 1 << 20, "cuda": 1 << 26}


@dataclass(frozen=True)
class Linear:
    """Linear classifiers of standardised features.

    Attributes:
        mean, std: [D] of the features that it was fitted on.
        weight: [D, K, C] for K classifiers of C classes; bias: [K, C].
        converged: share of the K searches that ended by the tolerance.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor
    converged: float

    def logits(self, features: Tensor) -> Tensor:
        """Features [N, D] -> logits [K, N, C]."""
        rows = (features.to(self.weight) - self.mean) / self.std
        d, k, c = self.weight.shape
        return (rows @ self.weight.reshape(d, k * c)).view(-1, k, c).transpose(0, 1) + self.bias[:, None]


def fit(
    features: Tensor, targets: Tensor, classes: int, strengths: Tensor = STRENGTHS, tolerance: float = 1e-4
) -> Linear:
    """Logistic regressions on the same features, one for each C.

    Minimises the mean loss + |w|^2 / (2 C N), scikit-learn's objective divided by C N; the bias is not regularised.
    Features are standardised and turned onto their principal axes first, where the second derivatives are nearly
    diagonal: L-BFGS then needs a tenth of the steps, and with fewer samples than features the axes are fewer too.

    Args:
        features: [N, D] on the device that computes.
        targets: int64 [N], one class each, then the loss is the cross entropy; or float [N, C] of 0 and 1, several
            classes each, then it is the sum over classes of the binary one.
        classes: C; one that no sample has is allowed.
        strengths: [K] values of C, rising.
        tolerance: of the largest entry of the gradient.
    """
    features = features.float()
    mean, std = features.mean(0), features.std(0, correction=0)
    std = torch.where(std > 1e-6 * (1 + mean.abs()), std, 1.0)
    rows = (features - mean) / std
    variance, axes = _principal(rows)
    data = torch.cat([rows @ axes.t(), rows.new_ones(len(rows), 1)], 1)
    penalty = (1 / (strengths * len(rows))).to(data)
    # Classes that exclude each other are one problem; else each class is a problem of its own.
    groups, width = (1, classes) if targets.ndim == 1 else (classes, 1)
    size = max(_BUDGET[data.device.type] // (classes * max(len(rows), 20 * data.shape[1])), 1)
    found, done, start = [], [], data.new_zeros(data.shape[1], groups, width)
    for part in penalty.split(size):
        problem = _Problem(data, targets, part.repeat_interleave(groups))
        best, converged = minimise(problem, start.repeat(1, len(part), 1), problem.scale(variance, classes), tolerance)
        start = best[:, -groups:]
        found.append(best)
        done.append(converged)
    best = torch.cat(found, 1).view(data.shape[1], len(penalty), classes)
    weight = (axes.t() @ best[:-1].flatten(1)).view(-1, *best.shape[1:])
    return Linear(mean, std, weight, best[-1], torch.cat(done).float().mean().item())


def _principal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Variances [d] along the principal axes [d, D] of centred rows [N, D]; d is at most N."""
    count, width = rows.shape
    if count > width:
        variance, axes = torch.linalg.eigh(rows.t() @ rows / count)
        return variance.clamp_min(0), axes.t()
    _, singular, axes = torch.linalg.svd(rows, full_matrices=False)
    kept = singular > 1e-6 * singular.max().clamp_min(1e-12)
    return singular[kept].square() / count, axes[kept]


class _Problem:
    """Values and gradients of regularised logistic losses.

    Args:
        data: [N, d], the last column ones.
        targets: as of `fit`.
        penalty: [k], factors of |w|^2 / 2. Where scenes have several labels, of each class in turn for each strength.
    """

    def __init__(self, data: Tensor, targets: Tensor, penalty: Tensor):
        self.data, self.targets, self.penalty = data, targets, penalty
        self.free = torch.ones(data.shape[1], 1, 1).to(data)
        self.free[-1] = 0  # the bias

    def __call__(self, point: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        d, k, c = point.shape
        count = len(self.data)
        logits = (self.data @ point.reshape(d, k * c)).view(count, k, c)
        if self.targets.ndim == 1:
            logs = F.log_softmax(logits, 2)
            index = self.targets[:, None, None].expand(count, k, 1)
            loss = -logs.gather(2, index).sum((0, 2))
            slope = logs.exp_().scatter_add_(2, index, -torch.ones_like(index, dtype=logs.dtype))
        else:
            wanted = self.targets[:, rows % self.targets.shape[1], None].to(logits)
            loss = (F.softplus(logits) - logits * wanted).sum((0, 2))
            slope = logits.sigmoid() - wanted
        weight = point * self.free
        penalty = self.penalty[rows]
        value = loss / count + 0.5 * penalty * weight.square().sum((0, 2))
        gradient = (self.data.t() @ slope.reshape(count, k * c)).view(d, k, c) / count + penalty[:, None] * weight
        return value, gradient

    def scale(self, variance: Tensor, classes: int) -> Tensor:
        """Inverse of an estimate of the second derivatives' diagonal [d, k, 1]."""
        share = 1 / classes if self.targets.ndim == 1 else 0.5
        curvature = share * (1 - share) * torch.cat([variance, variance.new_ones(1)])
        return 1 / (curvature[:, None, None] + self.penalty[:, None] * self.free).clamp_min(1e-12)
