"""Indexing takes the workers that an earlier test left; a GPU for tests without one."""

from fake_cuda import fake_cuda  # noqa: F401 a fixture
from kept_workers import kept_workers  # noqa: F401 a fixture
