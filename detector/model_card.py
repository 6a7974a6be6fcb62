"""What a person should know of a bundle, beside it: MODEL_CARD.md to read and model_card.json for programs.

All of it stands in the manifest; the card is written anew with every stage and is no part of what is verified.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from detector.bundle import Bundle
from detector.errors import ArtifactError
from detector.files import write_whole
from detector.paths.path_statistics import LayerFigures

MARKDOWN, JSON = "MODEL_CARD.md", "model_card.json"


def write_card(bundle: Bundle) -> None:
    """Write both forms of the card into the bundle's folder.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    facts = card_of(bundle)
    try:
        write_whole(bundle.folder / JSON, (json.dumps(facts, indent=2) + "\n").encode())
        write_whole(bundle.folder / MARKDOWN, "\n".join(_lines(facts)).encode())
    except OSError as error:
        raise ArtifactError(f"expected to write the model card of {bundle.folder}, got: {error.strerror}") from None


def card_of(bundle: Bundle) -> dict[str, Any]:
    """The facts of the card, JSON values: what the network takes, how each stage was made and how it does."""
    manifest = bundle.manifest
    spec, gates, detector = manifest.network.spec, manifest.gates, manifest.detector
    facts: dict[str, Any] = {
        "network": manifest.network.name,
        "images": {"height": spec.height, "width": spec.width, "channels": spec.channels},
        "classes": list(manifest.network.classes),
        "data": manifest.network.data,
        "stages": {stage: dict(made) for stage, made in manifest.training.items()},
        "versions": dict(manifest.versions),
        "parts": dict(manifest.parts),
    }
    if gates is not None:
        facts["gates"] = {"keep": gates.keep, "objective": gates.objective, "patterns": list(gates.patterns)}
    if detector is not None:
        facts["detector"] = {
            "features": detector.features,
            "max_false_alarm_rate": detector.max_false_alarm_rate,
            "fitted_on": list(detector.recipes),
            "benign": detector.benign,
        }
    return facts


def _lines(facts: Mapping[str, Any]) -> Iterator[str]:
    images, stages = facts["images"], facts["stages"]
    yield f"# {facts['network']} for {facts['data']}"
    yield ""
    yield (
        f"Takes images of {images['height']} x {images['width']} pixels with {images['channels']} channels; answers "
        f"with one of {len(facts['classes'])} classes: {', '.join(facts['classes'])}."
    )
    if "gates" in facts:
        yield ""
        yield (
            f"Its filters are gated: {facts['gates']['keep']:.0%} were asked to stay open, trained for the objective "
            f"`{facts['gates']['objective']}`."
        )
    if "detector" in facts:
        known = ", ".join(facts["detector"]["fitted_on"])
        passing = ", with noise and corruptions as what is to pass" if facts["detector"]["benign"] else ""
        yield ""
        yield (
            f"Its detector reads {facts['detector']['features']} and was fitted on {known}{passing}; it may flag "
            f"{100 * facts['detector']['max_false_alarm_rate']:.3g}% of clean images. Attacks that know the detector "
            f"can evade it."
        )
    for stage, made in stages.items():
        yield from ("", f"## {stage.capitalize()}", "")
        if made.get("command"):
            yield from (f"    {made['command']}", "")
        figures = dict(made.get("figures", {}))
        layers = figures.pop("layers", ())
        tried = made.get("candidates", ())
        facts_of = {**made, "figures": figures}
        rows = [(key, value) for key, value in _flat(facts_of) if key not in ("command", "candidates")]
        yield from _table(("fact", "value"), rows)
        if layers:
            yield ""
            columns = [field.name for field in fields(LayerFigures)]  # the manifest's own are sorted by name
            yield from _table(columns, [[layer[column] for column in columns] for layer in layers])
        if tried:
            yield from ("", "Chosen among these, AUROC on the fitting split, of attacks left out and of all:", "")
            yield from _table(list(tried[0]), [list(candidate.values()) for candidate in tried])
    yield ""
    yield f"Made with {', '.join(f'{name} {number}' for name, number in facts['versions'].items())}."
    yield ""


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The values with those of nested mappings in their place."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield key, value


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    yield "| " + " | ".join(column.replace("_", " ") for column in columns) + " |"
    yield "| " + " | ".join("---" for _ in columns) + " |"
    for row in rows:
        yield "| " + " | ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row) + " |"
