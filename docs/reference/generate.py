"""Write the reference pages that follow from the code: commands, settings and kernels.

python docs/reference/generate.py            writes the pages beside this file
python docs/reference/generate.py --check    names pages that are out of date, and exits with 1
"""

import argparse
import enum
import re
import sys
from pathlib import Path
from typing import Any

import typer

from pera_fast import cli
from pera_fast.config import Config, keys
from pera_fast.config.listing import meanings, section_title

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MADE = "<!-- Written by docs/reference/generate.py; do not edit. -->"
NO_DEFAULT = "none"
IMPLEMENTATIONS = {"reference.py": "PyTorch (the definition)", "triton.py": "Triton", "cpu.cpp": "C++ for CPUs"}


def cli_page() -> str:
    """Every command with its arguments, options and defaults, as typer knows them."""
    top: Any = typer.main.get_command(cli.app)
    lines = [MADE, "", "# Commands", "", "`pera-fast COMMAND --help` prints the same.", ""]
    for name, command in _commands(top, "pera-fast"):
        lines += [f"## {name}", "", *_help(command), *_usage(name, command), *_params(command)]
    return "\n".join(lines).strip() + "\n"


def _commands(group: Any, name: str) -> list[tuple[str, Any]]:
    found = []
    for key, command in group.commands.items():
        # `pera-fast profile` runs `batches`, a name that nobody needs to type.
        whole = name if (name, key) == ("pera-fast profile", "batches") else f"{name} {key}"
        found += _commands(command, whole) if hasattr(command, "commands") else [(whole, command)]
    return found


def _help(command: Any) -> list[str]:
    return [" ".join(part.split()) + "\n" for part in re.split(r"\n\s*\n", command.help or "") if part.strip()]


def _usage(name: str, command: Any) -> list[str]:
    words = [name, *(_option(param) for param in command.params if param.required and _is_option(param))]
    if any(not param.required and _is_option(param) for param in command.params):
        words.append("[OPTIONS]")
    for param in (param for param in command.params if not _is_option(param)):
        many = "..." if param.nargs == -1 and not str(param.metavar).endswith("...") else ""
        words.append(f"{_argument(param)}{many}" if param.required else f"[{_argument(param)}{many}]")
    return ["```text", " ".join(words).replace("[[", "[").replace("]...]", "]..."), "```", ""]


def _is_option(param: Any) -> bool:
    return param.param_type_name == "option"


def _argument(param: Any) -> str:
    return str(param.metavar or param.name.upper())


def _option(param: Any) -> str:
    names = " / ".join([*param.opts, *param.secondary_opts])
    return names if getattr(param, "is_flag", False) else f"{names} {_value(param)}"


def _value(param: Any) -> str:
    kind = param.type_descriptor.annotation
    if issubclass(kind, enum.Enum):
        return "|".join(str(choice.value) for choice in kind)
    return str(param.metavar or kind.__name__.upper())


def _default(param: Any) -> str:
    shown = getattr(param, "show_default", None)
    if isinstance(shown, str):
        return shown
    if param.required:
        return "required"
    value = getattr(param.default, "value", param.default)
    if value is None:
        return NO_DEFAULT
    if value is False and not param.secondary_opts:
        return "off"
    if isinstance(value, bool):
        return (param.opts if value else param.secondary_opts)[0]
    return str(value)


def _params(command: Any) -> list[str]:
    if not command.params:
        return []
    lines = ["| argument or option | meaning | default |", "| --- | --- | --- |"]
    for param in command.params:
        name = _option(param) if _is_option(param) else _argument(param)
        lines.append(f"| {_code(name)} | {_cell(param.help or '')} | {_cell(_default(param))} |")
    return [*lines, ""]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def config_page() -> str:
    """Every key with what may be written, its default and its comment in the tree."""
    lines = [MADE, "", "# Settings", "", *_about_settings()]
    comments = meanings()
    for section in keys.SECTIONS:
        lines += [
            f"## {section}",
            "",
            section_title(section),
            "",
            "| key | allowed | default | meaning |",
            "| --- | --- | --- | --- |",
        ]
        for name in (key.partition(".")[2] for key in keys.KEYS if key.startswith(f"{section}.")):
            key = f"{section}.{name}"
            default = keys.show(getattr(getattr(Config(), section), name))
            meaning = _cell(comments[key])
            lines.append(f"| {_code(key)} | {_cell(keys.wants(key))} | {_code(default)} | {meaning} |")
        lines.append("")
    return "\n".join(lines).strip() + "\n"


def _about_settings() -> list[str]:
    return [
        "Write settings behind a command as `section.key=value`; values are YAML. Defaults are those of `vit_b16`;",
        "a recipe in `pera_fast/recipes` changes some of them. `RUN/config.yaml` holds every key of a run.",
        "`pera-fast config --recipe R` prints the same on a terminal, with the values of a recipe; its output is a",
        "recipe file: `pera-fast config > my.yaml`, then `--recipe my.yaml`.",
        "",
    ]


def kernels_page() -> str:
    """Every op with its README and what it is implemented in."""
    folder = ROOT / "kernels" / "pera_kernels"
    lines = [MADE, "", "# Kernels", "", *_about_kernels(), "| op | implementations |", "| --- | --- |"]
    for page in sorted(folder.glob("*/README.md")):
        files = {file.name for file in page.parent.iterdir()}
        found = ", ".join(word for name, word in IMPLEMENTATIONS.items() if name in files) or "PyTorch"
        lines.append(f"| [{page.parent.name}](../../kernels/pera_kernels/{page.parent.name}/README.md) | {found} |")
    return "\n".join(lines) + "\n"


def _about_kernels() -> list[str]:
    return [
        "`pera_kernels` is a package of its own, usable without the trainer. Each op's folder holds the definition in",
        "plain PyTorch, the op (schema, shapes, gradient), its faster implementations, and a README with the maths,",
        "the bytes and FLOPs, and what is saved for the backward pass. `pera-fast info` says which implementation runs",
        "on your machine and why not a faster one; `PERA_BACKEND=reference` forces the definitions.",
        "",
        "```python",
        "import torch",
        "from pera_kernels.attention import attention",
        "",
        "groups = [2, 471, 8, 23]  # 2 sequences of 471 tokens, then 8 of 23, packed in one tensor",
        "qkv = torch.randn(2 * 471 + 8 * 23, 3 * 768, requires_grad=True)",
        "out = attention(qkv, 12, groups)  # [1126, 768]; no token sees another sequence, nothing is padded",
        "out.sum().backward()",
        "```",
        "",
    ]


PAGES = {"cli.md": cli_page, "config.md": config_page, "kernels.md": kernels_page}


def main(arguments: list[str] | None = None, folder: Path = HERE) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    changed = 0
    for name, make in PAGES.items():
        page, text = folder / name, make()
        if page.exists() and page.read_text(encoding="utf-8") == text:
            continue
        changed = 1
        if check:
            print(f"docs/reference/{name} is out of date: run python docs/reference/generate.py", file=sys.stderr)
        else:
            page.write_text(text, encoding="utf-8")
    return changed if check else 0


if __name__ == "__main__":
    sys.exit(main())
