import pytest

from detector.errors import RequestError
from detector.network.schedule import Schedule


def test_the_rate_warms_up_to_its_peak_and_falls_to_nothing():
    schedule = Schedule(epochs=10, learning_rate=0.2)
    rates = [schedule.rate_at(step / 1000) for step in range(1000)]

    assert max(rates) == pytest.approx(0.2, rel=1e-3)
    assert rates[0] < 0.03
    assert rates[100] == max(rates)
    assert rates[-1] < 1e-5


def test_each_cycle_is_a_whole_schedule_of_its_own():
    once, thrice = Schedule(epochs=10), Schedule(epochs=30, cycles=3)

    for cycle in range(3):
        for step in range(100):
            assert thrice.rate_at((cycle + step / 100) / 3) == pytest.approx(once.rate_at(step / 100), abs=1e-9)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Schedule(epochs=10, cycles=3), "expected cycles that divide 10 epochs, got 3"),
        (Schedule(epochs=10, cycles=0), "expected cycles that divide 10 epochs, got 0"),
        (Schedule(epochs=10, settling=1.0), "expected a share of the training to settle in \\[0, 1\\), got 1.0"),
        (Schedule(epochs=0), "expected at least 1 epoch"),
        (Schedule(epochs=1, learning_rate=float("nan")), "expected at least 1 epoch"),
    ],
)
def test_schedules_that_cannot_train_are_refused(schedule, message):
    with pytest.raises(RequestError, match=message):
        schedule.check()
