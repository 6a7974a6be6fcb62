import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cluster.packing import AnswerPacking, packed_pixels, unpacked_pixels
from detector.paths.path_encoding import PathEncoding
from detector.scoring.detections import Detections

sizes = st.integers(1, 5)
doubles = st.floats(width=64)


@given(st.data(), st.tuples(st.integers(0, 5), sizes, sizes, st.sampled_from([1, 3])))
def test_pixels_come_back_in_their_shape(data, shape):
    pixels = data.draw(arrays(np.uint8, shape))

    np.testing.assert_array_equal(unpacked_pixels(packed_pixels(pixels)), pixels, strict=True)


@given(st.data(), st.integers(0, 5), sizes, st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(0, 5))
def test_answers_come_back_to_the_last_bit(data, images, classes, widths, in_full):
    layers = {f"gate{place}": width for place, width in enumerate(widths)}
    told = Detections(
        data.draw(arrays(np.int64, images)),
        data.draw(arrays(np.float32, (images, classes))),
        data.draw(arrays(np.float64, images, elements=doubles)),
        data.draw(arrays(np.float64, images, elements=doubles)),
        PathEncoding(data.draw(arrays(np.bool_, (images, sum(widths)))), layers),
    )
    packing = AnswerPacking(classes, layers)

    found, found_in_full = packing.unpacked(packing.packed(told, in_full))

    assert found_in_full == in_full
    assert found.paths.layers == layers
    for name in ("labels", "probabilities", "scores", "p_values"):
        np.testing.assert_array_equal(getattr(found, name), getattr(told, name), strict=True)
    np.testing.assert_array_equal(found.paths.bits, told.paths.bits)
