"""Compares what the published implementation and ours learn: the same images, sizes, schedule and number of seeds.

    python bench/learning.py --official CHECKOUT --data scenes.csv --out W --json RECORD
    python bench/learning.py --official CHECKOUT --data scenes.csv --out W --json RECORD --recipe vit_s16 \\
        --device cuda --minutes 4 --set views.global_size=224 --set train.batch_size=64

Both pretrain on the train split, each in processes of its own on as many threads; then the same probes look at the
frozen teacher of every checkpoint: kNN and logistic regression, learned on the train split, tested on the test split.
With --epochs all sides see as many images, and `longer` is ours for as many minutes as the published code takes; with
--minutes each side has as many. Time is the process's processor time on a CPU, which other work on the machine does not
touch, and the wall clock on a GPU; both count from the end of the first step. Called again, it goes on where it was.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pera_bench.learning_probes import Probes
from pera_bench.learning_side import COMMIT, OURS, PUBLISHED, checkpoints, step_of
from pera_bench.machine import describe
from pera_fast.config import Config, load_config
from pera_fast.errors import UserError
from pera_fast.features.samples import Samples, read_samples

ROOT = Path(__file__).resolve().parents[1]
POINTS = 5  # checkpoints of a run
TRIAL = 100, 200  # steps between which a side's speed is measured, for --minutes
LONGER, PIXELS, DENSE = "longer", "pixels", "dense"
SETTINGS = {
    PUBLISHED: (),
    OURS: (),
    LONGER: (),
    # The other losses stay, with less than a thousandth of the gradient: there is no key that turns them off.
    PIXELS: ("loss.koleo_weight=0", "loss.pixel_weight=100"),
    DENSE: ("model.masking=none",),
}


@dataclass(frozen=True)
class Comparison:
    """Runs of several sides and seeds, and where they lie."""

    args: argparse.Namespace
    samples: Samples
    cfg: Config

    @property
    def clock(self) -> str:
        """The time that counts: processor or wall."""
        return "wall" if self.args.device == "cuda" else "processor"

    @property
    def images(self) -> Path:
        """Folder of the images to pretrain on."""
        return self.args.out / "images"

    @property
    def batch(self) -> int:
        """Images of a step."""
        return self.cfg.train.resolve_batch(1).total

    def copy_images(self) -> None:
        """Copy the images of the train split into one folder: both implementations read folders."""
        files = [paths[0] for paths in self.samples.need("train").images]
        if self.images.is_dir() and len(list(self.images.iterdir())) == len(files):
            return
        shutil.rmtree(self.images, ignore_errors=True)
        self.images.mkdir(parents=True)
        for number, file in enumerate(files):
            shutil.copyfile(file, self.images / f"{number:06d}{file.suffix.lower()}")

    def run_folder(self, side: str, seed: int) -> Path:
        return self.args.out / "runs" / f"{side}-{seed}"

    def train(self, side: str, seed: int, steps: int, save_every: int, run: Path) -> list[dict[str, Any]]:
        """Times of the checkpoints of a run, which is made unless it is there."""
        if not (run / "times.json").exists():
            print(f"{run}: {steps} steps", flush=True)
            shutil.rmtree(run, ignore_errors=True)
            run.mkdir(parents=True)
            given = [*self.args.set, *SETTINGS[side], f"train.steps={steps}", f"train.seed={seed}"]
            what = PUBLISHED if side == PUBLISHED else OURS
            command = [sys.executable, "-m", "pera_bench.learning_side", "--side", what]
            command += ["--images", str(self.images), "--run", str(run), "--recipe", self.args.recipe]
            command += ["--save-every", str(save_every), "--device", self.args.device]
            command += [word for text in given for word in ("--set", text)]
            command += ["--official", str(self.args.official)] if side == PUBLISHED else []
            command += ["--threads", str(self.args.threads)] if self.args.threads else []
            with (self.args.out / f"{run.name}.log").open("w") as log:
                done = subprocess.run(command, env=self._environment(), stdout=log, stderr=log, check=False)
            if done.returncode:
                raise UserError(f"{run}: ended with {done.returncode}; see {log.name}")
        return json.loads((run / "times.json").read_text())

    def _environment(self) -> dict[str, str]:
        paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]
        threads = {"OMP_NUM_THREADS": str(self.args.threads)} if self.args.threads else {}
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **threads}

    def seconds(self, side: str, seed: int) -> float:
        """Time of a finished run by the clock that counts."""
        times = json.loads((self.run_folder(side, seed) / "times.json").read_text())
        return times[-1][f"{self.clock}_s"]

    def steps(self, side: str) -> int:
        """Steps of a side's runs. That of `longer` follows from finished runs of the published code and ours."""
        epochs = self.args.epochs * (len(self.samples.part("train")) // self.batch)
        if self.args.minutes:
            first, last = self.train(side, 0, TRIAL[1], TRIAL[0], self.args.out / "trials" / side)
            seconds = last[f"{self.clock}_s"] - first[f"{self.clock}_s"]
            return round(60 * self.args.minutes * (TRIAL[1] - TRIAL[0]) / seconds)
        if side == LONGER:
            both = [statistics.median(self.seconds(name, seed) for seed in self.seeds) for name in (PUBLISHED, OURS)]
            return round(epochs * both[0] / both[1])
        return epochs

    @property
    def seeds(self) -> range:
        return range(self.args.seeds)

    def runs(self) -> Iterator[tuple[str, int]]:
        """Sides and seeds; the sides take turns to be first, so that what else the machine does hurts all alike."""
        sides = [side for side in self.args.sides if side != LONGER]
        for seed in self.seeds:
            turn = seed % len(sides)
            yield from ((side, seed) for side in sides[turn:] + sides[:turn])
        yield from ((LONGER, seed) for seed in self.seeds if LONGER in self.args.sides)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Train what is not trained yet, probe it, and return the record."""
    settings = [*args.set, f"train.device={args.device}"]
    what = Comparison(args, read_samples("scene", args.data, args.root), load_config(args.recipe, settings))
    what.copy_images()
    _train(what, [run for run in what.runs() if run[0] != LONGER])
    _train(what, [run for run in what.runs() if run[0] == LONGER])
    probes = Probes(what.samples, what.cfg, args.device, args.out / "probes.json")
    record = _head(what)
    for side, seed in [*what.runs(), *(("random", seed) for seed in what.seeds)]:
        record["runs"].append({"side": side, "seed": seed, **_probed(what, probes, side, seed)})
    return record


def _train(what: Comparison, runs: list[tuple[str, int]]) -> None:
    """Make the runs that are not there yet, some at a time."""
    steps = {side: what.steps(side) for side, _ in runs}

    def make(run: tuple[str, int]) -> None:
        side, seed = run
        what.train(side, seed, steps[side], -(-steps[side] // POINTS), what.run_folder(side, seed))

    with ThreadPoolExecutor(what.args.jobs) as workers:
        for future in [workers.submit(make, run) for run in runs]:
            future.result()


def _head(what: Comparison) -> dict[str, Any]:
    args = what.args
    command = ["git", "-C", str(args.official), "rev-parse", "HEAD"]
    theirs = subprocess.run(command, capture_output=True, text=True, check=False) if args.official else None
    machine = describe(torch.device(args.device), processor=what.clock == "processor")
    machine["torchvision"] = _torchvision()
    return {
        "machine": {**machine, "threads": args.threads or machine["threads"]},
        "published": theirs.stdout.strip() if theirs else None,
        "recipe": args.recipe,
        "settings": args.set,
        "sides": {side: list(SETTINGS[side]) for side in args.sides},
        "epochs": None if args.minutes else args.epochs,
        "minutes": args.minutes,
        "clock": what.clock,
        "batch": what.batch,
        "images": {split: len(what.samples.part(split)) for split in ("train", "test")},
        "classes": len(what.samples.classes),
        "data": args.name or Path(args.data).stem,
        "runs": [],
    }


def _torchvision() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("torchvision")
    except PackageNotFoundError:
        return None


def _probed(what: Comparison, probes: Probes, side: str, seed: int) -> dict[str, Any]:
    if side == "random":
        return {"points": [{"step": 0, "images": 0, "wall_s": 0.0, "processor_s": 0.0, **probes.random(seed)}]}
    run = what.run_folder(side, seed)
    times = {row["step"]: row for row in json.loads((run / "times.json").read_text())}
    points, paths = [], checkpoints(run)
    for path in paths:
        step = step_of(path)
        found = probes.checkpoint(path, last=path == paths[-1])
        points.append({**times[step], "images": step * what.batch, **found})
    code = (run / COMMIT).read_text(encoding="utf-8")
    return {"commit": code, "points": points, "losses": _losses(run / "metrics.jsonl")}


def _losses(path: Path) -> dict[str, float]:
    """Means over the last tenth of the steps."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = rows[-max(1, len(rows) // 10) :]
    keys = "loss", "global_cls_loss", "local_cls_loss", "koleo_loss", "pixel_loss", "grad_norm"
    return {key: statistics.fmean(row[key] for row in rows) for key in keys}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, help="checkout of the authors' repository, for the side `published`")
    parser.add_argument("--data", required=True, help="scenes: CSV of file,class,split, or folder, with train and test")
    parser.add_argument("--root", help="folder of the CSV's paths")
    parser.add_argument("--name", help="name of the data in the record")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs; kept, to go on")
    parser.add_argument("--json", type=Path, help="file for the record")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of all sides")
    parser.add_argument("--sides", default=f"{PUBLISHED},{OURS},{LONGER},{PIXELS}", help=", ".join(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--epochs", type=int, default=5, help="passes over the images, alike for all sides")
    parser.add_argument("--minutes", type=float, help="minutes of each run, instead of --epochs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads of a side; 1 on a CPU, by default")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; 2: sides have the same neighbours")
    args = parser.parse_args(argv)
    args.sides = args.sides.split(",")
    for side in args.sides:
        if side not in SETTINGS:
            parser.error(f"--sides {side}: no such side; known: {', '.join(SETTINGS)}")
    if args.minutes:
        args.sides = [side for side in args.sides if side != LONGER]  # each side has its minutes
    elif LONGER in args.sides and not {PUBLISHED, OURS} <= set(args.sides):
        parser.error(f"--sides {LONGER}: wants {PUBLISHED} and {OURS} beside it")
    if PUBLISHED in args.sides and not (args.official and (args.official / "Networks" / "PerA").is_dir()):
        parser.error("--official: wants a checkout of github.com/SathShen/PerA; or leave published out of --sides")
    if args.device == "cpu":
        args.threads = args.threads or 1
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        record = compare(args)
    except UserError as error:
        raise SystemExit(str(error)) from None
    text = json.dumps(record, indent=1) + "\n"
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
