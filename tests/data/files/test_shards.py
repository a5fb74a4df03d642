"""Folders of shards: what is found in them, and training from them, also while they go bad."""

import dataclasses
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
from data_support import bad_files, good_files, shared_data, small_config, write_scenes
from loader_support import check_against, index, same, skipped_rows, take
from tar_support import add, png, write_shards, write_tar

from pera_fast.data.decoding.tar import list_members
from pera_fast.data.files import shards as shards_module
from pera_fast.data.files.shard_index import read_index
from pera_fast.data.files.shards import list_shards
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.index.build import load_index
from pera_fast.data.loading.loader import Loader
from pera_fast.data.tools.pack import PackSettings, pack

CPU = torch.device("cpu")
SHARDS, EACH = 4, 6
COUNT = SHARDS * EACH


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The 24 scenes of test_loader in 4 shards, with their index; read only."""
    folder = write_shards(tmp_path_factory.mktemp("shards"), SHARDS, EACH)
    return index(folder, tmp_path_factory.mktemp("index"))


@pytest.fixture
def own(tmp_path, shards):
    """A copy of the shards to spoil."""
    folder = tmp_path / "data"
    shutil.copytree(shards.root, folder)
    return dataclasses.replace(shards, root=folder)


@pytest.fixture
def load(tmp_path):
    opened = []

    def open_(manifest, *overrides, batch_size=4, **options):
        skipped = SkippedFiles(tmp_path / "skipped.csv")
        opened.append(
            Loader(small_config(*overrides), manifest, batch_size=batch_size, device=CPU, skipped=skipped, **options)
        )
        return opened[-1]

    yield open_
    for loader in opened:
        loader.close()


def rows_of(manifest):
    return {row["path"]: row for row in manifest.table.to_pylist()}


def member(number):
    return f"shard-{number // EACH}.tar/{number:03d}.png"


def test_the_manifest_names_shard_member_and_place(shards):
    again = load_index(shards.path)
    assert again.table.equals(shards.table)
    rows = again.table.to_pylist()
    assert [row["path"] for row in rows] == [member(number) for number in range(COUNT)]
    for number, row in enumerate(rows):
        with open(shards.root / f"shard-{number // EACH}.tar", "rb") as file:
            file.seek(row["offset"])
            assert file.read(row["size"]) == png(number)
        assert (row["ok"], row["decoder"], row["width"], row["height"]) == (True, "dali", 64, 48)


def test_a_folder_and_its_shards_give_the_same_batches(shards, tmp_path, load):
    """Samples are numbered alike, so order, crops and colours are the same to the bit."""
    write_scenes(tmp_path / "folder", COUNT)
    folder = index(tmp_path / "folder", tmp_path)
    assert all(map(same, take(load(folder), 14), take(load(shards), 14)))
    for start in (1, 5, 13):
        assert same(next(load(shards, start_micro_step=start)), next(load(folder, start_micro_step=start)))


def test_unchanged_shards_are_not_checked_again(own, tmp_path):
    out = tmp_path / "again"
    assert "24 checked" in index(own.root, out).summary
    assert "(24 known, 0 checked, 0 gone" in index(own.root, out).summary
    write_tar(own.root / "shard-1.tar", {"new.png": png(50)})
    manifest = index(own.root, out)
    assert "(18 known, 1 checked, 6 gone" in manifest.summary
    assert len(manifest.readable) == 19


def test_other_members_several_images_a_key_and_folders_of_shards(tmp_path):
    root = tmp_path / "data"
    write_tar(root / "train" / "a.tar", {"1.jpg": png(1), "1.cls": b"3", "1.seg.png": png(2), "note": b"hi"})
    write_tar(root / "train" / "b.tar", {"x/1.webp": png(3), "x/1.tif": png(4), "x/1.jpeg": png(5), "1.txt": b""})
    (root / "train" / "a.idx").write_text("v1.2 0\n")
    rows = rows_of(index(root, tmp_path))
    names = ["a.tar/1.jpg", "a.tar/1.seg.png", "b.tar/x/1.jpeg", "b.tar/x/1.tif", "b.tar/x/1.webp"]
    assert list(rows) == [f"train/{name}" for name in names]
    assert all(row["ok"] for row in rows.values())


def test_odd_names_and_every_kind_of_file(tmp_path, load):
    odd = {"with space.png": png(1), "line\nbreak.png": png(2), "日本/é.png": png(3), 'quote".tar/in,side.png': png(4)}
    root = tmp_path / "data"
    write_tar(root / "odd names.tar", odd)
    write_tar(root / "good.tar", {f"{name}.jpg": data for name, data in good_files().items()})
    write_tar(root / "bad.tar", {name: data for name, (data, _) in bad_files().items()})
    manifest = index(root, tmp_path)
    rows = rows_of(manifest)
    assert {name for name, row in rows.items() if not row["ok"]} == {f"bad.tar/{name}" for name in bad_files()}
    for name, (_, reason) in bad_files().items():
        assert reason in rows[f"bad.tar/{name}"]["reason"]
    count = len(odd) + len(good_files())
    batch = next(load(manifest, batch_size=count))
    assert sorted(batch.samples.tolist()) == list(range(count))
    assert set(skipped_rows(tmp_path)) == {f"bad.tar/{name}" for name in bad_files()}


def test_what_is_wrong_with_a_shard_or_member_is_told_and_the_rest_is_used(tmp_path):
    root = write_shards(tmp_path / "data", 2, 3)
    cut = (root / "shard-1.tar").read_bytes()
    (root / "shard-1.tar").write_bytes(cut[: len(cut) // 2])
    (root / "text.tar").write_bytes(b"no tar at all\n" * 100)
    (root / "empty.tar").write_bytes(b"")
    (root / "gone.tar").symlink_to(root / "nowhere.tar")
    (root / "loop").symlink_to(root)
    with tarfile.open(root / "hostile.tar", "w") as tar:
        add(tar, "../../up.png", png(1))
        add(tar, "link.png", type=tarfile.SYMTYPE, linkname="../shard-0.tar")
        add(tar, "twice.png", png(2))
        add(tar, "twice.png", png(3))
        add(tar, "caf\udce9.png", png(4))
        add(tar, "bomb.png", png(5, 200, 300))
    rows = rows_of(index(root, tmp_path, max_pixels=50_000))
    reasons = {name: row["reason"] for name, row in rows.items() if not row["ok"]}
    assert "1 image(s) stand before that" in reasons.pop("shard-1.tar")
    assert "not a tar file" in reasons.pop("text.tar")
    assert "ends after 0 bytes" in reasons.pop("empty.tar")
    assert reasons.pop("gone.tar") == "cannot read: No such file or directory"
    assert reasons.pop("hostile.tar/../../up.png") == "has a name with .."
    assert reasons.pop("hostile.tar/link.png") == "is a link"
    assert reasons.pop("hostile.tar/caf\\xe9.png") == "name is not UTF-8"
    assert reasons.pop("hostile.tar/bomb.png") == "300 x 200 is more than data.max_pixels=50000"
    (again,) = reasons
    assert again.startswith("hostile.tar/twice.png (at byte")
    good = {f"shard-0.tar/{number:03d}.png" for number in range(3)} | {"shard-1.tar/003.png", "hostile.tar/twice.png"}
    assert {name for name, row in rows.items() if row["ok"]} == good


def test_a_member_that_kills_its_decoder(tmp_path, load):
    name = "openjpeg-data__26ccf3651020967f7778238ef5af08af.SIGFPE.d25.527.jp2"
    killer = (shared_data() / "odd" / name).read_bytes()
    write_tar(tmp_path / "data" / "a.tar", {"1.png": png(1), "2.jp2": killer, "3.png": png(3)})
    manifest = index(tmp_path / "data", tmp_path)
    assert "DALI: killed by SIGFPE" in rows_of(manifest)["a.tar/2.jp2"]["reason"]
    assert sorted(next(load(manifest, batch_size=2)).samples.tolist()) == [0, 1]


def test_images_beside_tars_are_what_is_trained_on(tmp_path, caplog):
    write_tar(tmp_path / "data" / "a.tar", {"1.png": png(1)})
    write_scenes(tmp_path / "data" / "unpacked", 2)
    assert list(rows_of(index(tmp_path / "data", tmp_path))) == ["unpacked/000.png", "unpacked/001.png"]
    assert "the tar files are left alone" in caplog.text
    assert list_shards(str(tmp_path / "data" / "unpacked"), lambda batch: None) is None


def spoil_cut(path):
    """The second shard ends in the middle."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return set(range(9, 12))


def spoil_gone(path):
    path.unlink()
    return set(range(6, 12))


def spoil_garbage(path):
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))
    return set(range(6, 12))


def spoil_replaced(path):
    """By a shard whose members lie elsewhere."""
    write_tar(path, {f"{i}.png": png(i, 30 + i, 50) for i in range(12)})
    return set(range(6, 12))


def spoil_one_member_unnoticed(path):
    """Bytes of one member's content, time put back: only DALI's exception tells."""
    state, data = path.stat(), bytearray(path.read_bytes())
    start = data.index(b"IDAT", data.index(b"007.png"))
    data[start : start + 300] = bytes(300)
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    return {7}


def spoil_pipe(path):
    path.unlink()
    os.mkfifo(path)
    return set(range(6, 12))


@pytest.mark.parametrize(
    "spoil", [spoil_cut, spoil_gone, spoil_garbage, spoil_replaced, spoil_one_member_unnoticed, spoil_pipe]
)
def test_shards_that_go_bad_lose_their_samples_and_nothing_else_changes(own, load, tmp_path, spoil):
    reference = take(load(own), 12)
    unusable = spoil(own.root / "shard-1.tar")
    check_against(reference, take(load(own), 12), unusable)
    assert set(skipped_rows(tmp_path)) == {member(number) for number in unusable}


def test_a_shard_that_was_touched_or_rewritten_alike_is_used_as_before(own, load, tmp_path):
    reference = take(load(own), 6)
    os.utime(own.root / "shard-0.tar", ns=(1, 1))
    content = (own.root / "shard-2.tar").read_bytes()
    (own.root / "shard-2.tar").unlink()
    (own.root / "shard-2.tar").write_bytes(content)
    assert all(map(same, reference, take(load(own), 6)))
    assert skipped_rows(tmp_path) == {}


def test_an_index_beside_a_shard_replaces_the_walk_only_where_it_fits(tmp_path, monkeypatch):
    write_scenes(tmp_path / "images", 8)
    pack(tmp_path / "images", tmp_path / "shards", PackSettings(), progress=False)
    tar, idx = (tmp_path / "shards" / f"shard-000000.{suffix}" for suffix in ("tar", "idx"))
    walked = list(list_members(str(tar)))
    assert read_index(str(tar)) == walked
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "list_members", None)  # is not called
        assert len(index(tmp_path / "shards", tmp_path).readable) == 8

    text, content = idx.read_text(), tar.read_bytes()
    for wrong in (
        "",
        "v1.1" + text[4:],
        text.replace("v1.2 8", "v1.2 9"),
        text[: text.rindex("png")].rstrip("\n") + "\n",  # a sample less
        text.replace(" 000000000.png", " other.png"),
        text.replace("png 512 ", "png 1024 "),
        text.replace("png 512 ", "png -512 "),
        text.replace(".png json", ".png  json"),
        "\0\xff",
    ):
        idx.write_text(wrong)
        assert read_index(str(tar)) is None, wrong[:60]
    idx.write_text(text)
    tar.write_bytes(content[:-20480])
    assert read_index(str(tar)) is None, "a shard cut short"
    tar.write_bytes(content)
    idx.unlink()
    assert read_index(str(tar)) is None
    idx.write_text(text.replace(" 000000001.png", " ../00001.png"))
    assert [member.reason for member in read_index(str(tar)) if member.reason] == ["has a name with .."]


def test_a_wrong_line_in_an_index_costs_its_sample(tmp_path, load):
    write_scenes(tmp_path / "images", 8)
    pack(tmp_path / "images", tmp_path / "shards", PackSettings(), progress=False)
    idx = tmp_path / "shards" / "shard-000000.idx"
    lines = idx.read_text().splitlines()
    words = lines[4].split(" ")
    words[1] = str(int(words[1]) + 512)
    lines[4] = " ".join(words)
    idx.write_text("\n".join(lines) + "\n")
    manifest = index(tmp_path / "shards", tmp_path)
    assert len(manifest.readable) == 7
    ((name, reason),) = manifest.unreadable()
    assert name == "shard-000000.tar/000000003.png"
    assert "something else at this place" in reason
