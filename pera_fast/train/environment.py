"""Checks the machine before a run creates anything: launcher, compilers, folders, free space; a line for each fault."""

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pera_fast.config import Config
from pera_fast.data.files.manifest import not_writable
from pera_fast.data.index.build import default_index_path
from pera_fast.errors import UserError
from pera_fast.train.checkpoint import find_checkpoints
from pera_fast.train.checkpoint_size import SavedBytes, saved_bytes
from pera_fast.train.distributed import choose_device
from pera_fast.train.loggers import check_loggers
from pera_fast.train.run_folder import RunFolder, Start
from pera_kernels import backend

GROUP = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells each process
# Variables by which other launchers say how many processes they started, and the one that numbers a process.
LAUNCHERS = {
    "srun": (("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_PROCID"),
    "mpirun": (("OMPI_COMM_WORLD_SIZE",), "OMPI_COMM_WORLD_RANK"),
    "mpiexec": (("PMI_SIZE",), "PMI_RANK"),
}
COMPILER_SECONDS = 60


def check_launcher(environ: Mapping[str, str] = os.environ) -> None:
    """Refuse processes that cannot find each other.

    Raises:
        UserError: some of torchrun's variables are missing or are no numbers; or another launcher started several
            processes, each of which would train by itself in the same folder.
    """
    if dist.is_available() and dist.is_initialized():
        return  # the caller's own program has joined them
    given = [name for name in GROUP[:2] if name in environ]
    if given:
        _check_group(given, environ)
        return
    for launcher, (sizes, number) in LAUNCHERS.items():
        tasks = next((environ[size] for size in sizes if size in environ), "1")
        if number not in environ or not tasks.isdigit() or int(tasks) < 2 or _is_batch_script(environ):
            continue
        raise UserError(
            f"{launcher} started {tasks} processes, which do not know of each other ({number}={environ[number]}, no"
            f" RANK): start one process a machine, `{launcher} ... torchrun --nproc-per-node GPUS -m pera_fast"
            " pretrain ...`"
        )


def _is_batch_script(environ: Mapping[str, str]) -> bool:
    """Whether this is the script of sbatch itself, which has the job's variables but is one process."""
    return environ.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environ


def _check_group(given: list[str], environ: Mapping[str, str]) -> None:
    missing = [name for name in GROUP if not environ.get(name)]
    if missing:
        raise UserError(
            f"{_and(given)} set, but not {_and(missing, verb=False)}: start several processes with torchrun, which sets"
            f" all four; for one process `unset {' '.join(given)}`"
        )
    rank, size, port = (environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if not (rank.isdigit() and size.isdigit() and int(rank) < int(size) and port.isdigit()):
        raise UserError(
            f"RANK={rank} WORLD_SIZE={size} MASTER_PORT={port}: wants 0 <= RANK < WORLD_SIZE and a port, as torchrun"
            " sets them"
        )


def _and(names: list[str], verb: bool = True) -> str:
    text = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return text if not verb else f"{text} {'are' if len(names) > 1 else 'is'}"


def check_environment(start: Start, folder: RunFolder, data: Path | None, size: SavedBytes | None = None) -> None:
    """Check what the run will need of this machine. Creates nothing that stays.

    Args:
        start: of the run.
        folder: of the run.
        data: folder whose index the run will write, if there is none; None: it writes none.
        size: of its files; None: those of a pretraining.

    Raises:
        UserError: the first thing that is missing.
    """
    cfg = start.cfg
    device = choose_device(cfg.train.device, int(os.environ.get("LOCAL_RANK", "0")))
    _check_compilers(cfg, device)
    if os.environ.get("RANK", "0") != "0":
        return  # rank 0 alone writes
    check_loggers(cfg.train.loggers)
    if reason := _not_writable(folder.root):
        raise UserError(f"--out {folder.root}: cannot write there ({reason.strerror}); give another folder")
    if data is not None and not (start.resumed and folder.index.exists()):
        index = Path(cfg.data.index or default_index_path(data))
        if reason := _not_writable(index.parent):
            raise UserError(not_writable(index, reason))
    _check_room(start, folder, size)


def _check_compilers(cfg: Config, device: torch.device) -> None:
    """Compile something small with each compiler that the run will call."""
    if cfg.train.compile and device.type == "cpu" and (reason := _no_cxx()):
        raise UserError(f"train.compile=true: {reason}; install g++ (or set CXX), or leave it out")
    try:
        wanted = backend.wanted("adamw_ema")
    except ValueError as error:  # PERA_BACKEND
        raise UserError(str(error)) from None
    if device.type == "cuda" and (cfg.train.compile or wanted != "reference") and (reason := _no_triton()):
        raise UserError(
            f"Triton cannot build what starts its kernels ({reason}); install gcc and Python's headers (python3-dev),"
            " or set CC; PERA_BACKEND=reference trains without, but slowly"
        )


def _no_cxx() -> str | None:
    """Why the C++ compiler that PyTorch's compiler calls does not work; None if it does."""
    cxx = os.environ.get("CXX", "g++")
    program = (
        b"#include <vector>\n#include <omp.h>\nint f() { return std::vector<int>(3).size() + omp_get_max_threads(); }"
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            out = os.path.join(folder, "f.so")
            command = [cxx, "-x", "c++", "-", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-o", out]
            subprocess.run(command, input=program, capture_output=True, check=True, timeout=COMPILER_SECONDS)
    except subprocess.CalledProcessError as error:
        return f"needs a C++ compiler, and {cxx} fails: {_first_line(error.stderr.decode(errors='replace'))}"
    except (OSError, subprocess.SubprocessError) as error:
        if isinstance(error, FileNotFoundError) and error.filename:  # else there is no temporary folder
            return f"needs a C++ compiler, and there is no {cxx}"
        return f"needs a C++ compiler, and {cxx} fails: {_first_line(str(error))}"
    return None


def _no_triton() -> str | None:
    """Why Triton cannot start kernels on this machine's GPUs; None if it can, or is not there at all."""
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    try:
        from triton.runtime import driver

        active: Any = driver.active
        _ = active.utils  # made at the first use: compiles Triton's C module, or takes it from its cache
    except Exception as error:  # RuntimeError without a compiler, CalledProcessError of a compiler that fails, ...
        return _first_line(str(error)) or type(error).__name__
    return None


def _first_line(text: str) -> str:
    return next((" ".join(line.split())[:200].rstrip(".") for line in text.splitlines() if line.strip()), "")


def _there(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))


def _not_writable(path: Path) -> OSError | None:
    """Why nothing can be written in a folder, or in the one in which it would be made; None if it can."""
    try:
        with tempfile.NamedTemporaryFile(dir=_there(path), prefix=".writable-"):
            return None
    except OSError as error:
        return error


def _check_room(start: Start, folder: RunFolder, size: SavedBytes | None = None) -> None:
    """Two checkpoints must fit: the last whole one, and the one that is being written.

    Raises:
        UserError: with the numbers.
    """
    if start.cfg.train.steps is not None and start.step >= start.cfg.train.steps:
        return  # nothing is left to write
    size, there = size or saved_bytes(start.cfg), find_checkpoints(folder.checkpoints)
    try:
        usage = shutil.disk_usage(_there(folder.root))
        free = usage.free + sum(path.stat().st_size for path in there[:-1])  # which make room for new ones
    except OSError:
        return  # a disk that does not say
    wanted = 1 if there else 2
    if usage.total and free < wanted * (size.checkpoint + size.export):
        raise UserError(_no_room(folder, size, wanted, free))


def _no_room(folder: RunFolder, size: SavedBytes, wanted: int, free: int) -> str:
    parts = f"model {_mib(size.model)}, optimizer {_mib(size.optimizer)}"
    parts += f", teacher {_mib(size.teacher)}" if size.teacher else ""
    what = "another checkpoint" if wanted == 1 else "two checkpoints"
    exported = "teacher" if size.teacher else "model"
    return (
        f"--out {folder.root}: {_mib(free)} are free, {what} with the exported {exported} take"
        f" {wanted} x {_mib(size.checkpoint + size.export)} ({parts}, exported {_mib(size.export)}); make room or give"
        " another folder"
    )


def _mib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
