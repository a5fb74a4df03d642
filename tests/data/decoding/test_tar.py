"""Tar members, listed and read; what a damaged or hostile tar gets."""

import os
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tar_support import add, write_tar

from pera_fast.data.decoding.tar import BLOCK, Member, TarDamageError, list_members, read_member

LIMIT = 2**30
CONTENT = {"a.jpg": b"one", "b/c d.png": bytes(range(256)) * 5, "empty.txt": b"", "d.tif": b"x" * BLOCK}


def walk(path):
    """(members, why the listing ended early)."""
    found = []
    try:
        for member in list_members(str(path)):
            found.append(member)
    except TarDamageError as error:
        return found, str(error)
    return found, ""


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_what_tarfile_finds_and_read_back(tmp_path, kind):
    content = dict(CONTENT)
    if kind != tarfile.USTAR_FORMAT:
        content |= {"long/" * 60 + "name.jpg": b"long", "café\n日本.png": b"unicode"}
    path = write_tar(tmp_path / "a.tar", content, format=kind)
    found, damage = walk(path)
    assert damage == ""
    with tarfile.open(path) as tar:
        assert [(m.name, m.offset, m.size) for m in found] == [(m.name, m.offset_data, m.size) for m in tar]
    for member in found:
        data, state = read_member(Member(str(path), member.name, member.offset, member.size), LIMIT)
        assert data == content[member.name]
        assert (state.st_size, state.st_mtime_ns) == (len(data), path.stat().st_mtime_ns)


def test_what_is_refused_and_what_is_passed_over(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "folder", type=tarfile.DIRTYPE)
        add(tar, "../up.jpg", b"1")
        add(tar, "a/../../up.jpg", b"1")
        add(tar, "/etc/up.jpg", b"1")
        add(tar, "soft.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "hard.jpg", type=tarfile.LNKTYPE, linkname="good.jpg")
        add(tar, "device.jpg", type=tarfile.CHRTYPE)
        add(tar, "pipe.jpg", type=tarfile.FIFOTYPE)
        add(tar, "strange.jpg", b"1", type=b"Q")
        add(tar, "..good..jpg", b"2")
    found, damage = walk(path)
    assert damage == ""
    assert {member.name: member.reason for member in found} == {
        "../up.jpg": "has a name with ..",
        "a/../../up.jpg": "has a name with ..",
        "/etc/up.jpg": "has an absolute name",
        "soft.jpg": "is a link",
        "hard.jpg": "is a link",
        "device.jpg": "is a device",
        "pipe.jpg": "is a pipe",
        "strange.jpg": "is of unknown kind b'Q'",
        "..good..jpg": "",
    }


def test_a_tar_cut_short_keeps_what_is_whole(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{i}.jpg": bytes([i]) * 700 for i in range(4)})
    whole = path.read_bytes()
    for length, count, said in (
        (0, 0, "ends after 0 bytes"),
        (3 * BLOCK, 1, "ends after 1536 bytes without an end mark"),
        (3 * BLOCK + 100, 1, "without an end mark"),
        (4 * BLOCK + 100, 1, "cut short: '1.jpg' ends at byte 2748 of 2148"),
        (len(whole), 4, ""),
    ):
        path.write_bytes(whole[:length])
        found, damage = walk(path)
        assert len(found) == count
        assert said in damage
        assert bool(said) == bool(damage)


def test_what_is_no_tar(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"\x89PNG" * 400)
    assert "not a tar file" in walk(path)[1]
    os.unlink(path)
    os.mkfifo(path)
    with pytest.raises(OSError, match="not a regular file"):
        walk(path)


def test_a_place_that_holds_something_else_now_is_not_read(tmp_path):
    path = write_tar(tmp_path / "a.tar", CONTENT)
    first, second, *_ = walk(path)[0]
    member = Member(str(path), second.name, second.offset, second.size)
    assert read_member(member, LIMIT)[0] == CONTENT[second.name]
    write_tar(path, {"other.jpg": b"y" * 5000})
    with pytest.raises(OSError, match="something else at this place now"):
        read_member(member, LIMIT)
    with pytest.raises(OSError, match="something else"):  # another size
        read_member(Member(str(path), first.name, first.offset, first.size), LIMIT)
    path.write_bytes(path.read_bytes()[: second.offset])
    with pytest.raises(OSError, match="cut short"):
        read_member(member, LIMIT)
    with pytest.raises(OSError, match="too much to read at once"):
        read_member(Member(str(path), "", BLOCK, 5000), 4999)
    with pytest.raises(FileNotFoundError):
        read_member(Member(str(tmp_path / "none.tar"), "", BLOCK, 1), LIMIT)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_damage_anywhere_ends_the_walk_and_never_reaches_beyond_the_file(tmp_path_factory, data):
    """Bytes of headers replaced at random: it ends, and what is listed lies inside the file."""
    path = tmp_path_factory.mktemp("damaged") / "a.tar"
    write_tar(path, {f"{'long' * (i % 3) * 20}{i}é.jpg": b"z" * 100 * i for i in range(6)}, format=tarfile.PAX_FORMAT)
    spoiled = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 30))):
        block = data.draw(st.integers(0, len(spoiled) // BLOCK - 1))
        spoiled[block * BLOCK + data.draw(st.integers(0, BLOCK - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):  # checksums that hold, so that the rest is believed
        for start in range(0, len(spoiled), BLOCK):
            block = spoiled[start : start + 148] + b" " * 8 + spoiled[start + 156 : start + BLOCK]
            spoiled[start + 148 : start + 156] = b"%06o\0 " % sum(block)
    path.write_bytes(spoiled)
    found, _ = walk(path)
    for member in found:
        assert member.size >= 0
        assert member.reason or BLOCK <= member.offset <= member.offset + member.size <= len(spoiled)
