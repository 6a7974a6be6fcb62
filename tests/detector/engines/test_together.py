"""What the images of a batch take together is chosen by the clock alone."""

import numpy as np
import pytest
import torch

from detector.engines.choice import choose_engine, smooth_images
from detector.engines.kernel import GROUP, KernelEngine
from detector.engines.program import program_of
from detector.engines.together import choose_together, report
from detector.images import ImageSpec
from detector.network.decouple import decouple
from detector.network.networks import build_network
from tests.detector.engines.test_engines import needs_kernel

SPEC = ImageSpec(8, 8, 1)


def chosen(monkeypatch, milliseconds):
    """What is chosen where `milliseconds` gives the times of each step, of the steps that are taken together."""
    engine = KernelEngine(program_of(decouple(build_network("resnet8", 1, 4)), SPEC))
    asked = []

    def times(_self, images, ways, _repetitions=3):
        asked.append(len(images))
        return np.array([milliseconds(len(engine.program.steps), len(images), set(way)) for way in ways])

    monkeypatch.setattr(KernelEngine, "step_milliseconds", times)
    choose_together(engine, smooth_images(SPEC, GROUP))
    return engine, asked


def times(steps, images, faster, slower, together, scale=1.0):
    taken = np.full(steps, 1.0)
    taken[[step for step in faster if step in together]] = 0.5
    taken[[step for step in slower if step in together]] = 1.5
    return images * scale * taken


@needs_kernel
def test_the_steps_that_are_faster_so_are_taken_together(monkeypatch):
    engine, asked = chosen(monkeypatch, lambda steps, images, together: times(steps, images, [3, 8], [5], together))

    assert engine.together == (3, 8)
    assert asked == [1, GROUP, GROUP]
    assert report(engine).endswith(f"steps, up to {GROUP} images of a batch take these together: 4, 9")


@needs_kernel
def test_of_a_large_network_two_images_are_measured(monkeypatch):
    _, asked = chosen(monkeypatch, lambda steps, images, together: times(steps, images, [3], [], together, 100.0))

    assert asked == [1, 2, 2]


@needs_kernel
@pytest.mark.parametrize("saved", [0.0, 0.004])
def test_where_nothing_worth_it_is_saved_images_go_one_by_one(monkeypatch, saved):
    def milliseconds(steps, images, together):
        return images * np.where(np.arange(steps) == 3, 1.0 - saved * (3 in together) * steps, 1.0)

    engine, _ = chosen(monkeypatch, milliseconds)

    assert engine.together == ()
    assert "one by one" in report(engine)


@needs_kernel
def test_what_does_not_make_the_whole_faster_is_not_kept(monkeypatch):
    def milliseconds(steps, images, together):
        taken = times(steps, images, [3], [], together)
        return taken + (len(together) == 1)  # others lose what the one wins

    assert chosen(monkeypatch, milliseconds)[0].together == ()


@needs_kernel
def test_the_log_tells_what_was_chosen():
    chosen = choose_engine(decouple(build_network("resnet8", 1, 4)), SPEC, None, torch.device("cpu"))

    assert any(line.startswith("engine kernel: ") and "of a batch take" in line for line in chosen.report())
