"""`pera-fast bench`: runs the suites in a process of their own, shows the table, writes JSON and a plot."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from json import loads
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pera_bench import CORES
from pera_bench.record import Record, compare
from pera_bench.show import make_console, show, show_changes
from pera_fast.errors import UserError

SWEEP = {"recipes": "vit_s16,vit_b16,vit_g16", "cpu": "1,4,16", "cuda": "4,16,64"}
IMAGES = {"cpu": "4", "cuda": "16"}
SECONDS = 0.5
PASSES = {"cpu": 3, "cuda": 1}  # a CPU's clock and its neighbours change within minutes
PRECISIONS = ("bf16", "fp16", "fp32")
PRECISION = {"cpu": "fp32", "cuda": "bf16"}  # plain CPUs have no fast bfloat16


@dataclass
class Wish:
    """Options of a benchmark run. Fields that are None follow from the device.

    Attributes:
        benches: suites, or suite/case; none: all of them.
        device: cpu or cuda.
        recipes, images: separated by commas.
        sweep: three recipes at three batch sizes.
        only: implementations, separated by commas, or "all"; None: the definition and what would run.
        threads: of the CPU; None: one for each core.
        seconds: for the timed calls of one bench; None: SECONDS.
        passes: over all benches; None: PASSES.
        processor_time: measured instead of the clock's, on a CPU.
    """

    benches: Sequence[str] = ()
    device: str | None = None
    recipes: str | None = None
    images: str | None = None
    precision: str | None = None
    sweep: bool = False
    only: str | None = None
    threads: int | None = None
    seconds: float | None = None
    passes: int | None = None
    processor_time: bool = False
    remeasure: bool = False


def run(wish: Wish, *, json: Path | None, old: Path | None, out: Path | None, console: Console | None = None) -> int:
    """Measures, prints, writes. Returns 0, or 1 if a bench failed. Raises UserError."""
    before = Record.load(old) if old else None
    console = console or make_console()
    record = measure(wish, console)
    show(record, console)
    if before is not None:
        show_changes(compare(record, before), record, before, console)
    for path in filter(None, (json, out and out / "bench.json")):
        record.save(path)
        console.print(f"JSON: {path}")
    if out is not None and importlib.util.find_spec("matplotlib") is None:
        console.print("no plot: matplotlib is not installed")
    elif out is not None:
        from pera_bench.plot import plot

        for path in plot(record, out):
            console.print(f"plot: {path}")
    return 1 if record.failed else 0


def measure(wish: Wish, console: Console) -> Record:
    """Runs the suites. What was measured before an interrupt or a crash is kept."""
    check(wish)
    wish = replace(wish, device=device_of(wish))
    with tempfile.TemporaryDirectory(prefix="pera-bench-") as folder:
        rows, log = Path(folder) / "rows.jsonl", Path(folder) / "log.txt"
        with log.open("w") as output:
            process = subprocess.Popen(
                command(wish, rows), env=environment(wish), stdout=output, stderr=subprocess.STDOUT
            )
            try:
                with suppress(KeyboardInterrupt), _terminable():
                    _follow(process, rows, console)
            finally:  # also after Ctrl-C or SIGTERM: what is measured is in the file
                process.terminate()
                process.wait()
        record = Record.from_lines(rows.read_text(encoding="utf-8")) if rows.exists() else None
        if record is None:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise RuntimeError(f"the benches did not start: {' / '.join(lines[-5:])}")
        if process.returncode not in (0, 1):
            record.failed.append({"bench": "the run", "reason": f"ended with status {process.returncode}"})
    return record


def check(wish: Wish) -> None:
    """Raises UserError for what does not exist."""
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise UserError("pera-fast bench needs pytest-benchmark: pip install 'pera-fast[bench]'")
    from pera_bench.selection import check_implementations, select
    from pera_fast.config import load_config
    from pera_fast.config.keys import did_you_mean

    for recipe in (wish.recipes or "vit_b16").split(","):
        load_config(recipe)
    if wish.precision not in (None, *PRECISIONS):
        hint = did_you_mean(wish.precision, PRECISIONS)
        raise UserError(f"--precision {wish.precision}: wants bf16, fp16 or fp32{hint}")
    if wish.images and not all(part.isdigit() and int(part) for part in wish.images.split(",")):
        raise UserError(f"--images {wish.images}: wants whole numbers from 1 on, separated by commas")
    suites = dict.fromkeys(suite for suite, _ in select(",".join(wish.benches)))
    if wish.only not in (None, "", "all"):
        check_implementations(wish.only, suites, device_of(wish))


def device_of(wish: Wish) -> str:
    """cpu or cuda. Raises UserError."""
    import torch

    if wish.device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {wish.device}: wants cpu or cuda")
    if wish.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU (nvidia-smi says whether the driver does); give --device cpu")
    return wish.device or ("cuda" if torch.cuda.is_available() else "cpu")


def command(wish: Wish, rows: Path) -> list[str]:
    """The runner's command line."""
    device = wish.device or "cpu"
    here = Path(__file__).resolve().parent
    options = {
        "--suites": ",".join(wish.benches),
        "--recipes": wish.recipes or (SWEEP["recipes"] if wish.sweep else "vit_b16"),
        "--images": wish.images or (SWEEP if wish.sweep else IMAGES)[device],
        "--precision": wish.precision or PRECISION[device],
        "--device": device,
        "--threads": str(wish.threads or len(CORES)),
        "--only": wish.only or "",
        "--seconds": str(SECONDS if wish.seconds is None else wish.seconds),
        "--passes": str(wish.passes or PASSES[device]),
        "--rows": str(rows),
    }
    flags = {"--remeasure": wish.remeasure, "--processor-time": wish.processor_time}
    pytest = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, f"--rootdir={here}"]
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
    return [
        *pytest,
        *plugins,
        str(here / "test_suites.py"),
        *(f"{k}={v}" for k, v in options.items()),
        *(k for k, v in flags.items() if v),
    ]


def environment(wish: Wish) -> dict[str, str]:
    """The threads are pinned, one to a core; pytest takes no options from outside."""
    threads = {"OMP_NUM_THREADS": str(wish.threads or len(CORES)), "OMP_PROC_BIND": "true", "OMP_PLACES": "threads"}
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return {**inherited, **threads, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _follow(process: subprocess.Popen[bytes], rows: Path, console: Console) -> None:
    """Shows how far it is, on a terminal, until it ends."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("ceilings", total=None)
        while process.poll() is None:
            lines = rows.read_text(encoding="utf-8").splitlines() if rows.exists() else []
            if len(lines) > 2:  # before them: the machine, the number of benches
                entry = loads(lines[-2])
                name = "{suite}/{case}".format(**entry["row"]) if "row" in entry else None
                total = loads(lines[1])["benches"]
                progress.update(task, description=name, completed=len(lines) - 2, total=total)
            time.sleep(0.2)
