"""What a client of the Open Inference Protocol is told: answers, metadata, configuration, statistics."""

import json
from collections.abc import Sequence
from typing import Final

from protos.inference import grpc_service_pb2 as pb
from service.config import ServiceConfig
from service.errors import status_of
from service.inference_outputs import BYTES, OUTPUTS, Replies, add_output
from service.inference_requests import IMAGE_BYTES, IMAGES, InferCall, image_dims
from service.messages import PATH_SCHEMA_VERSION
from service.model import Model, smallest_false_alarm_rate
from service.statistics import Count, ModelCounts

PLATFORM: Final = "pathguard"
EXTENSIONS: Final = ("classification", "model_configuration", "parameters", "schedule_policy", "statistics")


def response_of(
    request: pb.ModelInferRequest, call: InferCall, replies: Replies, model: Model
) -> pb.ModelInferResponse:
    """The answer to a call.

    Args:
        request: as it came.
        call: what it asks for.
        replies: for each image the reply, or why there is none.
        model: who answered.
    """
    response = pb.ModelInferResponse(model_name=model.name, model_version=model.model_version, id=request.id)
    response.parameters["threshold_version"].string_param = model.threshold_version
    response.parameters["max_false_alarm_rate"].double_param = call.rate
    for position, reply in enumerate(replies):
        if isinstance(reply, BaseException):
            response.parameters[f"error[{position}]"].string_param = status_of(reply).message
    for name, classes in call.outputs.items():
        add_output(response, name, classes, replies, model, call.rate, call.raw)
    return response


def metadata_message(model: Model, versions: Sequence[str]) -> pb.ModelMetadataResponse:
    """Inputs and outputs of `model`, of which the server has `versions`."""
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=model.name,
        versions=versions,
        platform=PLATFORM,
        inputs=[
            tensor(name=IMAGES, datatype="UINT8", shape=[-1, *image_dims(model.spec)]),
            tensor(name=IMAGE_BYTES, datatype=BYTES, shape=[-1]),
        ],
        outputs=[
            tensor(
                name=name, datatype=output.datatype, shape=[-1] if output.width is None else [-1, output.width(model)]
            )
            for name, output in OUTPUTS.items()
        ],
    )


def config_message(model: Model, config: ServiceConfig) -> pb.ModelConfig:
    """How `model` is served."""
    values = {
        "model_version": model.model_version,
        "threshold_version": model.threshold_version,
        "max_false_alarm_rate": repr(model.max_false_alarm_rate),
        "smallest_false_alarm_rate": repr(smallest_false_alarm_rate(model)),
        "class_names": json.dumps(model.class_names),
        "path_layout": json.dumps(dict(model.layers)),
        "path_schema_version": str(PATH_SCHEMA_VERSION),
    }
    return pb.ModelConfig(
        name=model.name,
        platform=PLATFORM,
        backend=PLATFORM,
        max_batch_size=config.max_images_per_request,
        input=[
            pb.ModelInput(
                name=IMAGES,
                data_type=pb.TYPE_UINT8,
                format=pb.ModelInput.FORMAT_NHWC,
                dims=image_dims(model.spec),
            ),
            # Either input does. Load generators fill all that are not optional, so only one of them is not.
            pb.ModelInput(
                name=IMAGE_BYTES, data_type=pb.TYPE_STRING, dims=[1], reshape=pb.ModelTensorReshape(), optional=True
            ),
        ],
        output=[
            pb.ModelOutput(
                name=name,
                data_type=output.data_type,
                dims=[1] if output.width is None else [output.width(model)],
                reshape=pb.ModelTensorReshape() if output.width is None else None,
            )
            for name, output in OUTPUTS.items()
        ],
        dynamic_batching=pb.ModelDynamicBatching(
            preferred_batch_size=[config.max_batch],
            default_queue_policy=pb.ModelQueuePolicy(
                timeout_action=pb.ModelQueuePolicy.REJECT,
                allow_timeout_override=True,
                max_queue_size=config.max_pending_images,
            ),
        ),
        instance_group=[pb.ModelInstanceGroup(name=model.name, count=1, kind=pb.ModelInstanceGroup.KIND_MODEL)],
        parameters={name: pb.ModelParameter(string_value=value) for name, value in values.items()},
    )


def statistics_message(model: Model, counts: ModelCounts) -> pb.ModelStatistics:
    """What has been counted of `model`."""
    return pb.ModelStatistics(
        name=model.name,
        version=model.model_version,
        last_inference=int(counts.last * 1000),
        inference_count=counts.images,
        execution_count=sum(count.count for count in counts.batches.values()),
        inference_stats=pb.InferStatistics(
            success=_duration(counts.answered),
            fail=_duration(counts.failed),
            queue=_duration(counts.queue),
            compute_input=_duration(counts.decode),
            compute_infer=_duration(counts.infer),
            compute_output=_duration(counts.encode),
            cache_hit=pb.StatisticDuration(),
            cache_miss=pb.StatisticDuration(),
        ),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=size,
                compute_input=pb.StatisticDuration(count=count.count),
                compute_infer=_duration(count),
                compute_output=pb.StatisticDuration(count=count.count),
            )
            for size, count in sorted(counts.batches.items())
        ],
    )


def _duration(count: Count) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=count.count, ns=int(count.seconds * 1e9))
