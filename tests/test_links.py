"""Links, anchors, section numbers and file names, in every page, docstring and comment, lead to something that exists.

A link is Markdown's. Code cites a section as ``docs/method.md section 3.1`` or ``docs/architecture.md "Contracts"``.
"""

import ast
import io
import re
import runpy
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_OURS = {"build", "dist", "site", "runs", "demo-report", "__pycache__"}  # what commands write
HIDDEN = (".ci", ".github")  # the hidden folders that are part of the repository
METHOD = "docs/method.md"

NUMBER = r"\d+(?:\.\d+)*"
NUMBERS = rf"{NUMBER}(?:(?:, | and | to ){NUMBER})*"
CITATION = re.compile(rf'(docs/[\w/-]+\.md),? (?:sections? ({NUMBERS})|"([^"]+)")')
BARE = re.compile(r"\b[Ss]ections? \d|§|\beq(?:uation|\.)? ?\(?\d")  # a place in a text that is not named
LINK = re.compile(r'\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)(?:\s+"[^"]*")?\)')
OTHER_LINK = re.compile(r'^\[[^\]]+\]:\s+(\S+)|(?:src|href)="([^"]+)"', re.MULTILINE)
FILE = re.compile(r"(?<![\w/.*>}<:-])(?:[\w.-]+/)*[\w-]+\.(?:py|md|cpp|h|yaml|sh)\b(?![\w*/(-])")
NOT_FILES_OF_OURS = {"config.yaml", "RUN/config.yaml", "asked.yaml", "RUN/asked.yaml", "malloc.h"}  # of a run; of glibc
NOT_FILES_OF_OURS |= {"my.yaml", "no.yaml"}  # a user's


@cache
def files() -> tuple[Path, ...]:
    """All files of the repository's own folders."""
    found = []
    for entry in sorted(ROOT.iterdir()):
        if entry.is_file():
            found.append(entry)
        elif entry.name not in NOT_OURS and (entry.name in HIDDEN or not entry.name.startswith(".")):
            found += [file for file in sorted(entry.rglob("*")) if file.is_file()]
    return tuple(file for file in found if not NOT_OURS & {*file.relative_to(ROOT).parts})


PAGES = [file for file in files() if file.suffix == ".md"]
CODE = [file for file in files() if file.suffix in (".py", ".cpp", ".h", ".yaml", ".toml", ".sh")]


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@cache
def titles(page: Path) -> tuple[str, ...]:
    """Headings of a page, without the marks of Markdown."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"^#+ +(.*?)(?: +#+)?$", text, re.MULTILINE)
    return tuple(re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", title) for title in found)


@cache
def numbers(page: Path) -> frozenset[str]:
    """Numbers of a page's sections."""
    return frozenset(found[0] for title in titles(page) if (found := re.findall(rf"^({NUMBER})\.? ", title)))


@cache
def anchors(page: Path) -> frozenset[str]:
    """What may follow the # of a link to a page: headings, as GitHub and MkDocs write them, and ids."""
    slugs = [re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles(page)]
    again = [f"{slug}-{slugs[:i].count(slug)}" for i, slug in enumerate(slugs) if slug in slugs[:i]]
    ids = re.findall(r'(?:\sid="|\{ *#)([\w-]+)', page.read_text(encoding="utf-8"))
    return frozenset([*slugs, *again, *ids])


def without_code(text: str) -> str:
    """A page without its blocks and words of code, in which brackets are not links."""
    text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "CODE", text, flags=re.DOTALL)


def link_problems(page: Path, text: str) -> list[str]:
    """Links of a page's text that lead nowhere, out of the repository, or to another section than they say."""
    text = without_code(text)
    links = [(words, target) for words, target in LINK.findall(text)]
    links += [
        (inner, target) for words, _ in links for inner, target in LINK.findall(words)
    ]  # a picture that is a link
    links += [("", reference or html) for reference, html in OTHER_LINK.findall(text)]
    problems = []
    for words, target in links:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if target.startswith("/") or not there.is_relative_to(ROOT):
            problems.append(f"{target}: not in the repository")
        elif not there.exists():
            problems.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(there):
            problems.append(f"{target}: no such section")
        for number in re.findall(rf"\bsection ({NUMBER})", words):
            if not anchor.startswith(number.replace(".", "") + "-"):
                problems.append(f"{target}: not section {number}")
    return problems


def prose(file: Path, text: str) -> str:
    """Docstrings and comments of a source file in one line, so that a citation may run over a line's end."""
    parts = []
    if file.suffix == ".py":
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        parts += [token.string.lstrip("#") for token in tokens if token.type == tokenize.COMMENT]
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        parts += [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, documented)]
    elif file.suffix in (".cpp", ".h"):
        parts += re.findall(r"//+(.*)", text) + re.findall(r"/\*(.*?)\*/", text, re.DOTALL)
    else:
        parts += re.findall(r"(?:^|\s)#(.*)", text)
    return " ".join(" ".join(parts).split())


@cache
def prose_of(file: Path) -> str:
    return prose(file, file.read_text(encoding="utf-8"))


def expanded(cited: str) -> list[str]:
    """Numbers in "2, 4.1 and 5" or "3 to 5"; of a range its ends."""
    return re.findall(NUMBER, cited)


def citation_problems(text: str, own: Path | None = None) -> list[str]:
    """Citations in prose of sections that do not exist, or that do not say of which page.

    Args:
        text: prose in one line.
        own: the page that a number alone means; None: there is none.
    """
    problems = []
    for page, cited, title in CITATION.findall(text):
        there = ROOT / page
        if not there.exists():
            problems.append(f"{page}: no such page")
            continue
        problems += [f"{page} section {n}: no such section" for n in expanded(cited) if n not in numbers(there)]
        if title and title not in titles(there):
            problems.append(f'{page} "{title}": no such section')
    rest = CITATION.sub("", text)
    if own is not None:
        cited = re.findall(rf"\b[Ss]ections? ({NUMBERS})", rest)
        return problems + [f"section {n}: no such section" for c in cited for n in expanded(c) if n not in numbers(own)]
    found = [rest[max(match.start() - 30, 0) : match.end() + 10] for match in BARE.finditer(rest)]
    return problems + [f"{words!r}: a section of which page?" for words in found]


@cache
def known_ends() -> frozenset[str]:
    """Every end of every path in the repository: of tests/test_links.py also test_links.py."""
    parts = (file.relative_to(ROOT).parts for file in files())
    return frozenset("/".join(path[i:]) for path in parts for i in range(len(path))) | NOT_FILES_OF_OURS


def file_problems(text: str) -> list[str]:
    """Names of source files and pages in prose that no file of the repository has."""
    named = (file.removeprefix("./") for file in FILE.findall(re.sub(r"https?://\S+", "", text)))
    return [f"{file}: no such file" for file in named if file not in known_ends()]


def page_problems(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    unlinked = LINK.sub("", without_code(text))  # a section in a link's words is checked with the link
    commands = r"^```(?:sh|console|python).*?^```"  # these name files that they write
    named = LINK.sub("", re.sub(commands, "", text, flags=re.DOTALL | re.MULTILINE))
    own = page if name(page) == METHOD else None
    return link_problems(page, text) + citation_problems(" ".join(unlinked.split()), own) + file_problems(named)


def code_problems(file: Path) -> list[str]:
    return citation_problems(prose_of(file)) + file_problems(prose_of(file))


def test_pages() -> None:
    problems = [f"{name(page)}: {problem}" for page in PAGES for problem in page_problems(page)]
    assert not problems, "\n".join(problems)


def test_docstrings_and_comments() -> None:
    problems = [f"{name(file)}: {problem}" for file in CODE for problem in code_problems(file)]
    assert not problems, "\n".join(problems)


def test_everything_is_looked_at() -> None:
    """The checks above would also pass if they found nothing to check."""
    assert {"README.md", METHOD, "kernels/pera_kernels/koleo/README.md", "tests/golden/README.md"} <= set(
        map(name, PAGES)
    )
    cited = {
        number
        for file in CODE
        for page, found, _ in CITATION.findall(prose_of(file))
        if page == METHOD
        for number in expanded(found)
    }
    assert {"2.3", "3.1", "4.4", "5.1", "6.3"} <= cited


def test_picture_of_the_method_is_what_its_script_draws() -> None:
    images = ROOT / "docs" / "images"
    drawn = runpy.run_path(str(images / "method.py"))["draw"]()
    assert drawn == (images / "method.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](docs/method.md#31-who-sees-which-patch)", None),
        ("[method, section 3.1](docs/method.md#31-who-sees-which-patch)", None),
        ("`[a](b.md)` and [a](https://example.org/b.md)", None),
        ("[method, section 3.2](docs/method.md#31-who-sees-which-patch)", "not section 3.2"),
        ("[a](docs/methods.md)", "no such file"),
        ("[a](docs/method.md#32-who)", "no such section"),
        ("[![a](docs/images/none.svg)](README.md)", "no such file"),
        ('<img src="docs/images/none.svg">', "no such file"),
        ("[a]: docs/none.md", "no such file"),
        ("[a](../README.md)", "not in the repository"),
        ("[a](/README.md)", "not in the repository"),
    ],
)
def test_broken_links_are_found(text: str, problem: str | None) -> None:
    found = link_problems(ROOT / "README.md", text)
    assert [problem in words for words in found] == [True] if problem else found == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('"""A mask\n\ndocs/method.md\nsections 3 to 5."""\n', None),
        ("# docs/method.md section 4.4, twice: docs/method.md sections 4.1, 4.2 and 5\n", None),
        ('# docs/architecture.md "How a step flows"\n', None),
        ("words = 'section 3'\n", None),
        ("# docs/method.md section 4.44\n", "no such section"),
        ("# docs/method.md sections 3 to 12\n", "no such section"),
        ("# docs/methods.md section 3\n", "no such page"),
        ('# docs/architecture.md "Contract"\n', "no such section"),
        ("def f():\n    '''As section 3 says.'''\n", "of which page"),
        ("x = 1  # the loss of eq. 5\n", "of which page"),
    ],
)
def test_broken_citations_are_found(text: str, problem: str | None) -> None:
    found = citation_problems(prose(Path("some.py"), text))
    assert [problem in words for words in found] == [True] if problem else found == []


def test_files_that_do_not_exist_are_found() -> None:
    assert file_problems("see config/tree.py, tests/test_links.py, koleo/README.md and <op>/op.py") == []
    assert file_problems("see docs/methods.md and config/trees.py") == [
        "docs/methods.md: no such file",
        "config/trees.py: no such file",
    ]
