import numpy as np
import pytest

from detector.scoring.detections import Detections
from service.errors import AnswerError
from service.model import ask, smallest_false_alarm_rate
from tests.service.fakes import FakeDetector, bits_of, image_of


def test_each_image_gets_its_own_answer():
    answers = ask(FakeDetector(), [image_of(3), image_of(7)])

    assert [(answer.label, answer.score, answer.p_value) for answer in answers] == [(0, 3.0, 0.04), (1, 7.0, 0.08)]
    assert answers[1].probabilities == [0.25, 0.5, 0.25]
    assert answers[1].path == np.packbits(bits_of(np.array([7]))).tobytes()


@pytest.mark.parametrize(("score", "p_value"), [(np.nan, 0.5), (1.0, np.nan), (np.inf, 0.5), (1.0, 0.0), (1.0, 1.5)])
def test_an_answer_that_is_no_number_does_not_pass_for_clean(score, p_value):
    class Broken(FakeDetector):
        def detect(self, pixels):
            fine = super().detect(pixels)
            return Detections(fine.labels, fine.probabilities, np.array([score]), np.array([p_value]), fine.paths)

    with pytest.raises(AnswerError, match=r"expected a score and a p-value in \(0, 1\]"):
        ask(Broken(), [image_of(1)])


def test_the_smallest_rate_is_one_image_of_the_calibration_and_this_one():
    assert smallest_false_alarm_rate(FakeDetector()) == 0.01
