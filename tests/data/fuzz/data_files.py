"""Targets: what `data index`, `data pack` and `data tile` write and read again, and tars."""

import json
import shutil
from pathlib import Path

import numpy as np
from data_support import write_scenes

from fuzz.mutations import mutate, mutate_tar, mutate_text, mutate_tree, seed_tar
from fuzz.target import Target, expect, judged
from pera_fast.data.decoding.probe import ProbeResult, ProbeSettings
from pera_fast.data.decoding.tar import TarDamageError, list_members, read_member
from pera_fast.data.files.manifest import Manifest, to_table
from pera_fast.data.files.shard_index import read_index
from pera_fast.data.files.shard_writer import index_name
from pera_fast.data.files.shards import list_shards, locate
from pera_fast.data.index.journal import Journal
from pera_fast.data.index.known import Known
from pera_fast.data.tools.pack import pack
from pera_fast.data.tools.pack_images import PackSettings
from pera_fast.data.tools.tile import tile
from pera_fast.data.tools.tile_grid import TileSettings


class Tars(Target):
    name = "tars"
    covers = "headers, long names, PAX records; listed, then every member read"

    def __init__(self, folder):
        super().__init__(folder)
        self._whole = seed_tar()

    def run(self, rng):
        path = self.case / "shard.tar"
        data = mutate_tar(self._whole, rng)
        path.write_bytes(data)
        outcome, count = "whole", 0
        try:
            for found in list_members(str(path)):
                count += 1
                expect(count < 1000, "members without end")
                expect(0 <= found.offset and found.size >= 0, f"no place: {found}")
                if not found.reason:
                    _read(path, found, data)
        except TarDamageError as error:
            expect("\n" not in str(error), f"no one line: {error}")
            outcome = "damaged"
        rows: list = []
        listing = list_shards(str(self.case), rows.append)
        expect(listing is not None and all(batch.num_columns for batch in rows), "the shard is not listed")
        return outcome


def _read(path: Path, found, data: bytes) -> None:
    try:
        content, state = read_member(locate(str(path.parent), f"{path.name}/x", found.offset, found.size), 2**20)
    except OSError as error:
        expect(error.errno is None, f"taken for a fault of the storage: {error}")
        return
    expect(content == data[found.offset : found.offset + found.size], f"other bytes than the tar has: {found}")
    expect(state.st_size == found.size, f"another size: {found}")


class ShardIndexes(Target):
    name = "shard-indexes"
    covers = "DALI's .idx beside a shard"

    def __init__(self, folder):
        super().__init__(folder)
        root = self.folder / "images"
        write_scenes(root, 5, 20, 24)
        pack(root, self.folder / "packed", PackSettings(), workers=1, progress=False)
        (self._tar,) = (self.folder / "packed").rglob("*.tar")
        self._text = Path(index_name(str(self._tar))).read_text()
        self._members = {(found.name, found.offset, found.size) for found in list_members(str(self._tar))}

    def run(self, rng):
        tar = self.case / self._tar.name
        shutil.copyfile(self._tar, tar)
        Path(index_name(str(tar))).write_bytes(mutate_text(self._text, rng))
        found = read_index(str(tar))
        if found is None:
            return "passed-over"
        for member in found:
            if (member.name, member.offset, member.size) not in self._members:
                _read(tar, member, tar.read_bytes())
        list_shards(str(self.case), lambda batch: None)
        return "read"


def _rows(count: int) -> list[ProbeResult]:
    return [
        ProbeResult(
            f"folder/{number:03d}.png", number % 5 != 4, "" if number % 5 != 4 else "Pillow: broken", "dali", "png",
            64 + number, 48, 3, "uint8", 1000 + number, 10**18 + number, -1, "",
        )
        for number in range(count)
    ]  # fmt: skip


class Manifests(Target):
    name = "manifests"
    covers = "index.parquet as Manifest.load, its stream, and the next index read it"

    def __init__(self, folder):
        super().__init__(folder)
        self._settings = ProbeSettings()
        whole = Manifest(
            Path("/data"), to_table(_rows(40)), self._settings, "2.4", decided={"depth": "8", "band_range": None}
        )
        whole.save(self.folder / "whole.parquet")
        self._whole, self._bytes = whole, (self.folder / "whole.parquet").read_bytes()

    def run(self, rng):
        path = self.case / "index.parquet"
        data = mutate(self._bytes, rng)
        path.write_bytes(data)

        def load() -> str:
            if data == self._bytes:
                return "unchanged"
            found = Manifest.load(path)
            same = found.table.equals(self._whole.table) and found.settings == self._settings
            same = same and (found.root, found.dali) == (self._whole.root, self._whole.dali)
            expect(same and found.decided == self._whole.decided, "other contents than were written")
            return "read"

        def again() -> str:
            for tables in Known(self._settings, "2.4").manifest(path, replace=False):
                _expect_rows(list(tables), self._whole)
            return "read"

        outcomes = {judged(load), judged(again)}
        return "-".join(sorted(outcomes))


def _expect_rows(tables: list, whole: Manifest) -> None:
    known = {row["path"]: row for row in whole.table.to_pylist()}
    for table in tables:
        for row in table.to_pylist():
            expect(known.get(row["path"]) == row, f"a row that nobody wrote: {row}")


class Journals(Target):
    name = "journals"
    covers = "the parts that a killed index leaves: mutated, cut, renamed"

    def __init__(self, folder):
        super().__init__(folder)
        self._settings = ProbeSettings()
        self._about = Path("/data"), self._settings, "2.4"
        self._whole = Manifest(Path("/data"), to_table(_rows(30)), self._settings, "2.4")

    def run(self, rng):
        target = self.case / "index.parquet"
        for attempt in range(2):
            with Journal(target, *self._about) as journal:
                journal.add(self._whole.table.slice(15 * attempt, 15))
        parts = sorted(journal.folder.iterdir())
        path = parts[int(rng.integers(len(parts)))]
        path.write_bytes(mutate(path.read_bytes(), rng))
        if rng.random() < 0.2:
            name = mutate(path.name.encode(), rng).replace(b"/", b"").replace(b"\0", b"")[:100]
            path.rename(path.parent / (name.decode("utf-8", "replace") or "x"))

        def read() -> str:
            with Journal(target, *self._about) as journal:
                for part in journal.earlier():
                    _expect_rows(list(Known(self._settings, "2.4").parts(part)), self._whole)
            return "read"

        return judged(read)


class ToolStates(Target):
    name = "tool-states"
    covers = "pack.json of `data pack`; the markers of `data tile`"

    def __init__(self, folder):
        super().__init__(folder)
        write_scenes(self.folder / "images", 3, 40, 40)
        self._jobs = {
            "pack": lambda out: pack(self.folder / "images", out, PackSettings(), workers=1, progress=False),
            "tile": lambda out: tile(self.folder / "images", out, TileSettings(size=32), workers=1, progress=False),
        }
        for name, job in self._jobs.items():
            job(self.folder / name)
        self._states = {
            name: [path for path in sorted((self.folder / name).rglob("*.json")) if not path.name.startswith("index")]
            for name in self._jobs
        }

    def run(self, rng):
        name = list(self._jobs)[int(rng.integers(2))]
        out = self.case / name
        shutil.copytree(self.folder / name, out)
        states = self._states[name]
        path = out / states[int(rng.integers(len(states)))].relative_to(self.folder / name)
        text = path.read_text()
        if rng.random() < 0.5:
            path.write_text(json.dumps(mutate_tree(json.loads(text), rng, _odd_json), default=str))
        else:
            path.write_bytes(mutate_text(text, rng))

        def go_on() -> str:
            self._jobs[name](out)
            return "done"

        return f"{name}-" + judged(go_on)


def _odd_json(value, rng: np.random.Generator):
    return str(value)[::-1] if isinstance(value, str) else None
