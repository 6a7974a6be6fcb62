import pytest
import torch
from safetensors.torch import save_file

from detector.errors import DataError
from detector.network.networks import build_network
from detector.network.weights import load_weights


@pytest.fixture
def network():
    return build_network("resnet8", 3, 10)


def saved(tmp_path, tensors):
    file = tmp_path / "w.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    return file


def test_weights_of_the_same_network_are_taken_whole_also_with_a_prefix(network, tmp_path):
    other = build_network("resnet8", 3, 10)
    for prefix in ("", "module."):
        torch.nn.init.zeros_(network.linear.weight)
        load_weights(network, saved(tmp_path, {prefix + k: v for k, v in other.state_dict().items()}))

        assert all(torch.equal(network.state_dict()[name], value) for name, value in other.state_dict().items())


def test_pixel_statistics_can_be_given_beside_the_file(network, tmp_path):
    weights = {name: value for name, value in network.state_dict().items() if not name.startswith("normalise.")}
    file = saved(tmp_path, weights)

    load_weights(network, file, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))

    assert network.normalise.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    with pytest.raises(DataError, match=r"got 2 missing \(normalise.mean; normalise.std\); pixel statistics can"):
        load_weights(network, file)
    with pytest.raises(DataError, match="expected 3 pixel means and deviations, got 1 and 1"):
        load_weights(network, file, mean=(0.5,), std=(0.5,))


def test_names_and_shapes_that_do_not_fit_are_told_in_one_line(network, tmp_path):
    weights = dict(network.state_dict())
    weights["linear.weight"] = torch.zeros(100, 64)
    weights["head.weight"] = weights.pop("linear.bias")

    with pytest.raises(DataError) as caught:
        load_weights(network, saved(tmp_path, weights))

    assert str(caught.value).endswith(
        "got 1 missing (linear.bias), 1 unknown (head.weight), "
        "1 of another shape (linear.weight is (100, 64) instead of (10, 64))"
    )


def test_what_is_no_safetensors_file_is_refused_in_one_line(network, tmp_path):
    (tmp_path / "w.pt").write_bytes(b"\x80\x02}q\x00.")

    for name in ("w.pt", "none.safetensors"):
        with pytest.raises(DataError, match="expected weights as safetensors in") as caught:
            load_weights(network, tmp_path / name)
        assert "\n" not in str(caught.value)
