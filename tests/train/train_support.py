"""A run small enough for a test: random crops instead of files, a network of a few thousand weights."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pera_fast.config import Config, load_config
from pera_fast.data.loading.batch import Batch, ColorParams, CropGroup
from pera_fast.data.sampling.order import SampleOrder
from pera_fast.model.pera import PerA
from pera_fast.train.checkpoint import FORMAT
from pera_fast.train.compute_copies import make_copies
from pera_fast.train.distributed import World
from pera_fast.train.fused_update import make_update
from pera_fast.train.inputs import make_inputs
from pera_fast.train.loop import Run
from pera_fast.train.optim import make_optimizer, make_scaler
from pera_fast.train.run_folder import RunFolder
from pera_fast.train.schedules import make_schedules

SMALL = [
    "model.patch_size=8", "model.embed_dim=16", "model.depth=2", "model.num_heads=2", "model.head_hidden=16",
    "model.bottleneck=8", "model.prototypes=24", "views.num_local=2", "views.global_size=32", "views.local_size=24",
    "train.batch_size=4", "train.steps=6", "train.checkpoint_every=2", "optim.lr=0.01",
]  # fmt: skip
EXACT = ["model.drop_path=0", "loss.koleo_weight=0"]  # what is drawn or compared per rank is off


def small_config(*overrides: str) -> Config:
    return load_config("tiny", [*SMALL, *overrides])


class RandomCrops:
    """A loader over `images` that exist only as random numbers, in the order that the real one takes them."""

    wait_seconds = 0.001

    def __init__(self, cfg: Config, images: int, rank: int = 0, world_size: int = 1, start_step: int = 0):
        plan = cfg.train.resolve_batch(world_size)
        self.cfg, self.rank = cfg, rank
        self.order = SampleOrder(
            images, seed=cfg.train.seed, batch_size=plan.per_device, accumulate=plan.accumulate, rank=rank,
            world_size=world_size,
        )  # fmt: skip
        self.steps_per_epoch = self.order.steps_per_epoch
        self.micro_step = start_step * plan.accumulate

    def __iter__(self) -> "RandomCrops":
        return self

    def __next__(self) -> Any:
        epoch, samples = self.order(self.micro_step)
        v = self.cfg.views
        batch = Batch(
            self.micro_step, epoch, samples,
            crops(samples, v.num_global, v.global_size), crops(samples, v.num_local, v.local_size),
        )  # fmt: skip
        self.micro_step += 1
        return make_inputs(batch, self.cfg, self.rank)


def crops(samples: np.ndarray, count: int, size: int) -> CropGroup:
    each = [np.random.default_rng(int(s)).integers(0, 256, (count, size, size, 3), dtype=np.uint8) for s in samples]
    pixels = torch.from_numpy(np.stack(each, 1).reshape(-1, size, size, 3))
    n = len(pixels)
    nothing = ColorParams(torch.full((n, 4), -1, dtype=torch.int32), torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(n, 1))
    return CropGroup(pixels, nothing, nothing)


def no_export(model: Any, path: Path) -> None:
    Path(path).write_bytes(b"teacher")


def make_run(
    cfg: Config,
    out: Path,
    *,
    here: World | None = None,
    images: int = 12,
    state: dict[str, Any] | None = None,
    export: Callable[[Any, Any], Any] = no_export,
) -> Run:
    """A Run on random crops, continued from a checkpoint's contents if there are any."""
    here = here or World(0, 1, torch.device("cpu"))
    torch.manual_seed(cfg.train.seed)
    pera = PerA(cfg)
    batches = RandomCrops(cfg, images, here.rank, here.size, state["step"] if state else 0)
    folder = RunFolder(out)
    folder.make()
    model = here.wrap(pera, unused=False)
    make_copies(pera)
    optimizer, scaler = make_optimizer(pera.parameters(), cfg), make_scaler(cfg, here.device)
    run = Run(
        cfg=cfg, folder=folder, world=here, plan=cfg.train.resolve_batch(here.size),
        schedules=make_schedules(cfg, batches.steps_per_epoch), pera=pera, model=model, optimizer=optimizer,
        scaler=scaler, batches=batches, images=images, data="random", export=export,
        update=make_update(pera, optimizer, scaler),
    )  # fmt: skip
    if state:
        run.load(state, "test")
    return run


def environment(**changes: str) -> dict[str, str]:
    """For processes that import the package, and this module, from the working tree."""
    here = Path(__file__).parent
    path = [str(here), str(here.parent.parent), str(here.parent.parent / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", **changes}


def state(step: int, **changes: Any) -> dict[str, Any]:
    """What a checkpoint holds, in small."""
    return {
        "format": FORMAT, "step": step, "recipe": "tiny", "config": "recipe: tiny\n", "total_batch": 4, "images": 9,
        "data": "digest", "nonfinite": {"total": 0, "row": 0}, "model": {"weight": torch.arange(5000.0) + step},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}, "scaler": {}, **changes,
    }  # fmt: skip


def flip_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
