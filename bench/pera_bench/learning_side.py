"""Trains one side of bench/learning.py with one seed, in a process of its own: `python -m pera_bench.learning_side`.

Leaves a run folder with metrics.jsonl, checkpoints, the code's commit, and times.json: when each checkpoint was there,
by the wall clock and by the processor time of the whole process, its threads included, from the end of the first step.
"""

import argparse
import json
import threading
import time
from pathlib import Path

import torch

from pera_fast import __version__
from pera_fast.config import load_config
from pera_fast.errors import UserError
from pera_fast.profile.machine import commit

SECONDS = 0.1  # between looks at the run's folder
PUBLISHED, OURS = "published", "ours"
COMMIT = "commit.txt"  # in a run's folder: the code that trained it


class Watch(threading.Thread):
    """Notes the times of a run's first step and of each checkpoint, from outside, alike for every implementation.

    Args:
        run: folder of the run, perhaps not there yet.
    """

    def __init__(self, run: Path):
        super().__init__(daemon=True)
        self.run_folder = run
        self.first: tuple[float, float] | None = None
        self.points: dict[int, tuple[float, float]] = {}
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(SECONDS):
            self.look()

    def look(self) -> None:
        """Note what is new in the folder."""
        now = time.perf_counter(), time.process_time()
        metrics = self.run_folder / "metrics.jsonl"
        if self.first is None:
            if not metrics.exists() or not metrics.stat().st_size:
                return
            self.first = now
        for path in checkpoints(self.run_folder):
            self.points.setdefault(step_of(path), now)

    def close(self) -> None:
        """Stop, and write times.json."""
        self._over.set()
        self.join()
        self.look()
        if self.first is None:
            raise UserError(f"{self.run_folder}: the run has taken no step; are there fewer images than a batch?")
        wall, processor = self.first
        times = [
            {"step": step, "wall_s": at - wall, "processor_s": used - processor}
            for step, (at, used) in sorted(self.points.items())
        ]
        partial = self.run_folder / "times.partial"
        partial.write_text(json.dumps(times, indent=1), encoding="utf-8")
        partial.rename(self.run_folder / "times.json")


def checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run of either implementation, in order."""
    return sorted(path for path in (run / "checkpoints").glob("step_*") if path.suffix in (".pt", ".params"))


def step_of(path: Path) -> int:
    """Optimiser steps before a checkpoint."""
    return int(path.stem.removeprefix("step_"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=(PUBLISHED, OURS), required=True)
    parser.add_argument("--official", type=Path, help="checkout of the authors' repository")
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--run", type=Path, required=True, help="folder to write to")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--save-every", type=int, required=True, help="steps between checkpoints")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="threads of a side; none: as many as it takes by itself")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.run.mkdir(parents=True, exist_ok=True)
    (args.run / COMMIT).write_text(commit() or f"version {__version__}", encoding="utf-8")
    watch = Watch(args.run)
    watch.start()
    settings = [*args.set, f"train.device={args.device}"]
    if args.side == PUBLISHED:
        from pera_bench.published_training import train_published

        workers = 16 if args.threads is None else args.threads - 1  # 16: their default
        cfg, device = load_config(args.recipe, settings), torch.device(args.device)
        train_published(args.official, cfg, args.images, args.run, args.save_every, device, workers)
    else:
        from pera_fast.train.api import pretrain

        settings += [f"train.checkpoint_every={args.save_every}", "train.keep_checkpoints=100000"]
        settings += [f"data.loader_threads={args.threads}"] if args.threads else []
        pretrain(args.images, args.run, args.recipe, overrides=settings)
    watch.close()


if __name__ == "__main__":
    main()
