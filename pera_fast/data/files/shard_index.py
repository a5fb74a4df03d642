"""Reads DALI's index of a shard (.idx, text format v1.2) as a listing of its members, without their headers."""

import os
import tarfile

from pera_fast.data.decoding.tar import BLOCK, Found, parse_header, refusal
from pera_fast.data.files.shard_writer import index_name
from pera_fast.storage import is_passing

_VERSION = "v1.2"
_FIELDS = 4  # of a member: extension, offset, size, name
_MAX_BYTES = 2**28
_SLACK = 2 * tarfile.RECORDSIZE  # that may follow the last member


def read_index(tar: str) -> list[Found] | None:
    """The members of a shard as the index beside it says, in its order; None if there is none that fits the shard.

    First and last member are looked up in the shard. One in between that is not what the index says is noticed when
    it is read (`tar.read_member`). Raises OSError for a fault of the storage.
    """
    try:
        path = index_name(tar)
        if os.stat(path).st_size > _MAX_BYTES:
            return None
        with open(path, encoding="utf-8") as file:
            found = _parse(file.read())
        with open(tar, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            ends = [-(-(member.offset + member.size) // BLOCK) * BLOCK for member in found]
            inside = all(member.offset >= BLOCK and member.size >= 0 for member in found)
            if not found or not inside or not 0 <= size - max(ends) <= _SLACK:
                return None
            for member in (found[0], found[-1]):
                file.seek(member.offset - BLOCK)
                header = parse_header(file.read(BLOCK))
                if (header.name, header.size) != (member.name, member.size):
                    return None
    except OSError as error:
        if is_passing(error):
            raise
        return None
    except (ValueError, tarfile.HeaderError):
        return None
    return found


def _parse(text: str) -> list[Found]:
    """Raises ValueError for what is no index, names with blanks included: it splits there."""
    head, *lines = text.splitlines()
    version, _, samples = head.partition(" ")
    if version != _VERSION or int(samples) != len(lines):
        raise ValueError("not an index of this version")
    found = []
    for line in lines:
        words = line.split(" ")
        if len(words) % _FIELDS:
            raise ValueError("not an index of this version")
        for at in range(0, len(words), _FIELDS):
            extension, offset, size, name = words[at : at + _FIELDS]
            if not name.endswith(f".{extension}"):
                raise ValueError("not an index of this version")
            found.append(Found(name, int(offset), int(size), refusal(name, tarfile.REGTYPE)))
    return found
