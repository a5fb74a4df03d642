"""Places of image files: GeoTIFFs, members of shards, tiles by their JSON files; and files without one."""

import json
import tarfile

import numpy as np
import pytest
from data_support import encoded, raster, scene
from PIL import Image
from rasterio.transform import from_origin

from pera_fast.data.decoding.tar import Member, list_members
from pera_fast.data.decoding.worker_process import DiedError
from pera_fast.data.tools import file_places
from pera_fast.data.tools.file_places import FilePlace, FilePlaces, look

UTM = {"crs": "EPSG:32631", "transform": from_origin(500000, 5761000, 10, 10)}


def found(*files):
    return look([str(file) if not isinstance(file, Member) else file for file in files], lambda stage: None)


@pytest.fixture
def geotiff(tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(raster(np.zeros((3, 100, 200), np.uint8), **UTM))
    return path


def test_a_geotiff_lies_where_it_says(geotiff):
    (place,) = found(geotiff)
    assert (place.crs, place.bounds) == ("EPSG:32631", (500000, 5760000, 502000, 5761000))
    assert place.lon == pytest.approx(3 + 1000 / (111320 * np.cos(np.radians(52))), abs=1e-4)  # zone 31: from 3 degrees
    assert place.lat == pytest.approx(51.99, abs=0.02)


def test_a_member_of_a_shard_lies_where_its_file_did(geotiff, tmp_path):
    tar = tmp_path / "000.tar"
    with tarfile.open(tar, "w") as out:
        out.add(geotiff, "b.tif")
    (member,) = list_members(str(tar))
    assert found(Member(str(tar), member.name, member.offset, member.size)) == found(geotiff)


def test_files_without_a_place_have_none(tmp_path):
    (tmp_path / "plain.tif").write_bytes(raster(np.zeros((1, 8, 8), np.uint8)))
    (tmp_path / "crs.tif").write_bytes(raster(np.zeros((1, 8, 8), np.uint8), crs="EPSG:32631"))  # no transform
    (tmp_path / "cut.tif").write_bytes(raster(np.zeros((1, 8, 8), np.uint8), **UTM)[:50])
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(scene(0)), "PNG"))
    (tmp_path / "b.png").write_bytes(b"")
    files = [*sorted(tmp_path.iterdir()), tmp_path / "missing.tif"]
    assert found(*files) == [None] * 6


@pytest.mark.parametrize(
    ("bounds", "lon"), [((4.0, 51.0, 4.2, 51.2), 4.1), ((179.9, 51.0, -179.7, 51.2), -179.9), (None, None)]
)
def test_a_tile_lies_where_its_json_file_says(tmp_path, bounds, lon):
    image, about = tmp_path / "y0_x0.png", {"bounds_wgs84": bounds, "bounds": [1, 2, 3, 4], "crs": "EPSG:3857"}
    image.write_bytes(encoded(Image.fromarray(scene(0)), "PNG"))
    image.with_suffix(".json").write_text(json.dumps(about))
    (place,) = found(image)
    if lon is None:
        assert place is None
    else:
        assert place == FilePlace(pytest.approx(lon), pytest.approx(51.1), "EPSG:3857", (1, 2, 3, 4))


def test_a_file_that_ends_the_worker_costs_its_own_place_only(geotiff, monkeypatch):
    """Files of formats that hold no place are not even asked about."""
    asked = []

    class Worker:
        def __init__(self, module, timeout):
            pass

        def call(self, message):
            asked.append(list(message[0]))
            if any("hostile" in file for file in message[0]):
                raise DiedError("", "killed by SIGSEGV")
            return look(*message, lambda stage: None)

        def end(self):
            pass

        close = end

    monkeypatch.setattr(file_places, "WorkerProcess", Worker)
    with FilePlaces() as places:
        assert places(["a.jpg", "b.png"]) == [None, None]
        assert not asked
        one, none, two = places([str(geotiff), "hostile.tif", str(geotiff)])
    assert one == two == found(geotiff)[0]
    assert none is None


def test_the_worker_answers(geotiff):
    with FilePlaces() as places:
        assert places([str(geotiff)]) == found(geotiff)
