"""The documentation site: its navigation, its generated pages, and the numbers that are quoted by hand."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
GENERATE = DOCS / "reference" / "generate.py"


def navigation(entries: list) -> list[str]:
    found = []
    for entry in entries:
        for target in entry.values():
            found += [target] if isinstance(target, str) else navigation(target)
    return found


def test_navigation_names_every_page() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert sorted(navigation(config["nav"])) == sorted([*pages, "index.md"])


def test_generated_pages_are_those_of_the_code() -> None:
    done = subprocess.run([sys.executable, GENERATE, "--check"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_generator_names_a_page_that_is_out_of_date(tmp_path, capsys) -> None:
    main = runpy.run_path(str(GENERATE))["main"]
    assert main([], tmp_path) == 0
    assert main(["--check"], tmp_path) == 0
    page = tmp_path / "config.md"
    page.write_text(page.read_text().replace("131072", "7"))
    assert main(["--check"], tmp_path) == 1
    assert "docs/reference/config.md is out of date" in capsys.readouterr().err


def test_generated_pages_have_every_key_and_command() -> None:
    from pera_fast.config.keys import KEYS

    settings = (DOCS / "reference" / "config.md").read_text(encoding="utf-8")
    assert all(f"| `{key}` |" in settings for key in KEYS)
    assert "| `model.student_ratio` | a number (above 0, at most 1) | `0.2` | fraction of patches" in settings
    commands = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    assert {"pera-fast pretrain", "pera-fast data tile", "pera-fast profile", "pera-fast profile trace"} <= set(
        re.findall("^## (.*)$", commands, re.MULTILINE)
    )
    assert "| `--size INT` | Tile size, in pixels a side. | 512 |" in commands


def test_batches_of_a_small_gpu_are_those_of_the_profile() -> None:
    page = (DOCS / "how-to" / "small-gpu.md").read_text(encoding="utf-8")
    profile = json.loads((ROOT / "bench" / "results" / "memory" / "vit_b16.json").read_text(encoding="utf-8"))
    assert f"commit {profile['machine']['commit']}" in page
    fits = [fit for fit in profile["fits"] if fit["purpose"] == "policy"]
    rows = [f"| {fit['overrides'][0].split('=')[1]} | {fit['largest_batch']['24']} |" for fit in fits]
    assert len(rows) == 3
    assert all(row in page for row in rows)


def test_lock_of_the_site_holds_what_the_extra_wants() -> None:
    from packaging.requirements import Requirement

    setuptools = pytest.importorskip("setuptools.config.pyprojecttoml")
    wanted = setuptools.load_file(ROOT / "pyproject.toml")["project"]["optional-dependencies"]["docs"]
    text = (ROOT / "requirements-docs.lock").read_text(encoding="utf-8").splitlines()
    locked = [Requirement(line) for line in text if line and not line.startswith("#")]
    for python in ("3.10", "3.11", "3.14"):
        here = [one for one in locked if one.marker is None or one.marker.evaluate({"python_version": python})]
        versions = {one.name: next(iter(one.specifier)).version for one in here}
        assert len(versions) == len(here), f"a package is locked twice for Python {python}"
        assert all(versions[one.name] in one.specifier for one in map(Requirement, wanted))


def test_links_of_the_site() -> None:
    """Links to pages lead to pages; a link to another file becomes its words and path."""
    relinked = load_hooks()["relinked"]
    page = DOCS / "how-to" / "add-an-op.md"
    for text, expected in {
        "[m](../method.md#5-loss)": "[m](../method.md#5-loss)",
        "[k](../../kernels/pera_kernels/koleo/README.md)": "[k](../kernels/koleo.md)",
        "[home](../../README.md)": "[home](../index.md)",
        "[tests](../../tests/kernels)": "tests",
        "[the tree](../../pera_fast/config/tree.py)": "the tree (`pera_fast/config/tree.py`)",
        "[a](https://example.org/b.md)": "[a](https://example.org/b.md)",
        "```\n[a](../../README.md)\n```": "```\n[a](../../README.md)\n```",
    }.items():
        assert relinked(text, page, "how-to/add-an-op.md") == expected


def load_hooks() -> dict:
    """The hooks of the site without mkdocs, which the tests do not need."""
    import types

    stubs = {name: types.ModuleType(name) for name in ("mkdocs", "mkdocs.structure", "mkdocs.structure.files")}
    stubs["mkdocs.structure.files"].__dict__["File"] = object
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stubs.items():
            patch.setitem(sys.modules, name, module)
        return runpy.run_path(str(DOCS / "site_hooks.py"))
