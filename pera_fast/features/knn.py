"""k-nearest-neighbour classification of frozen features, the field's quickest probe."""

import torch
import torch.nn.functional as F
from torch import Tensor

_BUDGET = 1 << 26  # similarities at a time


def knn_shares(train: Tensor, targets: Tensor, test: Tensor, k: int = 20, temperature: float | None = 0.07) -> Tensor:
    """Shares of the votes for each class, by the nearest training features of each test feature.

    Args:
        train: [N, D] features.
        targets: [N, C] of 0 and 1: the classes of each; one, or several.
        test: [M, D].
        k: neighbours, at most N.
        temperature: neighbours by cosine similarity, each votes with exp(similarity / temperature). None: neighbours
            by Euclidean distance, with one vote each; of equal votes the nearer neighbours' count.

    Returns:
        float32 [M, C] on the device of the features; of one class each they sum to 1.
    """
    train, targets = train.float(), targets.float()
    if temperature is not None:
        train = F.normalize(train, dim=1)
    parts = test.split(max(_BUDGET // max(len(train), 1), 1))
    return torch.cat([_shares(train, targets, part.float(), min(k, len(train)), temperature) for part in parts])


def _shares(train: Tensor, targets: Tensor, test: Tensor, k: int, temperature: float | None) -> Tensor:
    if temperature is not None:
        nearest, index = (F.normalize(test, dim=1) @ train.t()).topk(k, dim=1)
        # Differences to the best neighbour: the same vote, without large exponents.
        weight = ((nearest - nearest[:, :1]) / temperature).exp()
    else:
        index = torch.cdist(test, train).topk(k, dim=1, largest=False).indices
        weight = (1 + 1e-3 * torch.linspace(1, 0, k, device=test.device)).expand(len(test), k)
    votes = (weight[:, :, None] * targets[index]).sum(1)
    return votes / weight.sum(1, keepdim=True)


def knn_predict(
    train: Tensor, train_labels: Tensor, test: Tensor, num_classes: int, k: int = 20, temperature: float | None = 0.07
) -> Tensor:
    """Class of each test feature by a vote of its nearest training features.

    Args:
        train: [N, D] features; train_labels: int64 [N].
        test: [M, D].
        num_classes: classes C; labels are 0 .. C - 1.
        k, temperature: as of `knn_shares`.

    Returns:
        int64 [M].
    """
    return knn_shares(train, F.one_hot(train_labels, num_classes), test, k, temperature).argmax(1)


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    k: int = 20,
    temperature: float | None = 0.07,
) -> float:
    """Share of test features that knn_predict gets right."""
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    predicted = knn_predict(train, train_labels, test, num_classes, k, temperature)
    return (predicted == test_labels).float().mean().item()
