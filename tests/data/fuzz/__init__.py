"""Fuzzing: mutated files of every kind that pera-fast reads, for as long as one likes.

`python -m tests.data.fuzz --minutes 30` runs it from the root of the repository; CONTRIBUTING.md says more.
"""
