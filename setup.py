"""Builds the native CPU kernels with CMake; everything else is in pyproject.toml.

The library is optional: where cmake, a C++ compiler or torch is missing, the install goes on with one warning line and
the reference implementations run. Environment variables: ``CMAKE`` (program), ``CXX`` (compiler), ``PERA_NATIVE_ARCH``
(value of -march; default: portable).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class NotBuiltError(Exception):
    """The native library cannot be built here; the message is one clause that says why."""


def find_program(name: str) -> str | None:
    """The program that the environment variable NAME names, else the one beside this Python, else the one in PATH."""
    beside = Path(sys.executable).parent
    path = os.pathsep.join([str(beside), os.environ.get("PATH", os.defpath)])
    return shutil.which(os.environ.get(name.upper(), name), path=path)


def run(command: list[str]) -> None:
    """Runs a build step; its output goes to stderr. Raises NotBuiltError with the line that says what is wrong."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    sys.stderr.write(done.stdout)
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        wrong = [n for n, line in enumerate(lines) if "error" in line.lower()]
        first = wrong[0] if wrong else max(len(lines) - 1, 0)
        if lines[first : first + 1] and lines[first].startswith("CMake Error"):
            lines[first:] = [" ".join(lines[first + 1 : first + 3])]  # below "CMake Error at FILE:LINE"
        reason = (lines[first] if lines else f"exit status {done.returncode}").rstrip(".")
        raise NotBuiltError(f"{Path(command[0]).name}: {reason[:300]}")


def build_native(output: Path, work: Path) -> None:
    """Compiles kernels/pera_kernels/*/cpu.cpp to output/_native.so, in the folder ``work``. Raises NotBuiltError."""
    cmake = find_program("cmake")
    if cmake is None:
        raise NotBuiltError(f"cmake was not found ({os.environ.get('CMAKE', 'cmake')})")
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise NotBuiltError("torch is not installed in the building environment; use --no-build-isolation")
    work.mkdir(parents=True, exist_ok=True)
    # A cache would keep an older compiler or torch; the objects stay, so an unchanged source is not compiled again.
    (work / "CMakeCache.txt").unlink(missing_ok=True)
    configure = [cmake, "-S", str(ROOT), "-B", str(work), f"-DPERA_OUTPUT_DIRECTORY={output}"]
    configure.append(f"-DTORCH_ROOT={Path(torch.origin).parent}")
    configure.append(f"-DPERA_NATIVE_ARCH={os.environ.get('PERA_NATIVE_ARCH', 'portable')}")
    ninja = find_program("ninja")
    if ninja is not None:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    run(configure)
    run([cmake, "--build", str(work), "--parallel", str(os.cpu_count() or 1)])


class BuildNative(build_ext):
    """build_ext that calls CMake and survives without the library."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # no Python ABI in it, so no Python ABI in its name

    def run(self) -> None:
        for extension in self.extensions:
            library = Path(self.get_ext_fullpath(extension.name)).resolve()
            library.unlink(missing_ok=True)  # never leave one of an older source behind
            library.parent.mkdir(parents=True, exist_ok=True)
            try:
                build_native(library.parent, Path(self.build_temp).resolve() / "native")
            except NotBuiltError as reason:
                print(
                    f"WARNING: pera-fast: the native CPU library was not built: {reason}. The slower reference "
                    "implementations run; for the fast ones install g++ (apt-get install g++), then pera-fast again.",
                    file=sys.stderr,
                )

    def get_outputs(self) -> list[str]:
        return [name for name in super().get_outputs() if Path(name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """The library is for one platform and for any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("pera_kernels._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
