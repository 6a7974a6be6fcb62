import logging
import os

import pytest

from service.errors import SettingsFileError
from service.kept_files import KeptFiles


def parse(contents):
    if b"bad" in contents:
        raise SettingsFileError("expected good, got bad")
    return b"+".join(contents)


@pytest.fixture
def paths(tmp_path):
    paths = [tmp_path / "one", tmp_path / "two"]
    for path in paths:
        path.write_bytes(path.name.encode())
    return paths


def test_a_change_is_taken_at_the_next_look(paths):
    seen = []
    kept = KeptFiles("letters", paths, parse, lambda *what: seen.append(what))
    assert (kept.value, kept.refresh()) == (b"one+two", False)
    paths[1].write_bytes(b"three")
    assert (kept.refresh(), kept.value, kept.refresh()) == (True, b"one+three", False)
    assert seen == [("letters", True)]


def test_what_is_wrong_is_told_once_and_the_last_good_value_stays(paths, caplog):
    seen = []
    kept = KeptFiles("letters", paths, parse, lambda *what: seen.append(what))
    paths[1].write_bytes(b"bad")
    with caplog.at_level(logging.WARNING):
        assert [kept.refresh() for _ in range(3)] == [False] * 3
    assert kept.value == b"one+two"
    assert [record.message for record in caplog.records] == [
        "letters not taken, the last good one goes on: expected good, got bad"
    ]
    paths[1].unlink()
    assert (kept.refresh(), kept.value) == (False, b"one+two")
    paths[1].write_bytes(b"three")
    assert (kept.refresh(), kept.value) == (True, b"one+three")
    assert seen == [("letters", False), ("letters", False), ("letters", True)]


def test_a_file_that_was_only_touched_is_no_change(paths):
    kept = KeptFiles("letters", paths, parse)
    os.utime(paths[0], (1, 1))
    assert (kept.refresh(), kept.refresh()) == (False, False)


def test_a_file_that_is_missing_or_wrong_at_the_start_is_told(paths):
    paths[0].write_bytes(b"bad")
    with pytest.raises(SettingsFileError, match="expected good, got bad"):
        KeptFiles("letters", paths, parse)
    paths[0].unlink()
    with pytest.raises(SettingsFileError, match="expected a file of letters that can be read, got .*one: No such file"):
        KeptFiles("letters", paths, parse)
