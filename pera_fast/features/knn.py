"""k-nearest-neighbour classification of frozen features, the field's quickest probe."""

import torch
import torch.nn.functional as F
from torch import Tensor


def knn_predict(
    train: Tensor, train_labels: Tensor, test: Tensor, num_classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Class of each test feature by a vote of its nearest training features.

    Args:
        train: [N, D] features; train_labels: int64 [N].
        test: [M, D].
        num_classes: classes C; labels are 0 .. C - 1.
        k: neighbours, at most N; each votes with exp(cosine similarity / temperature).
        temperature: of the vote.

    Returns:
        int64 [M].
    """
    similarity = F.normalize(test.float(), dim=1) @ F.normalize(train.float(), dim=1).t()
    nearest, index = similarity.topk(min(k, train.shape[0]), dim=1)
    # Differences to the best neighbour: the same vote, without large exponents.
    weight = ((nearest - nearest[:, :1]) / temperature).exp()
    votes = torch.zeros(test.shape[0], num_classes).scatter_add_(1, train_labels[index], weight)
    return votes.argmax(1)


def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Share of test features that knn_predict gets right."""
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    predicted = knn_predict(train, train_labels, test, num_classes, k, temperature)
    return (predicted == test_labels).float().mean().item()
