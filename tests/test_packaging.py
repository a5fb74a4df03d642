"""The wheel holds what it should, and a machine without compiler or cmake installs with one clear warning line."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from itertools import product
from pathlib import Path

import pytest
from ceilings_support import write_ceilings

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    "pyproject.toml",
    "setup.py",
    "CMakeLists.txt",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "pera_fast",
    "kernels",
    "bench",
)
LIBRARY = "pera_kernels/_native.so"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


def build_wheel(folder: Path, **environment: str) -> tuple[zipfile.ZipFile, str]:
    """Builds a wheel from a copy of the sources; returns it and what the build printed."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--skip-dependency-check"]
    done = subprocess.run(
        [*command, "--outdir", str(folder), str(source)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel), done.stdout


def warnings(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("WARNING: pera-fast")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    # Without optimisation, which takes most of the time; the library that the other tests run is built with it.
    built, output = build_wheel(tmp_path_factory.mktemp("wheel"), CMAKE_BUILD_TYPE="None")
    assert warnings(output) == []
    return built


def test_wheel_holds_every_module_and_recipe(wheel):
    names = set(wheel.namelist())
    modules = {path.relative_to(ROOT) for path in (ROOT / "pera_fast").rglob("*.py")}
    modules |= {path.relative_to(ROOT / "kernels") for path in (ROOT / "kernels" / "pera_kernels").rglob("*.py")}
    modules |= {path.relative_to(ROOT / "bench") for path in (ROOT / "bench" / "pera_bench").rglob("*.py")}
    assert {path.as_posix() for path in modules} <= names
    recipes = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pera_fast" / "recipes").glob("*.yaml")}
    assert recipes
    assert recipes <= names
    assert not [name for name in names if name.startswith(("tests/", "bench/", "kernels/")) or name.endswith(".cpp")]


def test_wheel_fits_any_python_of_the_platform(wheel):
    assert "-py3-none-linux_" in Path(wheel.filename).name


def test_wheel_has_the_console_script(wheel):
    (entry,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    points = configparser.ConfigParser()
    points.read_string(wheel.read(entry).decode())
    assert dict(points["console_scripts"]) == {"pera-fast": "pera_fast.cli:main"}


def test_benches_of_the_wheel_run(wheel, tmp_path):
    wheel.extractall(tmp_path)
    write_ceilings(tmp_path / "cache")
    command = [sys.executable, "-m", "pera_fast", "bench", "mask_tokens", "--device", "cpu", "--recipe", "tiny"]
    command += ["--threads", "1", "--images", "2", "--seconds", "0.01"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "native" in done.stdout


def test_library_of_the_wheel_runs_and_names_no_folder_of_the_builder(wheel, tmp_path):
    assert LIBRARY in wheel.namelist()
    wheel.extractall(tmp_path)
    code = (
        "import torch; from pera_kernels import backend, visible_patches\n"
        "assert backend.needs_native()(torch.device('cpu')) is None, backend.needs_native()(torch.device('cpu'))\n"
        "print([row.runs for row in backend.report() if row.op == 'visible_patches'])"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PERA_BACKEND")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['native']"
    assert str(Path(wheel.filename).parent).encode() not in wheel.read(LIBRARY)


def test_library_of_the_wheel_needs_the_stable_abi_alone(wheel, tmp_path):
    """What it needs beside the C and C++ libraries, whose symbols have versions, are PyTorch's stable C functions."""
    nm = shutil.which("nm") or pytest.skip("no nm")
    library = wheel.extract(LIBRARY, tmp_path)
    done = subprocess.run([nm, "-D", "--undefined-only", library], stdout=subprocess.PIPE, text=True, check=True)
    symbols = [line.split() for line in done.stdout.splitlines()]
    of_torch = [name for kind, name in symbols if kind == "U" and "@" not in name]
    assert "torch_parallel_for" in of_torch
    assert [name for name in of_torch if not name.startswith(("aoti_torch_", "torch_"))] == []


def test_sources_include_no_header_of_torch_without_a_stable_abi():
    """The inline code of the other headers needs no symbol, but knows how one version lays out its objects."""
    sources = [path for path in (ROOT / "kernels").rglob("*") if path.suffix in (".cpp", ".h")]
    included = [name for path in sources for name in re.findall(r"#include *[<\"]([^>\"]+)", path.read_text())]
    of_torch = {name for name in included if name.startswith(("ATen", "c10", "torch"))}
    assert of_torch
    assert [name for name in of_torch if not name.startswith(("torch/csrc/stable/", "torch/headeronly/"))] == []


@pytest.mark.parametrize(
    ("variable", "reason"), [("CXX", "Could not find the compiler"), ("CMAKE", "cmake was not found")]
)
def test_missing_tool_is_one_warning_line(variable, reason, tmp_path):
    built, output = build_wheel(tmp_path, **{variable: "/nowhere/tool"})
    assert LIBRARY not in built.namelist()
    (line,) = warnings(output)
    assert reason in line
    assert "/nowhere/tool" in line
    assert "apt-get install g++" in line


def test_lock_agrees_with_the_project_file():
    """Each direct requirement is locked, and at the versions that the project promises."""
    from packaging.requirements import Requirement

    text = (ROOT / "requirements.lock").read_text().splitlines()
    locked = [Requirement(line) for line in text if line and not line.startswith("#")]
    for requirement in locked:
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], f"{requirement} is not exact"
    gpu = {"torch": "2.13.0", "triton": "3.7.1", "nvidia-dali-cuda130": "2.4.0"}
    for python, processor in product(("3.10", "3.11", "3.12", "3.13", "3.14"), ("x86_64", "aarch64")):
        machine = {"python_version": python, "platform_machine": processor, "sys_platform": "linux"}
        here = [one for one in locked if one.marker is None or one.marker.evaluate(machine)]
        versions = {one.name.lower(): next(iter(one.specifier)).version for one in here}
        assert len(versions) == len(here), f"a package is locked twice for Python {python}"
        for name, version in gpu.items():
            assert versions.get(name) == version, f"{name} on {processor}"
        assert versions.get("xformers") == ("0.0.35" if processor == "x86_64" else None)  # there is no other build
        for wanted in map(Requirement, direct_requirements()):
            if wanted.marker is None or wanted.marker.evaluate(machine):
                assert versions[wanted.name.lower()] in wanted.specifier, f"{wanted} on Python {python}, {processor}"
    needed = {
        one.name for one in map(Requirement, direct_requirements()) if one.marker is None or one.marker.evaluate(arm())
    }
    assert {"triton", "nvidia-dali-cuda130"} <= needed, "without Triton no GPU kernel runs on a Grace Hopper"


def arm() -> dict[str, str]:
    """The markers of an arm64 server."""
    return {"python_version": "3.12", "platform_machine": "aarch64", "sys_platform": "linux"}


def direct_requirements() -> list[str]:
    """Requirement strings of dependencies and the extras test, dev and cuda13 in pyproject.toml."""
    setuptools = pytest.importorskip("setuptools.config.pyprojecttoml")
    project = setuptools.load_file(ROOT / "pyproject.toml")["project"]
    extras = project["optional-dependencies"]
    every = [*project["dependencies"], *extras["bench"], *extras["test"], *extras["dev"], *extras["cuda13"]]
    return [one for one in every if not one.startswith("pera-fast")]
