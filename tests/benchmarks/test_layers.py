"""Each layer of a batch is timed in every way."""

import pytest

from benchmarks import layers
from detector.engines.choice import smooth_images
from detector.engines.program import program_of
from detector.images import ImageSpec
from detector.network.decouple import decouple
from detector.network.networks import build_network
from tests.detector.engines.test_engines import needs_kernel


@needs_kernel
def test_each_layer_has_a_row_and_the_faster_way_takes_no_longer():
    spec = ImageSpec(8, 8, 1)
    network = decouple(build_network("resnet8", 1, 4)).eval()

    found = layers.measure(program_of(network, spec), smooth_images(spec, 3), 2)
    rows = {row.figure.split(": ")[1]: row.value for row in layers.rows_of("resnet8", found, 3)}

    assert [row["layer"].split()[0] for row in found] == ["convolution"] * 7 + ["linear", "gates"]
    assert rows[layers.ALONE] == pytest.approx(sum(row[layers.ALONE] for row in found))
    assert rows["the faster way of each step, ms"] <= min(rows[layers.ALONE], rows[layers.TOGETHER])
