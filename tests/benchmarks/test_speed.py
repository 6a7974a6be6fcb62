from benchmarks.speed import Kept


def test_what_was_measured_is_read_again_and_not_measured(tmp_path):
    Kept(tmp_path, 1, anew=False, quick=False).measured("network", lambda: {"ms": 1.5})

    again = Kept(tmp_path, 1, anew=False, quick=False).measured("network", lambda: {"ms": 2.5})

    assert again == {"ms": 1.5}


def test_other_threads_other_subjects_and_leave_to_measure_anew_measure_anew(tmp_path):
    Kept(tmp_path, 1, anew=False, quick=False).measured("network", lambda: {"ms": 1.5}, "a")

    for kept, subject in (
        (Kept(tmp_path, 2, anew=False, quick=False), "a"),
        (Kept(tmp_path, 1, anew=False, quick=False), "b"),
        (Kept(tmp_path, 1, anew=True, quick=False), "a"),
    ):
        assert kept.measured("network", lambda: {"ms": 2.5}, subject) == {"ms": 2.5}


def test_a_quick_run_neither_keeps_nor_reads(tmp_path):
    Kept(tmp_path, 1, anew=False, quick=True).measured("network", lambda: {"ms": 1.5})

    assert not list(tmp_path.iterdir())
