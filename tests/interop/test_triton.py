"""NVIDIA's own client against this server, from an environment of its own: `make interop` builds it."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor

from detector.images import encode_png
from protos.inference import grpc_service_pb2 as ours
from service.server import running_server
from tests.service.conftest import QUICK
from tests.service.fakes import CLASSES, FakeDetector, bits_of, image_of

PYTHON = os.environ.get("TRITON_CLIENT_PYTHON", "")

pytestmark = pytest.mark.skipif(
    not PYTHON, reason="TRITON_CLIENT_PYTHON names no Python with tritonclient[grpc]; `make interop` makes one"
)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the server said to tritonclient."""
    folder = tmp_path_factory.mktemp("triton")
    np.save(folder / "pixels.npy", np.stack([image_of(7), image_of(3)]))
    (folder / "image.png").write_bytes(encode_png(image_of(7)))
    script = Path(__file__).with_name("triton_client.py")
    with running_server(FakeDetector(), QUICK) as target:
        finished = subprocess.run(
            [PYTHON, script, target, folder], capture_output=True, text=True, timeout=100, check=False
        )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.fixture(params=["sync", "aio"])
def client(request, said):
    return said[request.param]


ANSWERED = {
    "LABEL": [1, 0],
    "PROBS": [[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]],
    "ADV_SCORE": [7.0, 3.0],
    "P_VALUE": [0.08, 0.04],
    "ADV_VERDICT": [1, 2],
}
TWO_FILES = {name: [values[0]] * 2 for name, values in ANSWERED.items()}


def test_our_contract_is_the_one_that_the_client_was_made_with(said):
    theirs, file = said["contract"], ours.DESCRIPTOR
    service = file.services_by_name["GRPCInferenceService"]
    for method in service.methods:
        assert theirs[service.full_name][method.name] == [method.input_type.full_name, method.output_type.full_name]
    waiting: list[Descriptor | EnumDescriptor] = [
        *file.message_types_by_name.values(),
        *file.enum_types_by_name.values(),
    ]
    assert len(waiting) > 30
    while waiting:
        described = waiting.pop()
        if isinstance(described, EnumDescriptor):
            assert {value.name: value.number for value in described.values} == theirs[described.full_name]
            continue
        waiting += [*described.nested_types, *described.enum_types]
        for field in described.fields:
            assert theirs[described.full_name][field.name] == [field.number, field.type], field.full_name


def test_the_server_is_alive_and_says_what_it_is(client):
    assert (client["live"], client["ready"]) == (True, True)
    assert client["server"]["name"] == "pathguard"


def test_a_model_that_is_there_is_ready_and_another_is_not(said):
    assert said["sync"]["model_ready"] == [True, False]
    assert said["aio"]["model_ready"] is True


def test_metadata_config_and_index_are_told(client):
    metadata, config = client["metadata"], client["config"]
    assert [tensor["name"] for tensor in metadata["inputs"]] == ["IMAGES", "IMAGE_BYTES"]
    assert [int(size) for size in metadata["inputs"][0]["shape"]] == [-1, 4, 4, 3]
    assert [tensor["name"] for tensor in metadata["outputs"]] == [*ANSWERED, "PATH_ENCODING"]
    assert (config["max_batch_size"], config["input"][1]["optional"]) == (1024, True)
    assert json.loads(config["parameters"]["class_names"]["string_value"]) == list(CLASSES)
    assert client["index"]["models"] == [{"name": "fake", "version": "model-1", "state": "READY"}]


def test_pixels_are_answered_and_the_id_comes_back(said):
    assert said["sync"]["raw"] == {"id": "seven", **ANSWERED}
    assert said["aio"]["raw"] == [{"id": str(number), **ANSWERED} for number in range(20)]
    assert said["sync"]["async"] == list(range(20))


def test_files_are_answered_in_either_shape(said):
    for answer in (said["sync"]["files"], said["sync"]["files_in_a_column"], said["aio"]["files"]):
        assert answer == {"id": "", **TWO_FILES}


def test_every_output_can_be_asked_for(said):
    path = np.packbits(bits_of(np.array([7, 3])), axis=1).tolist()
    assert said["sync"]["all_outputs"] == {"id": "", **ANSWERED, "PATH_ENCODING": path}


def test_classes_are_named(said):
    assert said["sync"]["classes"] == [["0.500000:1:shoe", "0.250000:0:shirt"], ["0.500000:0:shirt", "0.250000:1:shoe"]]
    assert said["aio"]["classes"] == [["0.500000:1:shoe"], ["0.500000:0:shirt"]]


def test_version_priority_timeout_sequence_rate_headers_and_compression_are_taken(said):
    assert said["sync"]["options"] == {"id": "", **ANSWERED, "ADV_VERDICT": [2, 2]}


def test_a_bad_file_beside_a_good_one_has_no_label_and_never_looks_clean(said):
    answer = said["sync"]["bad_file_beside_a_good_one"]
    assert (answer["LABEL"], answer["ADV_VERDICT"], answer["P_VALUE"]) == ([-1, 1], [0, 1], [0.0, 0.08])


@pytest.mark.parametrize(
    ("case", "code", "text"),
    [
        ("model", "StatusCode.NOT_FOUND", "got 'other'"),
        ("file", "StatusCode.INVALID_ARGUMENT", "expected a JPEG, PNG or WebP file"),
        ("shape", "StatusCode.INVALID_ARGUMENT", "inputs[0].shape: expected [-1, 4, 4, 3]"),
        ("output", "StatusCode.INVALID_ARGUMENT", "outputs[0].name: expected each of LABEL"),
        ("shared_memory", "StatusCode.UNIMPLEMENTED", ""),
    ],
)
def test_a_refusal_says_why(said, case, code, text):
    status, message = said["sync"]["refused"][case]
    assert status == code
    assert text in message


def test_counts_and_times_are_told(client):
    counted = client["statistics"]
    stats = counted["inference_stats"]
    assert int(counted["inference_count"]) >= 53
    assert int(stats["success"]["count"]) >= 27
    assert int(stats["compute_infer"]["ns"]) > 0
    assert int(counted["execution_count"]) == sum(int(row["compute_infer"]["count"]) for row in counted["batch_stats"])
