from service.server import running_server
from tests.service.conftest import QUICK
from tests.service.fakes import FakeDetector
from torture.known import known_of_fake
from torture.load import load
from torture.report import Outcome


def test_right_answers_are_counted():
    outcome = Outcome(case="fine")
    with (
        running_server(FakeDetector(), QUICK) as target,
        load(target, known_of_fake(), outcome, callers=3, pause=0, calls_per_connection=5) as seen,
    ):
        assert seen.wait_for(30)
    assert outcome.problems == []
    assert outcome.figures["calls beside it"] >= 30


def test_answers_of_another_image_and_lost_calls_are_problems():
    class Confused(FakeDetector):
        def detect(self, pixels):
            pixels = pixels.copy()
            pixels[:, 0, 0, 0] += 1
            return super().detect(pixels)

    outcome = Outcome(case="confused")
    with (
        running_server(Confused(), QUICK) as target,
        load(target, known_of_fake(), outcome) as seen,
    ):
        seen.wait_for(3)
    assert "another image" in outcome.problems[0]


def test_nobody_at_all_is_a_problem():
    outcome = Outcome(case="nobody")
    with load("127.0.0.1:1", known_of_fake(), outcome) as seen:
        assert not seen.wait_for(1, seconds=0.5)
    assert any("UNAVAILABLE" in problem for problem in outcome.problems)
