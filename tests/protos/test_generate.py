import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from protos import generate


@pytest.fixture
def released():
    return FileDescriptorSet.FromString(generate.RELEASED.read_bytes())


def message(files, name):
    return next(message for file in files.file for message in file.message_type if message.name == name)


def complaints_against(files, tmp_path):
    image = tmp_path / "released.binpb"
    image.write_bytes(files.SerializeToString())
    return generate.complaints(image)


def test_code_is_as_the_contracts_give_it():
    assert generate.drifted() == []


def test_contracts_are_clean_and_break_no_client_of_the_release():
    assert generate.complaints() == ""


def test_a_field_that_a_client_of_the_release_may_set_cannot_go(released, tmp_path):
    message(released, "DetectRequest").field.add(name="gone", number=99, type=8, label=1)
    assert 'Previously present field "99" with name "gone"' in complaints_against(released, tmp_path)


def test_a_field_of_the_open_inference_protocol_cannot_change_its_type(released, tmp_path):
    shape = next(f for f in message(released, "ModelConfig").field if f.name == "max_batch_size")
    shape.type = 4
    assert 'changed type from "uint64" to "int32"' in complaints_against(released, tmp_path)


def test_a_field_that_is_new_since_the_release_breaks_nobody(released, tmp_path):
    image = message(released, "Image")
    del image.field[-1]
    assert complaints_against(released, tmp_path) == ""


def test_a_contract_that_protoc_refuses_ends_the_program(monkeypatch, tmp_path):
    monkeypatch.setattr(generate, "CONTRACTS", ("protos/missing.proto",))
    with pytest.raises(SystemExit):
        generate.generate(tmp_path)
