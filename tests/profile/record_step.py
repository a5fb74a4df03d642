"""Count a step that a GPU measured: writes a file such as step-fce4329.json, which test_predict reads.

    python tests/profile/record_step.py COMMIT OUT STEP...

counts steps of vit_b16; a STEP is a batch size, with settings after commas: 64,model.teacher_precision=fp8. Run it at
the commit that was measured, with that worktree and its kernels/ on PYTHONPATH. The first two were measured before a
step could be counted:

- fce4329 (16 64 128 256 512): copy on_gpu.py, pointers.py, work.py and operators.py of pera_fast/profile and
  kernels/pera_kernels/cost.py into a worktree of it. Its ops state no costs, so each is opened: what it calls is
  counted.
- 2d9b0ae (16 64 256 64,model.teacher_precision=fp8): pick 20f3b16 on top (with 2d9b0ae's ``_fused`` of linear_gelu),
  then copy these five files. ``counted`` in bench/results/gpu/2-h200-2d9b0ae.json is ``count.count_kernels`` there,
  with count.py copied too.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from itertools import repeat
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pera_fast.config import Config, load_config
from pera_fast.model.pera import PerA
from pera_fast.profile import simulate
from pera_fast.profile.batches import blank_batch
from pera_fast.profile.on_gpu import GPU, on_gpu
from pera_fast.profile.work import Counting, Work
from pera_fast.ranges import listening
from pera_fast.train.distributed import World
from pera_fast.train.inputs import make_inputs
from pera_fast.train.optim import make_optimizer, make_scaler
from pera_fast.train.step import train_step

RECIPE = "vit_b16"
H200 = (9, 0), 132, 50 << 20


def count(cfg: Config) -> Work:
    """The work of a step as this commit counts it, or as it can be counted at fce4329."""
    if importlib.util.find_spec("pera_fast.profile.count") is None:
        return second_step(cfg)
    from pera_fast.profile.count import count_step

    return count_step(cfg)


def second_step(cfg: Config) -> Work:
    """The work of a run's second step, by names that fce4329 has."""
    plan = cfg.train.resolve_batch(1)
    real = make_inputs(blank_batch(cfg, plan.per_device), cfg)
    with torch.device("meta"):
        model = PerA(cfg)
    fake, counting = FakeTensorMode(allow_non_fake_inputs=True), Counting()
    gpu = on_gpu(*H200, counting.launched, lambda _: None)
    with fake, counting, gpu, listening(counting.label):
        model = model.to_empty(device="cpu")
        optimizer, scaler = make_optimizer(model.parameters(), cfg), make_scaler(cfg, GPU)
        inputs = repeat(simulate._copies(real, fake))  # pyright: ignore[reportAttributeAccessIssue] of that commit
        for _ in range(2):
            counting.begin({})
            train_step(*(model, model, optimizer, scaler, inputs, 1, simulate.VALUES, cfg.optim.clip, World(0, 1, GPU)))
    return counting.work


def rows(step: str) -> list[list[object]]:
    """Rows of a step's work (``pera_fast.profile.work.Row``), each with how often it comes."""
    batch, *overrides = step.split(",")
    work = count(load_config(RECIPE, [f"train.batch_size={batch}", *overrides]))
    return [[*row, times] for row, times in sorted(work.rows.items(), key=lambda item: str(item[0]))]


def main() -> None:
    """Writes the file that the arguments name."""
    commit, out, *steps = sys.argv[1:]
    lines = [f'"{step}": {json.dumps(rows(step), separators=(",", ":"))}' for step in steps]
    head = json.dumps({"commit": commit, "recipe": RECIPE})[:-1]
    Path(out).write_text(head + ', "rows": {\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
