"""The only place that knows both the messages of `pathguard.v1` and what the server makes of them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from detector.interpretation.explanation import Explanation
from detector.interpretation.usual_paths import NearPath
from protos.pathguard.v1 import detection_pb2 as pb
from service.access.callers import Role
from service.errors import InvalidRequestError, status_of
from service.model import Answer, Model, smallest_false_alarm_rate
from service.pipeline import Reply
from service.sources import FileSource, NoSource, RawSource, Source

PATH_SCHEMA_VERSION = 1
# Of one call: an explanation takes many times as long as an answer.
MAX_EXPLAINED = 16


def check_request(request: pb.DetectRequest, model: Model, max_images: int, role: Role) -> float:
    """The false-alarm rate to decide at: the one that `request` sets, or the model's.

    Raises:
        ForbiddenError: the role may not set the rate, or not see the path that is asked for.
        InvalidRequestError: no image, too many, a rate that the calibration cannot give, or labels to be restored or
            explained by a model that cannot.
    """
    if request.include_path:
        role.check_sees("path")
    violations: dict[str, str] = {}
    if not 1 <= len(request.images) <= max_images:
        violations["images"] = f"expected 1 to {max_images} images, got {len(request.images)}"
    rate = model.max_false_alarm_rate
    if request.HasField("max_false_alarm_rate"):
        role.check_sets("max_false_alarm_rate")
        rate = request.max_false_alarm_rate
        if problem := problem_with_rate(rate, model):
            violations["max_false_alarm_rate"] = problem
    if request.HasField("uncertain_rate"):
        role.check_sets("max_false_alarm_rate")  # it tells as much about the p-value
        if not rate <= request.uncertain_rate < 1:
            violations["uncertain_rate"] = (
                f"expected a rate from max_false_alarm_rate, {rate:g}, to below 1, got {request.uncertain_rate:g}"
            )
    if request.correct and not model.restores:
        violations["correct"] = f"expected a model with statistics of paths, got {model.name} without"
    if request.explain:
        for name in ("label", "score", "p_value", "verdict", "path"):
            role.check_sees(name)
        if not model.restores:
            violations["explain"] = f"expected a model with statistics of paths, got {model.name} without"
        elif len(request.images) > MAX_EXPLAINED:
            violations["images"] = f"expected at most {MAX_EXPLAINED} images to explain, got {len(request.images)}"
    if violations:
        raise InvalidRequestError(violations)
    return rate


def problem_with_rate(rate: float, model: Model) -> str | None:
    """Why `model` cannot decide at `rate`; None if it can."""
    smallest = smallest_false_alarm_rate(model)
    if smallest <= rate < 1:
        return None
    return (
        f"expected a rate of at least {smallest:.6g} (1 of {model.calibration_images} calibration images and this one) "
        f"and below 1, got {rate:g}"
    )


def source_of(image: pb.Image) -> Source:
    """One image of a request, in the form in which it came."""
    match image.WhichOneof("content"):
        case "raw":
            raw = image.raw
            return RawSource(raw.pixels, raw.height, raw.width, raw.channels)
        case "encoded":
            return FileSource(image.encoded)
        case _:
            return NoSource()


def field_of(image: pb.Image, position: int) -> str:
    """Path of the field that holds the content of image `position` of a request."""
    form = image.WhichOneof("content")
    return f"images[{position}].{form}" if form else f"images[{position}]"


def response_of(
    request: pb.DetectRequest, replies: Sequence[Reply | BaseException], model: Model, rate: float, role: Role
) -> pb.DetectResponse:
    """The answer to a call.

    Args:
        request: the call.
        replies: for each of its images the reply, or why there is none.
        model: who answered.
        rate: the false-alarm rate to decide at.
        role: what the caller may see; what it may not stays empty.
    """
    sees = role.sees
    label, probabilities, verdict = "label" in sees, "probabilities" in sees, "verdict" in sees
    restored = label and verdict
    score, p_value, path = "score" in sees, "p_value" in sees, request.include_path and "path" in sees
    response = pb.DetectResponse(
        model=model.name,
        model_version=model.model_version,
        threshold_version=model.threshold_version,
        max_false_alarm_rate=rate,
        path_layout=_layout_of(model.layers) if path else None,
    )
    uncertain = request.uncertain_rate if request.HasField("uncertain_rate") else rate
    for position, (image, reply) in enumerate(zip(request.images, replies, strict=True)):
        if isinstance(reply, BaseException):
            response.results.add(id=image.id, status=status_of(reply, field_of(image, position)))
            continue
        answer = reply.answer
        response.results.add(
            id=image.id,
            label=answer.label if label else 0,
            label_name=model.class_names[answer.label] if label else "",
            probabilities=answer.probabilities if probabilities else (),
            score=answer.score if score else None,
            p_value=answer.p_value if p_value else 0.0,
            verdict=_verdict(answer, rate, uncertain) if verdict else pb.VERDICT_UNSPECIFIED,
            resized=reply.resized,
            path=answer.path if path else b"",
            explanation=_explanation(reply.explanation) if reply.explanation is not None else None,
            restored_label=answer.restored if restored else None,
            restored_label_name=model.class_names[answer.restored] if restored and answer.restored is not None else "",
        )
    return response


def _verdict(answer: Answer, rate: float, uncertain: float) -> pb.Verdict.ValueType:
    if answer.p_value <= rate:
        return pb.VERDICT_ADVERSARIAL
    return pb.VERDICT_UNCERTAIN if answer.p_value <= uncertain else pb.VERDICT_CLEAN


def _explanation(why: Explanation) -> pb.Explanation:
    return pb.Explanation(
        base=why.base,
        parts=[pb.ScorePart(name=name, value=value) for name, value in why.parts.items()],
        method=why.method,
        least_usual_filters=[pb.FilterState(**asdict(state)) for state in why.least_usual],
        layers=[pb.LayerState(**asdict(layer)) for layer in why.layers],
        resembles=why.named(why.resembles),
        resembles_by_nats=why.resembles_by,
        nearest=_near(why, why.nearest),
        nearest_of_label=_near(why, why.nearest_of_label),
        label_set_right=why.named(why.label_set_right),
        restored=why.named(why.restored),
    )


def _near(why: Explanation, near: NearPath | None) -> pb.NearPath | None:
    return None if near is None else pb.NearPath(image=near.image, label=why.named(near.label), distance=near.distance)


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
        restores=model.restores,
        engine=model.engine,
    )


def _layout_of(layers: Mapping[str, int]) -> pb.PathLayout:
    parts = [pb.PathLayer(name=name, channels=channels) for name, channels in layers.items()]
    return pb.PathLayout(schema_version=PATH_SCHEMA_VERSION, layers=parts)
