"""README, pages and the ops' READMEs say what was measured, and what they name exists."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OPS = sorted((ROOT / "kernels" / "pera_kernels").glob("*/README.md"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *OPS]


def test_measurements_are_those_of_the_results() -> None:
    command = [sys.executable, ROOT / "bench" / "report.py", "--check"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_is_a_front_page() -> None:
    """Long tables and whole manuals have pages of their own."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 190


def test_every_page_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in text


def test_ops_times_are_on_the_page_of_results_only() -> None:
    """A number of another suite or day in an op's README is one that nobody can take again."""
    for page in OPS:
        text = page.read_text(encoding="utf-8")
        assert "docs/results.md" in text, page
        assert f"pera-fast bench {page.parent.name}" in text, page
        assert not re.search(r"\d (ms|images/s)\b", text), page


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page} links to {target}"


def test_links_to_a_section_find_it() -> None:
    for page in PAGES:
        for target, section in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
            other = (page.parent / target if target else page).read_text(encoding="utf-8")
            titles = re.findall(r"^#+ (.*)$", other, re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert section in anchors, f"{page} links to {target}#{section}"


def test_operators_are_all_named() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for op in (ROOT / "kernels" / "pera_kernels").glob("*/op.py"):
        assert f"`{op.parent.name}`" in text


def test_python_of_the_kernels_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (code,) = (block for block in blocks if "pera_kernels" in block)
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["out"].shape == (1126, 768)
    assert found["qkv"].grad is not None
