"""`similar`: the nearest are the nearest, queries of every kind, and the contact sheet."""

import embed_support as support
import numpy as np
import pyarrow.parquet as pq
import pytest
from data_support import write_scenes
from embed_support import images, run
from PIL import Image
from tar_support import write_shards

from pera_fast import cli
from pera_fast.embed import query as query_module
from pera_fast.embed.contact import CELL
from pera_fast.embed.nearest import kilometers, nearest
from pera_fast.embed.similar import similar
from pera_fast.embed.table import vectors_of
from pera_fast.errors import UserError

pytest.importorskip("nvidia.dali")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Indexes go to a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "images"
    root.mkdir()
    images(root)
    return root


@pytest.fixture(scope="module")
def table(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("table") / "out.parquet"
    run(folder, out)
    return out


def ranking(table, query: np.ndarray, without=()) -> list[str]:
    """Paths by cosine similarity, restated."""
    stored = pq.read_table(table)
    vectors = vectors_of(stored).astype(float)
    scores = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    paths = stored["path"].to_pylist()
    return [paths[row] for row in np.argsort(-scores) if paths[row] not in without]


def vector(table, path: str) -> np.ndarray:
    stored = pq.read_table(table)
    return vectors_of(stored)[stored["path"].to_pylist().index(path)].astype(float)


@pytest.mark.parametrize("k", [1, 7, 1000])
@pytest.mark.parametrize("pieces", [1, 5, 40])
def test_nearest_of_pieces_is_the_nearest_of_all(k, pieces):
    rng = np.random.default_rng(0)
    vectors, query = rng.standard_normal((120, 8)).astype(np.float16), rng.standard_normal(8)
    vectors[7] = 0
    vectors[100] = vectors[3]  # equals: the earlier one first
    without = [0, 50, 119]
    rows, scores = nearest(np.array_split(vectors, pieces), query, k, without)
    whole = vectors.astype(np.float32)
    lengths = np.maximum(np.linalg.norm(whole, axis=1), 1e-12)
    cosine = whole @ query.astype(np.float32) / lengths / np.linalg.norm(query)
    order = [row for row in np.lexsort((np.arange(120), -cosine.round(6))) if row not in without][:k]
    assert rows.tolist() == order
    assert scores == pytest.approx(cosine[order], abs=1e-5)


def test_kilometers():
    lon, lat = np.array([0.0, 179.0, 4.9, np.nan]), np.array([0.0, 0.0, 52.37, 0.0])
    away = kilometers(lon, lat, (-179.0, 0.0))
    assert away[1] == pytest.approx(2 * 111.19, rel=1e-3)  # across the date line
    assert np.isnan(away[3])
    assert kilometers(lon, lat, (13.4, 52.52))[2] == pytest.approx(577, abs=3)  # Amsterdam to Berlin


def test_an_embedded_image_needs_no_weights(folder, table, tmp_path, monkeypatch):
    monkeypatch.setattr(query_module, "load_backbone", None)
    found = similar(str(folder / "plain" / "003.png"), table, tmp_path / "sheet.png", k=4)
    expected = ranking(table, vector(table, "plain/003.png"), ["plain/003.png"])[:4]
    assert [each.path for each in found] == expected
    assert found[0].score >= found[1].score >= found[2].score
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width > 5 * CELL
    assert sheet.height > 2 * CELL
    first = np.asarray(sheet).reshape(-1, 3)
    assert len(np.unique(first, axis=0)) > 1000  # pictures, not empty cells


def test_a_folder_is_the_mean_of_its_images(folder, table, tmp_path):
    """Each counts alike, and none of them is found."""
    found = similar(str(folder / "geo"), table, tmp_path / "sheet.html", k=50)
    vectors = [vector(table, path) for path in support.PLACES]
    mean = sum(each / np.linalg.norm(each) for each in vectors)
    assert [each.path for each in found] == ranking(table, mean, list(support.PLACES))
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3 + 7
    assert "geo/a.tif (3.00" in page
    assert 'src="http' not in page


def test_images_from_elsewhere_are_embedded(folder, table, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "copy.png").write_bytes((folder / "plain" / "002.png").read_bytes())
    for query in (elsewhere / "copy.png", elsewhere):
        found = similar(str(query), table, tmp_path / "sheet.png", k=2, overwrite=True)
        assert found[0].path == "plain/002.png"
        assert found[0].score == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("point", "path"), [("3.01,51.99", "geo/a.tif"), ("-75,51.99", "geo/c.tif"), ("359,52", "geo/a.tif")]
)
def test_a_point_is_the_image_nearest_to_it(table, tmp_path, capsys, point, path):
    """Also in the western hemisphere, where it looks like an option."""
    line = ["similar", point, "--embeddings", str(table), "--out", str(tmp_path / "sheet.png"), "-k", "3"]
    assert cli.run(line) == 0
    told = capsys.readouterr().out.splitlines()
    assert [row.split()[1] for row in told[:3]] == ranking(table, vector(table, path), [path])[:3]
    assert told[3] == f"contact sheet: {tmp_path / 'sheet.png'}"


def test_images_may_have_moved(folder, table, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "plain").symlink_to(folder / "plain")
    found = similar(str(moved / "plain" / "003.png"), table, tmp_path / "a.html", k=9, images=moved)
    assert len(found) == 9
    assert (tmp_path / "a.html").read_text().count("cannot be read") == 3  # the GeoTIFFs


def test_images_of_shards_are_shown(tmp_path):
    root = write_shards(tmp_path / "shards", 2, 2)
    run(root, tmp_path / "out.parquet")
    write_scenes(tmp_path / "plain", 1)
    found = similar(str(tmp_path / "plain" / "000.png"), tmp_path / "out.parquet", tmp_path / "a.html", k=4)
    assert found[0].path == "shard-0.tar/000.png"
    assert (tmp_path / "a.html").read_text().count("data:image/jpeg;base64,") == 1 + 4


def test_wrong_inputs_get_one_line(folder, table, tmp_path):
    plain = tmp_path / "plain.parquet"
    pq.write_table(pq.read_table(table).select(["path"]).replace_schema_metadata(None), plain)
    here = tmp_path / "here"
    write_scenes(here, 1)
    run(here, tmp_path / "placeless.parquet")
    (tmp_path / "empty").mkdir()
    query, sheet = str(folder / "plain" / "000.png"), tmp_path / "sheet.png"
    for told, arguments, options in [
        ("no such image or folder, and no point such as", ("nowhere.png", table, sheet), {}),
        ("longitude is -180 to 180 and latitude -90 to 90", ("10,95", table, sheet), {}),
        ("holds no image", (str(tmp_path / "empty"), table, sheet), {}),
        ("wants a name that ends in .png or .html", (query, table, tmp_path / "sheet.gif"), {}),
        ("-k 0: wants 1 to 500 images", (query, table, sheet), {"k": 0}),
        ("no such file", (query, tmp_path / "no.parquet", sheet), {}),
        ("holds no paths; give the .parquet file", (query, tmp_path / "out.npy", sheet), {}),
        ("not embeddings of this version of pera-fast", (query, plain, sheet), {}),
        ("are not those of", (str(here / "000.png"), table, sheet), {"weights": "random:vit_s16"}),
        ("none of its images has a place", ("3,52", tmp_path / "placeless.parquet", sheet), {}),
        ("holds no image but the query's", (str(here), tmp_path / "placeless.parquet", sheet), {}),
        ("no such folder", (query, table, sheet), {"images": "nowhere"}),
    ]:
        with pytest.raises(UserError) as error:
            similar(*arguments, **options)
        assert told in str(error.value)
        assert "\n" not in str(error.value)
    assert not sheet.exists()
