"""Networks as small as the tests' are slower on many threads; and what is compared bit for bit needs equally many."""

from collections.abc import Iterator

import pytest
import torch
from kept_workers import kept_workers  # noqa: F401 a fixture


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
