"""All of tritonclient's gRPC surface that this server answers: `python triton_client.py TARGET FOLDER`.

Runs in an environment of its own, with protobuf below 7, and never in a process with our stubs: both define the same
messages. Prints what the server said as JSON; `test_triton.py` judges it. FOLDER has `pixels.npy` and `image.png`.
"""

import asyncio
import json
import queue
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException

MODEL = "fake"
OUTPUTS = ("LABEL", "PROBS", "ADV_SCORE", "P_VALUE", "ADV_VERDICT", "PATH_ENCODING")


def pixels_input(pixels):
    """IMAGES as tritonclient sends it."""
    tensor = triton.InferInput("IMAGES", list(pixels.shape), "UINT8")
    tensor.set_data_from_numpy(pixels)
    return [tensor]


def files_input(files, shape):
    """IMAGE_BYTES as tritonclient sends it."""
    tensor = triton.InferInput("IMAGE_BYTES", shape, "BYTES")
    tensor.set_data_from_numpy(np.array(files, dtype=np.object_).reshape(shape))
    return [tensor]


def answered(result, names=OUTPUTS[:5]):
    """The outputs as lists, and the id that came back."""
    return {"id": result.get_response().id, **{name: result.as_numpy(name).tolist() for name in names}}


def classified(result):
    """Texts of the most probable classes."""
    return [[text.decode() for text in row] for row in result.as_numpy("PROBS")]


def refused(call):
    """The code and text of an error, or nothing."""
    try:
        call()
    except InferenceServerException as error:
        return [error.status(), error.message()]
    return None


def sync_part(target, pixels, file):
    """Everything with the blocking client."""
    with triton.InferenceServerClient(target) as client:
        said = {
            "live": client.is_server_live(),
            "ready": client.is_server_ready(),
            "model_ready": [client.is_model_ready(MODEL), client.is_model_ready("other")],
            "server": client.get_server_metadata(as_json=True),
            "metadata": client.get_model_metadata(MODEL, as_json=True),
            "config": client.get_model_config(MODEL, as_json=True)["config"],
            "index": client.get_model_repository_index(as_json=True),
            "raw": answered(client.infer(MODEL, pixels_input(pixels), request_id="seven")),
            "files": answered(client.infer(MODEL, files_input([file, file], [2]))),
            "files_in_a_column": answered(client.infer(MODEL, files_input([file, file], [2, 1]))),
            "all_outputs": answered(
                client.infer(
                    MODEL, pixels_input(pixels), outputs=[triton.InferRequestedOutput(name) for name in OUTPUTS]
                ),
                OUTPUTS,
            ),
            "classes": classified(
                client.infer(MODEL, pixels_input(pixels), outputs=[triton.InferRequestedOutput("PROBS", class_count=2)])
            ),
            "options": answered(
                client.infer(
                    MODEL,
                    pixels_input(pixels),
                    model_version="model-1",
                    priority=2,
                    timeout=5_000_000,
                    client_timeout=30.0,
                    sequence_id=3,
                    sequence_start=True,
                    parameters={"max_false_alarm_rate": 0.08},
                    headers={"x-request-id": "mine"},
                    compression_algorithm="gzip",
                )
            ),
            "bad_file_beside_a_good_one": answered(client.infer(MODEL, files_input([b"text", file], [2]))),
            "refused": {
                "model": refused(lambda: client.infer("other", pixels_input(pixels))),
                "file": refused(lambda: client.infer(MODEL, files_input([b"text"], [1]))),
                "shape": refused(lambda: client.infer(MODEL, pixels_input(pixels[:, :2]))),
                "output": refused(
                    lambda: client.infer(MODEL, pixels_input(pixels), outputs=[triton.InferRequestedOutput("X")])
                ),
                "shared_memory": refused(client.get_system_shared_memory_status),
            },
        }
        results = queue.Queue()
        for number in range(20):
            client.async_infer(
                MODEL,
                pixels_input(pixels),
                callback=lambda result, error: results.put((result, error)),
                request_id=str(number),
            )
        done = [results.get(timeout=30) for _ in range(20)]
        said["async"] = sorted(int(result.get_response().id) for result, error in done if error is None)
        said["statistics"] = client.get_inference_statistics(MODEL, as_json=True)["model_stats"][0]
    return said


async def aio_part(target, pixels, file):
    """The same with the client for asyncio, as far as it differs."""
    async with triton_aio.InferenceServerClient(target) as client:
        results = await asyncio.gather(
            *(client.infer(MODEL, pixels_input(pixels), request_id=str(number)) for number in range(20))
        )
        first = await client.infer(
            MODEL, pixels_input(pixels), outputs=[triton.InferRequestedOutput("PROBS", class_count=1)], priority=1
        )
        return {
            "live": await client.is_server_live(),
            "ready": await client.is_server_ready(),
            "model_ready": await client.is_model_ready(MODEL, "model-1"),
            "server": await client.get_server_metadata(as_json=True),
            "metadata": await client.get_model_metadata(MODEL, as_json=True),
            "config": (await client.get_model_config(MODEL, as_json=True))["config"],
            "index": await client.get_model_repository_index(as_json=True),
            "statistics": (await client.get_inference_statistics(as_json=True))["model_stats"][0],
            "raw": [answered(result) for result in results],
            "files": answered(await client.infer(MODEL, files_input([file, file], [2]), timeout=5_000_000)),
            "classes": classified(first),
        }


def contract():
    """The fields of all messages and the values of all enums that tritonclient was made with."""
    found = {}
    for module in (service_pb2, model_config_pb2):
        described = module.DESCRIPTOR
        waiting = [*described.message_types_by_name.values()]
        enums = [*described.enum_types_by_name.values()]
        while waiting:
            message = waiting.pop()
            waiting += message.nested_types
            enums += message.enum_types
            fields = {field.name: [field.number, field.type] for field in message.fields}
            found[message.full_name] = fields
        for enum in enums:
            found[enum.full_name] = {value.name: value.number for value in enum.values}
    service = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    found[service.full_name] = {
        method.name: [method.input_type.full_name, method.output_type.full_name] for method in service.methods
    }
    return found


def main(target, folder):
    """Asks everything and prints the answers."""
    pixels, file = np.load(Path(folder) / "pixels.npy"), (Path(folder) / "image.png").read_bytes()
    said = {
        "sync": sync_part(target, pixels, file),
        "aio": asyncio.run(aio_part(target, pixels, file)),
        "contract": contract(),
    }
    print(json.dumps(said, default=MessageToDict))


if __name__ == "__main__":
    main(*sys.argv[1:])
