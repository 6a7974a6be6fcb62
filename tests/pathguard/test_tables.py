import json
from dataclasses import dataclass

from pathguard.tables import Figure, row_of, show


@dataclass
class Inner:
    open: float
    live: int


@dataclass
class Outer:
    name: str
    gates: Inner


def test_a_nested_value_becomes_one_flat_row():
    assert row_of(Outer("a", Inner(0.5, 3))) == {"name": "a", "open": 0.5, "live": 3}


def test_json_is_a_list_of_rows_in_which_what_is_not_finite_is_null(capsys):
    show("title", [{"name": "a", "value": float("nan"), "flag": True}], as_json=True)

    assert json.loads(capsys.readouterr().out) == [{"name": "a", "value": None, "flag": True}]


def test_a_long_file_name_is_folded_and_never_cut_short(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    name = "/photos/" + "x" * 60 + ".png"

    show("", [{"file": name, "label": "cat", "score": 0.5}])

    letters = "".join(capsys.readouterr().out.split())
    assert letters.count("x") == 60
    assert "…" not in letters


def test_a_table_shows_every_value_for_a_person(capsys):
    show("a title", [{"name": "a", "some_value": 0.25, "flag": True, "none": None}])

    out = capsys.readouterr().out
    assert "a title" in out
    assert "some value" in out
    assert "0.2500" in out
    assert "yes" in out


def test_a_number_with_its_unit_stands_on_the_right_like_other_numbers(capsys):
    show("", [{"share": Figure("7.5%"), "name": "a"}, {"share": Figure("100.0%"), "name": "b"}])

    assert "    7.5%   a" in capsys.readouterr().out


def test_a_lone_row_of_many_columns_stands_upright(capsys):
    show("one", [{**{f"column{place}": place for place in range(9)}, "images": {"cw": 3, "pgd": 4}, "none": {}}])

    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[1] == ["column0", "0"]
    assert lines[-2:] == [["images", "cw", "3,", "pgd", "4"], ["none", "none"]]


def test_a_table_of_few_rows_and_many_columns_is_printed_on_its_side(capsys):
    row = {f"attack_{place}": place for place in range(9)}

    show("", [{"detector": "bits", **row}, {"detector": "gates", **row}])

    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip(" ─")]
    assert lines[0] == ["detector", "bits", "gates"]
    assert lines[1:] == [["attack", str(place), str(place), str(place)] for place in range(9)]


def test_a_narrow_terminal_gets_all_columns_of_such_a_table_in_parts(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    row = {f"attack_{place}": 0.25 for place in range(18)}

    show("", [{"detector": f"detector-{place}", **row} for place in range(8)])

    words = capsys.readouterr().out.split()
    assert [word for word in words if word.startswith("detector-")] == [f"detector-{place}" for place in range(8)]
    assert words.count("0.2500") == 8 * 18


def test_a_title_wider_than_its_table_stands_on_one_line(capsys):
    title = "medians over what fooled, passes of each image"

    show(title, [{"name": "a", "value": 1}])

    assert capsys.readouterr().out.splitlines()[0] == title
