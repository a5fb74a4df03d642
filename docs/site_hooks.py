"""Adds README.md and the kernels' READMEs to the documentation site, and points links between all pages at the site.

Pages link as the repository lies, so that they work where the repository is browsed too. On the site a link to a file
that is no page becomes its words with the path behind them.
"""

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def added_pages() -> dict[str, Path]:
    """{page of the site: file of the repository outside docs/}."""
    readmes = sorted((ROOT / "kernels" / "pera_kernels").glob("*/README.md"))
    return {"index.md": ROOT / "README.md", **{f"kernels/{page.parent.name}.md": page for page in readmes}}


def on_files(files: Any, config: Any) -> Any:
    for uri, page in added_pages().items():
        text = page.read_text(encoding="utf-8")
        files.append(File.generated(config, uri, content=relinked(text, page, uri)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    uri = page.file.src_uri
    return markdown if uri in added_pages() else relinked(markdown, ROOT / "docs" / uri, uri)


def relinked(text: str, source: Path, uri: str) -> str:
    """A page's text with its links as the site needs them.

    Args:
        text: Markdown.
        source: the file in the repository that it is from.
        uri: where the site has it, below docs/.
    """
    # Code blocks stay as they are.
    parts = re.split(r"(^ *```.*?^ *```)", text, flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [LINK.sub(lambda match: _relink(match, source, uri), part) for part in parts[::2]]
    return "".join(parts)


def _relink(match: re.Match[str], source: Path, uri: str) -> str:
    picture, words, target = match.groups()
    path, mark, anchor = target.partition("#")
    if re.match(r"[a-z]+:", target) or not path:
        return match[0]
    there = Path(os.path.normpath(source.parent / path))
    on_site = {file: page for page, file in added_pages().items()}
    if there in on_site:
        page = on_site[there]
    elif there.is_relative_to(ROOT / "docs") and there.suffix != ".py":
        page = there.relative_to(ROOT / "docs").as_posix()
    else:
        return words if words.strip("`") in there.as_posix() else f"{words} (`{there.relative_to(ROOT).as_posix()}`)"
    return f"{picture}[{words}]({posixpath.relpath(page, posixpath.dirname(uri) or '.')}{mark}{anchor})"
