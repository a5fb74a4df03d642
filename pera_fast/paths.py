"""Paths that a user gives: on a disk, no URLs; files that are not to be overwritten. A leaf."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from pera_fast.errors import UserError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_COLLAPSED = re.compile(r"(s3a?|gs|gcs|abfss?|azure?|wasbs?|hdfs|https?|ftps?|sftp|file):/(?=[^/])")  # by pathlib


def refuse_url(name: str, value: str | os.PathLike[str]) -> None:
    """Raises UserError, naming the option, for a URL where a path is wanted: as a path it would be a local folder."""
    text = os.fspath(value)
    found = _URL.match(text) or _COLLAPSED.match(text)
    if found is None:
        return
    whole = text if text.startswith(found[1] + "://") else text.replace(":/", "://", 1)
    if found[1].lower() == "file":
        raise UserError(f"{name} {whole}: is a URL; give the path alone: {whole[len('file://') :]}".lstrip())
    why = "is a URL, and only files on a disk are read and written"
    raise UserError(f"{name} {whole}: {why}; copy it to a disk, or mount it (s3fs, gcsfuse, rclone mount)".lstrip())


def local_path(name: str, value: str | os.PathLike[str]) -> Path:
    """The path that was given for an option. Raises UserError for a URL."""
    refuse_url(name, value)
    return Path(value)


def new_file(name: str, value: str | os.PathLike[str], overwrite: bool) -> Path:
    """The path of a file to write. Raises UserError for a URL, and for a file that is there unless it may go."""
    path = local_path(name, value)
    if path.exists() and not overwrite:
        raise UserError(f"{name} {path}: exists already; give another name, or --overwrite to replace it".lstrip())
    return path


def refuse_inside(name: str, out: str | os.PathLike[str], data: str | os.PathLike[str]) -> None:
    """Raises UserError for an output in a folder of images: the next command would take it for more images."""
    target, folder = Path(out).resolve(), Path(data).resolve()
    if folder.is_dir() and target.is_relative_to(folder):
        why = "what is written there would be taken for images"
        raise UserError(f"{name} {out}: lies in the folder of images {data}, and {why}; give a place outside it")


def refuse_urls(args: Sequence[str]) -> None:
    """Raises UserError for a URL anywhere in a command line: as `--option URL`, `--option=URL`, `key=URL` or alone."""
    for before, arg in zip(["", *args], args, strict=False):
        name, equals, value = arg.partition("=")
        if equals and re.fullmatch(r"-*[\w.-]+", name):
            refuse_url(name, value)
        else:
            refuse_url(before if before.startswith("--") else "", arg)
