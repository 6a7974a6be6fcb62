import json

from benchmarks.report import Row, machine, print_rows, write_rows

ROWS = [
    Row(figure="fast", value=1.0, bar=2.0),
    Row(figure="slow", value=3.0, bar=2.0),
    Row(figure="sure", value=0.95, bar=0.9, at_most=False),
    Row(figure="unknown", value=None, bar=2.0),
    Row(figure="free", value=5.0),
]


def test_a_bar_is_met_from_its_own_side_and_not_judged_without_a_value():
    assert [row.met for row in ROWS] == [True, False, True, None, None]


def test_the_file_is_a_list_of_rows(tmp_path):
    write_rows(tmp_path / "rows.json", ROWS)

    rows = json.loads((tmp_path / "rows.json").read_text())

    assert [set(row) for row in rows] == [{"figure", "value", "bar", "met"}] * 5
    assert rows[3] == {"figure": "unknown", "value": None, "bar": 2.0, "met": None}


def test_the_table_names_the_machine_and_what_was_missed(capsys):
    print_rows("a title", ROWS)

    out = capsys.readouterr().out
    assert machine().split(",")[0] in out
    assert "NO" in out
    assert "not measured" in out
