"""Starts one command line again and again, kills it each time, and lets it end at last; driven by test_killed.py.

Every start is a fork of this process, which has imported what takes long, so that many kills take seconds.
"""

import importlib
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from pera_fast import cli
from pera_fast.train import loop

# What a run imports on its way, so that the forks need not; a run in this process would leave threads.
for module in ("torch._dynamo", "torch.utils.tensorboard", "omegaconf", "nvidia.dali.fn", "rasterio", "rich.progress"):
    importlib.import_module(module)
importlib.import_module("pera_fast.train.api")


def start(line: list[str], log: Path, prepare: Any, seconds: float | None) -> int:
    """Run a command line in a fork; returns its exit status, or minus the number of the signal that ended it.

    Args:
        line: the arguments.
        log: file for what it says.
        prepare: called in the fork; arranges for its end.
        seconds: after which it is killed; None: never.
    """
    here, there = os.pipe()  # the fork holds one end, as long as it lives
    child = os.fork()
    if child == 0:
        os.close(here)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        prepare()
        os._exit(cli.run(line))
    os.close(there)
    select.select([here], [], [], seconds)
    if seconds is not None:
        os.kill(child, signal.SIGKILL)
    os.close(here)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def nothing() -> None:
    pass


def file_limit(size: int) -> Any:
    """The kernel ends the process within the write that makes a file larger than so many bytes."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return prepare


def torn_line(number: int, share: float) -> Any:
    """Killed when a part of the so-manieth metrics line of this process is in the file."""

    def prepare() -> None:
        write, left = loop.MetricsWriter.write, [number]

        def tear(self: Any, metrics: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                text = json.dumps(metrics) + "\n"
                self._file.write(text[: int(len(text) * share)])
                self._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            write(self, metrics)

        loop.MetricsWriter.write = tear

    return prepare


def rename(number: int) -> Any:
    """Killed before the so-manieth file that is complete gets its name."""

    def prepare() -> None:
        left = [number]

        def hook(event: str, _: Any) -> None:
            if event == "os.rename":
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return prepare


def sizes(folder: Path, pattern: str) -> int:
    """Size of the largest file of a name."""
    return max((path.stat().st_size for path in folder.rglob(pattern)), default=1)


def main(images: str, root: Path, kills: int, seed: int, settings: list[str]) -> None:
    draw, cache = random.Random(seed), Path(os.environ["XDG_CACHE_HOME"])

    def line(out: str) -> list[str]:
        return [
            "pretrain",
            "--data",
            images,
            "--out",
            str(root / out),
            "--recipe",
            "tiny",
            "--resume",
            "auto",
            *settings,
        ]

    assert start(["data", "index", images], root / "whole.log", nothing, None) == 0
    began = time.time()
    assert start(line("whole"), root / "whole.log", nothing, None) == 0
    first_step = (root / "whole" / "config.yaml").stat().st_mtime - began  # seconds; it is written then
    window = first_step + (time.time() - began - first_step) * 2 / kills
    checkpoint, index = sizes(root / "whole", "*.pt"), sizes(root / "whole", "index.parquet")

    kinds = ("index", "moment", "metrics", "checkpoint", "rename", "moment")
    told = []
    for number in range(kills):
        kind, seconds, prepare = kinds[number % len(kinds)], None, nothing
        if kind == "moment":
            seconds = draw.uniform(0, window)
        elif kind == "metrics":
            prepare = torn_line(draw.randrange(6), draw.random())
        elif kind == "rename":
            prepare = rename(draw.randrange(12))
        elif kind == "checkpoint":
            prepare = file_limit(draw.randrange(checkpoint // 2, checkpoint))
        else:
            shutil.rmtree(cache, ignore_errors=True)  # the index is made anew
            prepare = file_limit(draw.randrange(1, index))
        status = start(line("killed"), root / "killed.log", prepare, seconds)
        there = sorted(path.name for path in (root / "killed").rglob("*") if path.suffix in (".pt", ".partial"))
        told.append({"kind": kind, "seconds": seconds, "status": status, "files": there})
    status = start(line("killed"), root / "killed.log", nothing, None)
    (root / "told.json").write_text(json.dumps({"kills": told, "status": status}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
