"""README, pages and the ops' READMEs say what was measured; the commands that they give exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer

from pera_fast import cli
from pera_fast.config import Config, load_config
from pera_fast.config.finetune import load_finetune

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted((ROOT / "kernels" / "pera_kernels").glob("*/README.md"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *KERNELS]


def test_measurements_are_those_of_the_results() -> None:
    command = [sys.executable, ROOT / "bench" / "report.py", "--check"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_is_a_front_page() -> None:
    """Long tables and whole manuals have pages of their own."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    _, _, rest = text.partition("<!-- measured -->")
    numbers = [line for line in rest.partition("<!-- /measured -->")[0].splitlines() if line.startswith("- **")]
    assert len(numbers) == 3


def test_every_page_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in [*(ROOT / "docs").rglob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]:
        assert f"({page.relative_to(ROOT).as_posix()})" in text


def test_ops_times_are_on_the_page_of_results_only() -> None:
    """A number of another suite or day in an op's README is one that nobody can take again."""
    for page in (page for page in KERNELS if (page.parent / "op.py").exists()):  # those with a bench
        text = page.read_text(encoding="utf-8")
        assert "docs/results.md" in text, page
        suite = {"adamw_ema": "update"}.get(page.parent.name, page.parent.name)
        assert f"pera-fast bench {suite}" in text, page
        assert not re.search(r"\d (ms|images/s)\b", text), page


def test_operators_are_all_named() -> None:
    text = (ROOT / "docs" / "reference" / "kernels.md").read_text(encoding="utf-8")
    for op in (ROOT / "kernels" / "pera_kernels").glob("*/op.py"):
        assert f"[{op.parent.name}](" in text


def commands() -> list[tuple[Path, list[str]]]:
    """Each line of a page's shell blocks that calls pera-fast, in words, without what follows a #."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:sh|console)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&|;|\|", line):
                    _, is_ours, rest = part.partition("pera-fast ")
                    if is_ours and not part.lstrip().startswith(("#", "pip", "error")):
                        found.append((page, shlex.split(rest, comments=True)))
    return found


def test_commands_have_the_options_that_pages_give_them() -> None:
    top: Any = typer.main.get_command(cli.app)
    seen = set()
    for page, words in commands():
        command, rest = top, list(words)
        while hasattr(command, "commands"):
            name = rest.pop(0) if rest and rest[0] in command.commands else "batches"
            assert name in command.commands, f"{page}: pera-fast {' '.join(words)}"
            command = command.commands[name]
        known = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
        for option in (word.partition("=")[0] for word in rest if word.startswith("--")):
            assert option in known, f"{page}: pera-fast {' '.join(words)}: no {option}"
        settings = [word for word in rest if re.match(r"[a-z]+\.[a-z_]+=", word)]
        if not {"train.batchsize=8"} & set(settings):  # the one that is shown because it is wrong
            settings = [s for s in settings if "total_batch_size" not in s]
            if command.name == "finetune":
                load_finetune(Config(), "segmentation", overrides=settings)
            else:
                load_config("vit_b16", settings)
        seen.add(command.name)
    assert {"pretrain", "bench", "batches", "trace", "pack", "tile", "dedupe", "stats", "show", "index"} <= seen


def test_python_of_the_kernels_runs() -> None:
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "reference" / "kernels.md").read_text(encoding="utf-8"), re.DOTALL
    )
    (code,) = (block for block in blocks if "pera_kernels" in block)
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["out"].shape == (1126, 768)
    assert found["qkv"].grad is not None
