import threading

from service.ui.recent import RecentVerdicts


def test_the_newest_verdicts_come_first_and_old_ones_are_forgotten():
    recent = RecentVerdicts(kept=3)
    for label in "abcde":
        recent.add("call", label, 0.5, False)
    said = recent.summary()
    assert [verdict["label"] for verdict in said["verdicts"]] == ["e", "d", "c"]
    assert said["images"] == 5


def test_rates_are_those_of_the_last_seconds():
    now = [1000.0]
    recent = RecentVerdicts(window_seconds=60, clock=lambda: now[0])
    for second in range(120):
        now[0] = 1000.0 + second
        recent.add("page", "cat", 0.01, second % 2 == 0)
    said = recent.summary()
    assert (said["images"], said["flagged"]) == (120, 60)
    assert 59 <= said["images_in_window"] <= 61
    assert 29 <= said["flagged_in_window"] <= 31
    now[0] += 1000
    assert recent.summary()["images_in_window"] == 0


def test_nothing_seen_is_told_too():
    assert RecentVerdicts().summary()["verdicts"] == []


def test_threads_lose_no_verdict():
    recent = RecentVerdicts(kept=10)
    threads = [
        threading.Thread(target=lambda: [recent.add("call", "a", 0.5, True) for _ in range(500)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = recent.summary()
    assert (said["images"], said["flagged"]) == (2000, 2000)
