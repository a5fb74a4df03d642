"""Ceilings of this machine that no one waits for."""

import json
from pathlib import Path

import pytest
import torch

from pera_bench.ceilings import cache_path

CEILINGS = {"copy": 1e10, "matrix": 1e11}


def write_ceilings(cache: Path) -> None:
    """What `pera-fast bench` finds in the cache folder, on a CPU with one thread in fp32, instead of measuring it."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        torch.set_num_threads(1)
        path = cache_path(torch.device("cpu"), "fp32")
        torch.set_num_threads(threads)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(CEILINGS))
