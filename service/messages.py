"""The only place that knows both protobuf messages and arrays."""

from collections.abc import Mapping, Sequence

from google.rpc.status_pb2 import Status

from detector.errors import ImageError
from detector.images import DecodedImage, ImageSpec, decode, from_raw
from protos.pathguard.v1 import detection_pb2 as pb
from service.errors import InvalidRequestError
from service.model import Answer, Model, smallest_false_alarm_rate

PATH_SCHEMA_VERSION = 1


def check_request(request: pb.DetectRequest, model: Model, max_images: int) -> float:
    """The false-alarm rate to decide at: the one that `request` sets, or the model's.

    Raises:
        InvalidRequestError: no image, too many, or a rate that the calibration cannot give.
    """
    violations: dict[str, str] = {}
    if not 1 <= len(request.images) <= max_images:
        violations["images"] = f"expected 1 to {max_images} images, got {len(request.images)}"
    rate = model.max_false_alarm_rate
    if request.HasField("max_false_alarm_rate"):
        rate = request.max_false_alarm_rate
        smallest = smallest_false_alarm_rate(model)
        if not smallest <= rate < 1:
            violations["max_false_alarm_rate"] = (
                f"expected a rate of at least {smallest:.6g} (1 of {model.calibration_images} calibration images and "
                f"this one) and below 1, got {rate:g}"
            )
    if violations:
        raise InvalidRequestError(violations)
    return rate


def decode_image(image: pb.Image, spec: ImageSpec, max_pixels: int) -> DecodedImage:
    """The pixels of one image of a request.

    Raises:
        ImageError: no content, damaged, or not as `spec` wants it.
    """
    form = image.WhichOneof("content")
    if form == "raw":
        raw = image.raw
        return from_raw(raw.pixels, raw.height, raw.width, raw.channels, spec)
    if form == "encoded":
        return decode(image.encoded, spec, max_pixels)
    raise ImageError("expected encoded or raw content, got an image with neither")


def field_of(image: pb.Image, position: int) -> str:
    """Path of the field that holds the content of image `position` of a request."""
    form = image.WhichOneof("content")
    return f"images[{position}].{form}" if form else f"images[{position}]"


def is_encoded(image: pb.Image) -> bool:
    """Whether the image is a file that has to be decoded."""
    return image.HasField("encoded")


def response_of(
    results: Sequence[tuple[Answer, bool] | Status], model: Model, rate: float, include_path: bool
) -> pb.DetectResponse:
    """The answer to a call.

    Args:
        results: for each image the detector's answer and whether it was resized, or why there is none.
        model: who answered.
        rate: the false-alarm rate to decide at.
        include_path: whether results carry their paths.
    """
    response = pb.DetectResponse(
        model=model.name,
        model_version=model.model_version,
        threshold_version=model.threshold_version,
        max_false_alarm_rate=rate,
        path_layout=_layout_of(model.layers) if include_path else None,
    )
    for result in results:
        if isinstance(result, Status):
            response.results.add(status=result)
            continue
        answer, resized = result
        response.results.add(
            label=answer.label,
            label_name=model.class_names[answer.label],
            probabilities=answer.probabilities,
            score=answer.score,
            p_value=answer.p_value,
            verdict=pb.VERDICT_ADVERSARIAL if answer.p_value <= rate else pb.VERDICT_CLEAN,
            resized=resized,
            path=answer.path if include_path else b"",
        )
    return response


def model_message(model: Model) -> pb.Model:
    """What callers may know about `model`."""
    spec = model.spec
    return pb.Model(
        name=model.name,
        model_version=model.model_version,
        threshold_version=model.threshold_version,
        input=pb.InputSpec(height=spec.height, width=spec.width, channels=spec.channels, resize=spec.resize),
        class_names=model.class_names,
        path_layout=_layout_of(model.layers),
        max_false_alarm_rate=model.max_false_alarm_rate,
        smallest_false_alarm_rate=smallest_false_alarm_rate(model),
        calibration_images=model.calibration_images,
    )


def _layout_of(layers: Mapping[str, int]) -> pb.PathLayout:
    parts = [pb.PathLayer(name=name, channels=channels) for name, channels in layers.items()]
    return pb.PathLayout(schema_version=PATH_SCHEMA_VERSION, layers=parts)
