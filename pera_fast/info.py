"""`pera-fast info`: the machine, the versions, and which implementation of each op would run on it."""

import importlib
import importlib.metadata
import os
import pkgutil
import platform
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pera_fast import __version__
from pera_fast.cores import usable_cores

# Part -> (distributions that carry it, why one would want it, how to get it). torch and what is always installed with
# pera-fast are listed by version only.
_OPTIONAL: dict[str, tuple[tuple[str, ...], str, str]] = {
    "DALI": (
        ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        "reads, decodes and crops the images for pretraining",
        "pip install 'pera-fast[cuda13]' (or [cuda12]); it needs no GPU",
    ),
    "triton": (("triton",), "compiles the GPU kernels", "pip install triton"),
    "xformers": (
        ("xformers",),
        "attention over packed sequences on a GPU",
        "pip install 'pera-fast[cuda13]' (or [cuda12])",
    ),
    "timm": (("timm",), "loads the exported teacher by name", "pip install timm"),
}
_REQUIRED = ("torch", "numpy", "pyarrow", "pillow", "rasterio", "safetensors")
# Processor features that decide how fast training is, as the kernel names them (x86-64, then arm64).
_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve", "sve2", "i8mm")


@dataclass(frozen=True)
class Op:
    """One op: what runs, and why each faster implementation does not."""

    name: str
    runs: str
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Info:
    """Results of `collect`; every text is for people to read."""

    device: str  # that train.device=auto trains on
    devices: list[str]  # names of the GPUs; empty without one
    cpu: str  # model, cores, memory, features
    versions: dict[str, str | None]  # None: not installed
    ops: list[Op]
    missing: dict[str, str]  # part -> why it matters and how to get it
    choices: dict[str, str] = field(default_factory=dict)  # what settings that are "auto" come to


def collect() -> Info:
    """Looks at this machine. Imports torch and every op; a part that is missing or broken is reported, not raised."""
    import torch

    from pera_fast.train.distributed import choose_device

    device = choose_device("auto").type
    versions: dict[str, str | None] = {"python": platform.python_version(), "pera-fast": __version__}
    versions.update({name: _version((name,)) for name in _REQUIRED})
    versions["torch"] = torch.__version__  # with the local part, such as +cpu, which metadata may lack
    versions.update({part: _version(names) for part, (names, _, _) in _OPTIONAL.items()})
    missing = {
        part: f"{why}; {how}" for part, (_, why, how) in _OPTIONAL.items() if versions[part] is None and _wanted(part)
    }
    ops = _ops(device, missing)
    if device == "cpu":
        missing["GPU"] = _no_gpu(torch.version.cuda, torch.version.hip)
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    devices = [f"{g.name}, sm_{g.major}{g.minor}, {g.total_memory / 2**30:.0f} GiB" for g in gpus]
    cpu = _cpu(torch.backends.cpu.get_cpu_capability())
    return Info(device, devices, cpu, versions, ops, missing, _choices(device))


def show(info: Info, console: Console | None = None) -> None:
    """Prints what `collect` found."""
    console = console or Console()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("device", info.device + (f" ({'; '.join(info.devices)})" if info.devices else ""))
    table.add_row("CPU", info.cpu)
    for name, text in info.choices.items():
        table.add_row(name, text)
    for name, version in info.versions.items():
        table.add_row(name, version or "[yellow]not installed[/]")
    console.print(table)
    ops = Table("op", "runs", "why not a faster one", box=None, pad_edge=False, header_style="bold")
    for op in info.ops:
        why = "; ".join(f"{name}: {reason}" for name, reason in op.missing.items())
        ops.add_row(op.name, op.runs, _plain(why or "there is no faster one"))
    console.print()
    console.print(ops)
    if info.missing:
        absent = Table("missing", "why it matters", box=None, pad_edge=False, header_style="bold")
        for part, why in info.missing.items():
            absent.add_row(part, _plain(why))
        console.print()
        console.print(absent)


def _choices(device: str) -> dict[str, str]:
    """Values of the "auto" settings for the recipe vit_b16 on this machine."""
    import torch

    from pera_fast.config import load_config
    from pera_fast.train.attention import explain_attention
    from pera_fast.train.graph import choose_graph

    where, cfg = torch.device(device), load_config("vit_b16")
    graph = choose_graph(cfg, where)
    try:
        attention = f"vit_b16: {explain_attention(cfg, where)}"
    except RuntimeError as error:  # PERA_BACKEND asks for one that cannot run here
        attention = str(error)
    return {
        "decoding": _decoding(device),
        "attention": attention,
        "CUDA graph": f"{'yes' if graph.use else 'no'} ({graph.reason})",
    }


def _decoding(device: str) -> str:
    """Choice of data.decode_on=auto for JPEG files of 512 px, recipe vit_b16, one process on this machine."""
    import torch

    from pera_fast.config import load_config
    from pera_fast.data.loading.decode_on import choose, cores_image_seconds, has_jpeg_hardware
    from pera_fast.train.flops import fastest_rate

    where, cfg = torch.device(device), load_config("vit_b16")
    seconds = cores_image_seconds(cfg.views, cfg.model.in_chans, 512.0 * 512.0, 0.0)
    rate = fastest_rate(cfg, where)
    made = choose("auto", has_gpu=device == "cuda", cores=usable_cores(), image_seconds=seconds, step_rate=rate)
    hardware = "; the GPU has a JPEG decoder in hardware" if has_jpeg_hardware(where) else ""
    return f"vit_b16, JPEG of 512 px: {made}{hardware}"


def _plain(text: str) -> str:
    return text.replace("[", r"\[")  # rich would take [cuda13] for markup


def _ops(device: str, missing: dict[str, str]) -> list[Op]:
    """Imports every op's folder, so that each is registered, and asks which implementations run."""
    import pera_kernels

    broken: list[Op] = []
    for module in pkgutil.iter_modules(pera_kernels.__path__):
        if module.ispkg:
            try:
                importlib.import_module(f"pera_kernels.{module.name}")
            except Exception as error:  # whatever is wrong with one op, the others are still worth reporting
                reason = " ".join(str(error).split())
                broken.append(Op(module.name, "nothing", {"all": f"cannot be imported ({reason})"}))
    from pera_kernels import backend

    if backend.native() is None:
        reason = backend.needs_native()(backend.torch.device("cpu"))
        missing["native library"] = f"fast CPU kernels; {reason}"
    rows = [Op(row.op, row.runs, dict(row.missing)) for row in backend.report(device)]
    return sorted(rows + broken, key=lambda op: op.name)


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _wanted(part: str) -> bool:
    """Whether there is such a part for this machine: xformers is not built for arm64, triton for these two alone."""
    built_for = {"xformers": ("x86_64",), "triton": ("x86_64", "aarch64")}
    return platform.machine() in built_for.get(part, (platform.machine(),))


def _no_gpu(cuda: str | None, hip: str | None = None) -> str:
    why = "the large recipes need one in practice"
    if hip is not None:
        return f"{why}; this torch is for AMD's GPUs (ROCm), which the kernels and the loader are not made for"
    if cuda is None and Path("/proc/driver/nvidia").exists():
        return f"{why}; there is one, but this torch is a CPU build: install torch for CUDA"
    if cuda is None:
        return f"{why}; this torch is a CPU build"
    return f"{why}; torch sees none (nvidia-smi says whether the driver does)"


def _cpu(capability: str) -> str:
    """Model, cores that this process may use, memory, the features that matter, and what torch makes of them."""
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    except OSError:
        pass  # not Linux, or no /proc
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    features = " ".join(name for name in _FEATURES if name in flags)
    cores, usable = os.cpu_count() or 1, usable_cores()
    allowed = "" if usable == cores else f" of which {usable:g} may be used,"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    model = facts.get("model name") or platform.processor() or platform.machine()
    size = f"{cores} cores,{allowed} {memory:.0f} GiB"
    return f"{model}, {size}; {features or 'no vector features'} (torch uses {capability})"
