"""skipped.csv: every file once."""

import csv
import logging
import threading

from pera_fast.data.files.skipped import SkippedFiles


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_each_file_once_in_list_and_log(tmp_path, caplog):
    path = tmp_path / "skipped.csv"
    with caplog.at_level(logging.WARNING, "pera_fast"):
        skipped = SkippedFiles(path)
        assert not path.exists()
        assert skipped.add("a.jpg", "empty file")
        assert not skipped.add("a.jpg", "another reason")
        assert skipped.add('odd, "name"\n.jpg', "x")
    assert rows(path) == [["file", "reason"], ["a.jpg", "empty file"], ['odd, "name"\n.jpg', "x"]]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "skipped a.jpg: empty file" in caplog.text


def test_a_resumed_run_and_other_ranks_repeat_nothing(tmp_path):
    path = tmp_path / "skipped.csv"
    one, other = SkippedFiles(path), SkippedFiles(path)
    assert one.add("a", "1")
    assert not other.add("a", "1")
    assert other.add("b", "2")
    assert not one.add("b", "2")
    assert not SkippedFiles(path).add("a", "1")
    assert rows(path) == [["file", "reason"], ["a", "1"], ["b", "2"]]


def test_a_list_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    skipped = SkippedFiles(tmp_path / "no such folder" / "skipped.csv")
    assert skipped.add("a.jpg", "empty file")
    assert not skipped.add("a.jpg", "empty file")
    assert "skipped a.jpg: empty file" in caplog.text
    assert "No such file or directory" in caplog.text


def test_threads_share_it(tmp_path):
    skipped = SkippedFiles(tmp_path / "skipped.csv")
    threads = [
        threading.Thread(target=lambda: [skipped.add(f"{number}.jpg", "x") for number in range(50)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(row[0] for row in rows(skipped.path)[1:]) == sorted(f"{number}.jpg" for number in range(50))
