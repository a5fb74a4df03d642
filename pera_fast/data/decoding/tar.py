"""Lists the members of uncompressed tar files by their headers, and reads one by its offset.

Python's own tarfile parses a header; walking from one to the next is done here, because a hostile or damaged tar must
neither hang nor end anything: the position only grows, and whatever does not fit stops the walk with a reason.
"""

import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

BLOCK = 512
_MAX_EXTENSION = 2**20  # bytes of one extended header: long names
_END = bytes(BLOCK)
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_KINDS = {
    tarfile.LNKTYPE: "is a link",
    tarfile.SYMTYPE: "is a link",
    tarfile.CHRTYPE: "is a device",
    tarfile.BLKTYPE: "is a device",
    tarfile.FIFOTYPE: "is a pipe",
    tarfile.GNUTYPE_SPARSE: "is a sparse file",
}


class FileState(NamedTuple):
    """Size and time of a file, which tell whether it changed after it was checked."""

    st_size: int  # bytes
    st_mtime_ns: int


@dataclass(frozen=True)
class Member:
    """A file in a tar, by its place; takes the part of a path where one is read or checked."""

    tar: str  # path of the tar
    name: str
    offset: int  # bytes from the tar's start to the content's
    size: int  # bytes

    def __str__(self) -> str:
        return f"{self.tar}/{self.name}"


@dataclass(frozen=True)
class Found:
    """One entry of a tar's listing."""

    name: str
    offset: int  # of the content
    size: int
    reason: str = ""  # why it cannot be used


class TarDamageError(Exception):
    """The listing ends here, before the tar's end; the message says why."""


def read_member(member: Member, max_bytes: int) -> tuple[bytes, FileState]:
    """The content of a member, and its size with the tar's time.

    Raises:
        OSError: it cannot be read, or the tar holds something else at this place now.
    """
    if member.size > max_bytes:
        raise OSError(f"{member.size / 2**30:.1f} GiB are too much to read at once: cut it into tiles")
    fd = os.open(member.tar, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe would wait for ever
    try:
        state = os.fstat(fd)
        if not stat.S_ISREG(state.st_mode):
            raise OSError("not a regular file")
        start, end = member.offset - BLOCK, member.offset + member.size
        if end > state.st_size:
            raise OSError(f"the tar was cut short: {state.st_size} bytes, this member ends at {end}")
        data = _pread(fd, end - start, start)
        after = os.fstat(fd)
    finally:
        os.close(fd)
    if len(data) != end - start or (after.st_size, after.st_mtime_ns) != (state.st_size, state.st_mtime_ns):
        raise OSError("changed while it was read")
    try:
        header = parse_header(data[:BLOCK])
    except tarfile.HeaderError:
        header = None
    if header is None or header.size != member.size or header.type not in _REGULAR:
        raise OSError("the tar holds something else at this place now")
    return data[BLOCK:], FileState(member.size, state.st_mtime_ns)


def list_members(path: str) -> Iterator[Found]:
    """The files of a tar in its order, those that are refused with a reason; folders are left out.

    Raises:
        OSError: the tar cannot be read.
        TarDamageError: from here on nothing can be told.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        state = os.fstat(fd)
        if not stat.S_ISREG(state.st_mode):
            raise OSError("not a regular file")
        yield from _walk(fd, state.st_size)
    finally:
        os.close(fd)


def _walk(fd: int, end: int) -> Iterator[Found]:
    position, extended = 0, {}
    while True:
        block = _pread(fd, BLOCK, position)
        if block == _END:
            return
        if len(block) < BLOCK:
            raise TarDamageError(f"ends after {end} bytes without an end mark: it was cut short")
        try:
            header = parse_header(block)
        except tarfile.HeaderError as error:
            known = "not a tar file" if position == 0 else f"damaged at byte {position}"
            raise TarDamageError(f"{known} ({error})") from None
        content = position + BLOCK
        size = extended.get("size", header.size) if header.type in _REGULAR else header.size
        if size < 0 or (content + size > end and header.type not in _KINDS):
            raise TarDamageError(f"cut short: {header.name!r} ends at byte {content + size} of {end}")
        position = content + -(-size // BLOCK) * BLOCK
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            if size > _MAX_EXTENSION:
                raise TarDamageError(f"damaged at byte {content - BLOCK} (an extended header of {size} bytes)")
            extended |= _extension(header.type, _pread(fd, size, content))
            continue
        if header.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            continue
        name = extended.get("path", header.name)
        sparse = extended.get("sparse", False)
        extended = {}
        if header.type == tarfile.DIRTYPE or (header.type in _REGULAR and name.endswith("/")):
            continue
        yield Found(name, content, size, refusal(name, tarfile.GNUTYPE_SPARSE if sparse else header.type))
        if header.type in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
            position = content  # these have no content, whatever the size says


def refusal(name: str, kind: bytes) -> str:
    """Why a member of this name and type is not taken; empty if it is."""
    if kind not in _REGULAR:
        return _KINDS.get(kind, f"is of unknown kind {kind!r}")
    if name.startswith("/"):
        return "has an absolute name"
    if ".." in name.split("/"):
        return "has a name with .."
    return ""


def parse_header(block: bytes) -> tarfile.TarInfo:
    """A block as a header. Raises tarfile.HeaderError, also for what tarfile itself stumbles over."""
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        raise
    except Exception as error:  # hostile numbers
        raise tarfile.HeaderError(str(error) or type(error).__name__) from error


def _extension(kind: bytes, data: bytes) -> dict:
    """Fields that a long-name or PAX record sets for the next member: path, size, sparse."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    found: dict = {}
    while data:
        length, blank, _ = data.partition(b" ")
        if not blank or not length.isdigit() or not len(length) + 1 < int(length[:9]) <= len(data):
            break
        record, data = data[len(length) + 1 : int(length)], data[int(length) :]
        key, _, value = record.rstrip(b"\n").partition(b"=")
        if key == b"path":
            found["path"] = value.decode("utf-8", "surrogateescape")
        elif key == b"size" and value.isdigit():
            found["size"] = int(value[:19])
        elif key.startswith(b"GNU.sparse"):
            found["sparse"] = True
    return found


def _pread(fd: int, size: int, start: int) -> bytes:
    data = os.pread(fd, size, start)
    while len(data) < size and (more := os.pread(fd, size - len(data), start + len(data))):
        data += more
    return data
