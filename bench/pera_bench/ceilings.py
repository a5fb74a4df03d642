"""Measures the machine's ceilings once and caches them: bandwidth of a large copy, rate of large matrix products.

Every percentage of a bench is of these, but that of a long call on a CPU (`RateMeanwhile`). Kept in the user's cache by
device, torch, threads and precision; `pera-fast bench --remeasure` takes them again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pera_bench.machine import describe
from pera_bench.timing import clock, flusher
from pera_fast.model.pera import PRECISIONS
from pera_fast.profile.machine import device_name
from pera_kernels.products import product_dtype

COPY_BYTES = {"cpu": 2**29, "cuda": 2**31}
SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices
ROUNDS = 12
Clock = Callable[[], Any]


def ceilings(
    device: torch.device, precision: str, *, processor: bool = False, remeasure: bool = False
) -> dict[str, float]:
    """{"copy": bytes/s read and written, "matrix": FLOP/s}, measured now or earlier on this machine.

    Args:
        processor: per second of processor time, see `timing.clock`.
    """
    path = cache_path(device, precision, processor)
    if not remeasure:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            pass
    now = clock(device, processor)
    dtype = product_dtype(PRECISIONS[precision], device)  # half types in float32 where that is the faster way
    found = {"copy": copy_bandwidth(device, now), "matrix": matrix_rate(device, dtype, now)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found), encoding="utf-8")
    except OSError:
        pass  # a cache that cannot be written costs some seconds the next time
    return found


def cache_path(device: torch.device, precision: str, processor: bool = False) -> Path:
    """One file for each device, version of torch, precision, and on a CPU number of threads and clock."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    cpu = [torch.get_num_threads(), processor] if device.type == "cpu" else []
    key = [device_name(device.type), device.type, torch.__version__, *cpu, precision]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return Path(cache) / "pera-fast" / "ceilings" / f"{device.type}-{precision}-{digest}.json"


def copy_bandwidth(device: torch.device, now: Clock) -> float:
    """Bytes read and written per second by the fastest of several copies of a tensor larger than the caches."""
    source = torch.ones(_fitting(device), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _fastest(device, now, lambda: target.copy_(source))


def matrix_rate(device: torch.device, dtype: torch.dtype, now: Clock) -> float:
    """FLOP/s of the fastest of several products of square matrices."""
    call, flops = _square_product(device, dtype)
    return flops / _fastest(device, now, call)


def _square_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Any], int]:
    """A large product and its FLOPs."""
    n = SIDE[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2 * n**3


class RateMeanwhile:
    """Rate of large products on a CPU between the rounds of a long call, by the same clock: their mean.

    A machine whose cores are shared with others has no one rate: what it gives changes by a factor from minute to
    minute, so the fastest product of another minute says little about a call.

    Attributes:
        flops, seconds: of the products so far.
    """

    def __init__(self, precision: str, now: Clock) -> None:
        device = torch.device("cpu")
        self._call, self._flops = _square_product(device, product_dtype(PRECISIONS[precision], device))
        self._now = now
        self._call()  # the first one packs and plans
        self.flops, self.seconds = 0, 0.0

    def sample(self, seconds: float) -> None:
        """Make products for that long, at least one."""
        end = self.seconds + seconds
        while True:
            start = self._now()
            self._call()
            self.flops, self.seconds = self.flops + self._flops, self.seconds + self._now() - start
            if self.seconds >= end:
                return

    @property
    def rate(self) -> float:
        """FLOP/s."""
        return self.flops / self.seconds


def _fitting(device: torch.device) -> int:
    """Bytes of the copy: less on a device with little free memory."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2**40
    return min(COPY_BYTES[device.type], free // 4)


def _fastest(device: torch.device, now: Clock, call: Callable[[], Any]) -> float:
    """Seconds. The fastest: a ceiling is what nothing can exceed, and disturbances only slow down."""
    flush = flusher(device)
    seconds = []
    for _ in range(2 + ROUNDS):
        flush()
        start = now()
        call()
        end = now()
        seconds.append(end - start)
    return min(seconds[2:])


def main(device_type: str, out: str) -> None:
    """`python -m pera_bench.ceilings cuda OUT.json`: measures anew, in every precision."""
    device = torch.device(device_type)
    record: dict[str, Any] = {"machine": describe(device), "found": {}}
    for precision in PRECISIONS:
        record["found"][precision] = ceilings(device, precision, remeasure=True)
        Path(out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")  # what there is, if time runs out


if __name__ == "__main__":
    main(*sys.argv[1:])
