"""Indexing takes the workers that an earlier test left."""

from kept_workers import kept_workers  # noqa: F401 a fixture
