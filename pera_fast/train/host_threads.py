"""PyTorch's threads on the CPU, held to the cores that the process may use."""

import torch

from pera_fast.cores import default_workers


def hold_to_quota() -> None:
    """Takes no more threads than whole cores: PyTorch counts the machine's, whatever a container's quota allows.

    Threads beyond the quota spend it waiting for each other.
    """
    cores = default_workers()
    if torch.get_num_threads() > cores:
        torch.set_num_threads(cores)
