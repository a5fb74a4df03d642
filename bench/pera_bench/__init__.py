"""Benchmarks of every op, of blocks and of whole steps, against measured ceilings of the machine.

`pera-fast bench` runs them. A bench is a row: one suite (`suites/<name>.py`), one of its cases, a direction (forward,
forward+backward), an implementation, a recipe, a number of images. pytest-benchmark takes the times.
"""

import os

from pera_fast.cores import default_workers

_ALLOWED = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
CORES = _ALLOWED[: default_workers()]
"""Cores that this process has, as many as its quota allows, taken before torch pins its threads."""
