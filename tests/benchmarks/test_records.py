import json

import pytest

from benchmarks.records import record, recorded
from detector.errors import ArtifactError


def test_what_was_recorded_is_read_with_the_machine_beside_it(tmp_path):
    record(tmp_path / "new" / "row.json", {"seed": 1, "steps": (1, 2)}, {"accuracy": 0.5})

    assert recorded(tmp_path / "new" / "row.json", {"seed": 1, "steps": (1, 2)}) == {"accuracy": 0.5}
    assert "cores" in json.loads((tmp_path / "new" / "row.json").read_text())["machine"]


def test_nothing_recorded_is_none(tmp_path):
    assert recorded(tmp_path / "row.json", {"seed": 1}) is None


def test_a_record_of_something_else_is_refused(tmp_path):
    record(tmp_path / "row.json", {"seed": 1}, {"accuracy": 0.5})

    with pytest.raises(ArtifactError, match="expected .*row.json to be of .*'seed': 2.*got .*'seed': 1.*remove it"):
        recorded(tmp_path / "row.json", {"seed": 2})
