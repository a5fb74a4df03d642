"""Count the step of commit fce4329, the first that a GPU measured: writes step-fce4329.json, which test_predict reads.

To make the file again, in a worktree of that commit: copy on_gpu.py, work.py and operators.py of pera_fast/profile and
kernels/pera_kernels/cost.py there, and run with the worktree and its kernels/ on PYTHONPATH

    python record_step.py step-fce4329.json

Its ops state no costs, so each is opened: what it calls is counted. Of its trainer's names this uses those that it had.
"""

from __future__ import annotations

import json
import sys
from itertools import repeat
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pera_fast.config import load_config
from pera_fast.model.pera import PerA
from pera_fast.profile import simulate
from pera_fast.profile.batches import blank_batch
from pera_fast.profile.on_gpu import GPU, on_gpu
from pera_fast.profile.work import Counting
from pera_fast.ranges import listening
from pera_fast.train.distributed import World
from pera_fast.train.inputs import make_inputs
from pera_fast.train.optim import make_optimizer, make_scaler
from pera_fast.train.step import train_step

COMMIT, RECIPE, BATCHES = "fce4329", "vit_b16", (16, 64, 128, 256, 512)
H200 = (9, 0), 132, 50 << 20


def rows(batch: int) -> list[list[object]]:
    """Rows of a step's work (``pera_fast.profile.work.Row``), each with how often it comes; the first step apart."""
    cfg = load_config(RECIPE, [f"train.batch_size={batch}"])
    assert cfg.model.recompute == "cheap"
    real = make_inputs(blank_batch(cfg, batch), cfg)
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
    return [[*row, times] for row, times in sorted(counting.work.rows.items(), key=lambda item: str(item[0]))]


def main() -> None:
    """Writes the file that the argument names."""
    steps = {str(batch): rows(batch) for batch in BATCHES}
    lines = [f'"{batch}": {json.dumps(rows, separators=(",", ":"))}' for batch, rows in steps.items()]
    head = json.dumps({"commit": COMMIT, "recipe": RECIPE, "recompute": "cheap"})[:-1]
    Path(sys.argv[1]).write_text(head + ', "rows": {\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
