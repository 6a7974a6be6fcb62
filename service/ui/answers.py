"""What the page asks, answered as JSON values: an explanation, an attacked image, the model."""

import base64
from collections.abc import Mapping, Sequence

from detector.images import Pixels, decode, encode_png
from detector.interpretation.explanation import Explainer, Explanation
from detector.paths.path_encoding import Bits
from service.errors import InvalidRequestError
from service.ui.attack import MAX_LEVELS, METHODS, attacked

# Classes whose probabilities are told.
_LIKELIEST = 3


def model_of(explainer: Explainer, rate: float) -> dict[str, object]:
    """What the page shows of the model; `rate` is that of its verdicts."""
    return {
        "classes": explainer.class_names,
        "height": explainer.spec.height,
        "width": explainer.spec.width,
        "channels": explainer.spec.channels,
        "resize": explainer.spec.resize,
        "layers": explainer.network.layers,
        "max_false_alarm_rate": rate,
        "max_levels": MAX_LEVELS,
    }


def explained(
    explainer: Explainer, rate: float, content: bytes, max_pixels: int
) -> tuple[Explanation, dict[str, object]]:
    """An uploaded file, explained.

    Raises:
        ImageError: it is no image, damaged, or not as the network takes it.
    """
    image = decode(content, explainer.spec, max_pixels)
    found = explainer.explain(image.pixels, rate)
    return found, {**_answer(found, image.pixels), "resized": image.resized}


def bent(
    explainer: Explainer, rate: float, content: bytes, max_pixels: int, query: Mapping[str, Sequence[str]]
) -> tuple[Explanation, dict[str, object]]:
    """An uploaded file, attacked and then explained.

    Raises:
        ImageError: as `explained`.
        InvalidRequestError: an unknown method, or a budget that is no number or out of range.
    """
    method = (query.get("method") or [""])[0]
    if method not in METHODS:
        raise InvalidRequestError({"method": f"expected {' or '.join(METHODS)}, got {method!r}"})
    text = (query.get("levels") or [""])[0]
    try:
        levels = float(text)
    except ValueError:
        levels = -1.0
    if not 0 <= levels <= MAX_LEVELS:
        raise InvalidRequestError({"levels": f"expected a number of grey levels from 0 to {MAX_LEVELS}, got {text!r}"})
    image = decode(content, explainer.spec, max_pixels)
    with explainer.alone() as network:
        moved = attacked(network, image.pixels, method, levels)
    found = explainer.explain(moved, rate)
    return found, {**_answer(found, moved), "resized": image.resized}


def _answer(found: Explanation, pixels: Pixels) -> dict[str, object]:
    likeliest = sorted(enumerate(found.probabilities), key=lambda pair: -pair[1])[:_LIKELIEST]
    return {
        **found.to_json(),
        "image": "data:image/png;base64," + base64.b64encode(encode_png(pixels)).decode(),
        "likeliest": [[found.named(label), probability] for label, probability in likeliest],
        "path": _text(found.path.bits[0]),
        "usual_path": _text(found.usual),
        "usual_path_of_restored": _text(found.usual_of_restored),
    }


def _text(bits: Bits) -> str:
    return "".join("1" if bit else "0" for bit in bits.tolist())
