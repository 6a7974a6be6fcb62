import json

from torture.report import Outcome, all_passed, outcome_of, print_outcomes, write_outcomes


def test_a_case_passes_unless_something_was_wrong_or_it_did_not_run():
    good, bad, absent = Outcome(case="good"), Outcome(case="bad"), Outcome(case="absent", skipped="no disk")
    good.expect(True, "never")
    bad.expect(False, "one call was lost")
    assert [one.passed for one in (good, bad, absent)] == [True, False, None]
    assert all_passed([good, absent])
    assert not all_passed([good, bad])


def test_an_exception_is_a_problem_of_its_case_and_the_next_one_runs():
    with outcome_of("breaks") as outcome:
        raise RuntimeError("no server")
    assert outcome.problems == ["RuntimeError: no server"]
    assert outcome.seconds > 0


def test_the_file_and_the_table_tell_what_was_wrong(tmp_path, capsys):
    outcome = Outcome(case="a case", figures={"calls": 7, "share": 0.51234}, problems=["lost [one]"])
    write_outcomes(tmp_path / "new" / "outcomes.json", [outcome])
    print_outcomes("title", [outcome])

    (row,) = json.loads((tmp_path / "new" / "outcomes.json").read_text())
    assert row == {
        "case": "a case",
        "passed": False,
        "seconds": 0.0,
        "figures": {"calls": 7, "share": 0.51234},
        "problems": ["lost [one]"],
        "skipped": None,
    }
    out = capsys.readouterr().out
    assert "share 0.5123" in out
    assert "NO" in out
    assert "lost [one]" in out
