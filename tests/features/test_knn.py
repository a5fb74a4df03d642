"""kNN on features."""

import torch

from pera_fast.features.knn import knn_accuracy, knn_predict, knn_shares


def clusters(spread: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Five classes of 40 points around directions of their own."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.eye(5, 16).repeat_interleave(40, 0)
    return centres + spread * torch.randn(200, 16, generator=generator), torch.arange(5).repeat_interleave(40)


def test_separable_classes_are_told_apart() -> None:
    train, labels = clusters(0.1)
    test, _ = clusters(0.1, seed=1)
    assert knn_accuracy(train, labels, test, labels) == 1.0


def test_noise_is_told_apart_by_chance_only() -> None:
    train, test = (torch.randn(1000, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    labels = torch.arange(1000) % 5
    assert abs(knn_accuracy(train, labels, test, labels) - 0.2) < 0.06


def test_length_of_a_feature_does_not_matter_and_near_neighbours_weigh_more() -> None:
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [0.2, 1.0]])
    labels = torch.tensor([0, 1, 1, 1])
    test = torch.tensor([[50.0, 1.0], [0.0, 0.02]])
    assert knn_predict(train, labels, test, 2, k=4).tolist() == [0, 1]


def test_euclidean_votes_count_alike_and_a_tie_goes_to_the_nearer() -> None:
    train = torch.tensor([[0.0], [1.0], [3.0], [4.0]])
    labels = torch.tensor([1, 0, 0, 1])
    assert knn_predict(train, labels, torch.tensor([[0.1], [2.4]]), 2, k=2, temperature=None).tolist() == [1, 0]
    assert knn_predict(train, labels, torch.tensor([[0.1]]), 2, k=3, temperature=None).tolist() == [0]


def test_shares_of_several_labels(monkeypatch) -> None:
    train = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    targets = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 1]])
    whole = knn_shares(train, targets, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), k=2)
    assert whole[0, 0] == 1
    assert 0.5 < whole[0, 1] < 0.55, "the nearer of the two has the label"
    assert whole[0, 2] == 0
    monkeypatch.setattr("pera_fast.features.knn._BUDGET", 3)  # one test feature at a time
    assert torch.equal(knn_shares(train, targets, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), k=2), whole)
