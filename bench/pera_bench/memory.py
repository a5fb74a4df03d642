"""Compares the memory of real steps with simulated ones: `python -m pera_bench.memory DEVICE RECIPE 16,32 OUT.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pera_fast.profile.fits import fit_points
from pera_fast.profile.points import POLICIES, Point, Variant
from pera_fast.profile.processes import run_points, simulating_jobs


def main(device: str, recipe: str, images: str, out: str) -> None:
    """Bytes an image adds, measured and simulated, for each policy of recomputation."""
    found = []
    for policy in POLICIES:
        variant = Variant(recipe, (f"model.recompute={policy}",))
        entry: dict[str, object] = {"policy": policy}
        for name in (device, "simulate"):
            points = [Point(variant, int(n), name, steps=2) for n in images.split(",")]
            points = run_points(points, simulating_jobs() if name == "simulate" else 1)
            line = fit_points(points)
            entry[name] = {
                "points": [{k: getattr(p, k) for k in ("batch_size", "status", "note", "peak")} for p in points],
                "mib_per_image": line.slope / 2**20 if line else None,
                "mib_fixed": line.fixed / 2**20 if line else None,
            }
        found.append(entry)
        Path(out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")  # what there is, if time runs out


if __name__ == "__main__":
    main(*sys.argv[1:])
