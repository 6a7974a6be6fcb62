"""`pathguard interpret` and `pathguard explain`: what a network's paths say, and why an image was flagged."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from pathguard.client import Access, Client
from pathguard.commands.options import (
    AllowInsecure,
    BundleDir,
    Ca,
    Certificate,
    DataDir,
    ImageSize,
    Json,
    Key,
    Seed,
    Tls,
    Token,
    Trust,
    image_files,
    splits_of,
)
from pathguard.tables import Figure, show

if TYPE_CHECKING:
    import numpy.typing as npt

    from detector.bundle import Bundle
    from detector.images import Pixels


def interpret(
    bundle: BundleDir,
    data: Annotated[str, typer.Option(help="Data set; it must be the one that the network was trained on.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder for the atlas: one HTML page with pictures inside.")] = None,
    attacks: Annotated[
        Path | None, typer.Option(help="Folder that `pathguard attack` wrote, for attacked images among the clean.")
    ] = None,
    seed: Seed = 0,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    trust: Trust = None,
    json_: Json = False,
) -> None:
    """Keep statistics of the paths of clean training images with the bundle, and draw the atlas of its network.

    The statistics are what `explain`, `serve --ui` and restored labels compare an image with.
    """
    from detector.bundle import Bundle
    from detector.interpretation.census import ALWAYS
    from detector.interpretation.survey import make_usual_paths
    from detector.memory import keep_freed_memory

    keep_freed_memory()
    opened = Bundle(bundle, trust)
    splits = splits_of(data or opened.manifest.network.data, data_dir, image_size)
    grown = make_usual_paths(opened, splits)
    census = grown.usual_paths().census
    rates = census.by_layer(census.rates())
    information, bias = census.by_layer(census.information()), census.by_layer(census.bias())
    rows = [
        {
            "layer": layer,
            "filters": len(of_layer),
            "open": float(of_layer.mean()),
            "always_open": int((of_layer > ALWAYS).sum()),
            "always_closed": int((of_layer < 1 - ALWAYS).sum()),
            "most_telling_filter": int(information[layer].argmax()),
            "its_information_nats": float(information[layer].max()),
            "bias_nats": float(bias[layer][information[layer].argmax()]),
        }
        for layer, of_layer in rates.items()
    ]
    show(f"paths of {len(census)} training images labelled right; kept in {bundle}", rows, json_)
    if out is not None:
        from detector.interpretation.atlas import make_atlas
        from detector.interpretation.atlas_page import write_atlas

        page = out / "index.html"
        write_atlas(page, make_atlas(grown, splits, _attacked(attacks, grown), seed))
        if not json_:
            print(f"page: {page}")


def _attacked(folder: Path | None, bundle: "Bundle") -> "dict[str, tuple[Pixels, npt.NDArray[np.int64]]]":
    """Recipe -> the first attacked images of the fitting split that fooled the network, and their right labels."""
    if folder is None:
        return {}
    from attacks.store import AttackStore
    from detector.errors import ArtifactError
    from detector.interpretation.atlas import EMBEDDED_ATTACKED

    store = AttackStore(folder)
    if store.origin.network != bundle.network_digest:
        raise ArtifactError(f"expected attacks on the network of {bundle.folder}, got {folder} with attacks on another")
    found: dict[str, tuple[Pixels, npt.NDArray[np.int64]]] = {}
    for recipe in store.attacks("fitting"):
        pixels, labels, wanted = [], [], EMBEDDED_ATTACKED
        for shard in store.read("fitting", recipe):
            fooled = np.flatnonzero(shard.crafted.fooled)[:wanted]
            pixels.append(shard.crafted.pixels[fooled])
            labels.append(shard.labels[fooled])
            wanted -= len(fooled)
            if not wanted:
                break
        found[recipe] = np.concatenate(pixels), np.concatenate(labels)
    return found


def explain(
    images: Annotated[list[Path], typer.Argument(help="Image files, and folders of them.")],
    bundle: Annotated[
        Path | None, typer.Option(help="Folder of the bundle; or else --target.", envvar="PATHGUARD_BUNDLE")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Address of a running server; or else --bundle.")] = None,
    model: Annotated[str, typer.Option(help="Model of the server to ask (default: its own).", show_default=False)] = "",
    max_false_alarm_rate: Annotated[
        float | None, typer.Option(help="Rate for the verdicts; else the bundle's.")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for a picture of each explanation; with --bundle.")
    ] = None,
    trust: Trust = None,
    token: Token = None,
    tls: Tls = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    allow_insecure: AllowInsecure = False,
    json_: Json = False,
) -> None:
    """Say why each image got its label and verdict; exit code 3 if one is adversarial, 1 if one is bad."""
    files = list(image_files(images))
    if target is not None:
        if pictures is not None:
            raise typer.BadParameter("expected --pictures with --bundle, got it with --target")
        access = Access(tls=tls, ca=ca, certificate=certificate, key=key, token=token, allow_insecure=allow_insecure)
        said = _asked(target, access, files, model, max_false_alarm_rate)
    elif bundle is not None:
        drawn = {} if pictures is None else _picture_places(images, pictures)
        said = _explained(bundle, trust, files, max_false_alarm_rate, drawn)
    else:
        raise typer.BadParameter("expected --bundle or --target, got neither")
    rows = list(said)
    if json_:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            _print_explanation(row)
    if any("error" in row for row in rows):
        raise typer.Exit(1)
    if any(row["verdict"] == "ADVERSARIAL" for row in rows):
        raise typer.Exit(3)


def _asked(target: str, access: Access, files: list[Path], model: str, rate: float | None) -> Iterator[dict[str, Any]]:
    with Client(target, access=access) as client:
        results = client.detect(files, model=model, max_false_alarm_rate=rate, explain=True)
    for file, result in zip(files, results, strict=True):
        if result.error is not None:
            yield {"file": str(file), "error": result.error}
            continue
        yield {
            "file": str(file),
            "resized": result.resized,
            "label": result.name,
            "verdict": result.verdict.name,
            "probability": max(result.probabilities, default=None),
            "score": result.score,
            "p_value": result.p_value,
            "max_false_alarm_rate": result.max_false_alarm_rate,
            **(result.explanation or {}),
        }


def _picture_places(images: list[Path], pictures: Path) -> dict[Path, Path]:
    """Image file -> where its picture is drawn, of its own and of no image."""
    from detector.errors import DataError

    places = {
        file: pictures / f"{file.relative_to(path) if path.is_dir() else file.name}.explained.png"
        for path in images
        for file in image_files([path])
    }
    taken = {file.resolve(): file for file in places}
    for file, place in places.items():
        other = taken.setdefault(place.resolve(), file)
        if other != file or place.resolve() == file.resolve():
            raise DataError(f"expected a picture of its own for each image, got {place} for {file} and for {other}")
    return places


def _explained(
    bundle: Path, trust: str | None, files: list[Path], rate: float | None, drawn: Mapping[Path, Path]
) -> Iterator[dict[str, Any]]:
    from detector.bundle import Bundle
    from detector.errors import ImageError
    from detector.images import OWN_FILE_PIXELS, decode
    from detector.interpretation.explanation import Explainer

    explainer = Explainer(Bundle(bundle, trust))
    for file in files:
        try:
            image = decode(file.read_bytes(), explainer.spec, OWN_FILE_PIXELS)
        except (ImageError, OSError) as error:
            yield {"file": str(file), "error": str(error)}
            continue
        why = explainer.explain(image.pixels, rate)
        row: dict[str, Any] = {"file": str(file), "resized": image.resized, **why.to_json()}
        if file in drawn:
            from detector.interpretation.explanation_picture import draw_explanation

            draw_explanation(drawn[file], image.pixels, why, str(file))
            row["picture"] = str(drawn[file])
        yield row


def _print_explanation(said: Mapping[str, Any]) -> None:
    if "error" in said:
        print(f"{said['file']}: {said['error']}", file=sys.stderr)
        return
    label = said["label"]
    share = "" if said["probability"] is None else f" {said['probability']:.1%}"
    print(
        f"{said['file']}: {label}{share}, {said['verdict']} (p-value {said['p_value']:.4f}, flagged at "
        f"{said['max_false_alarm_rate']:g} and below)"
    )
    more = "" if said["resembles"] == label else f", by {said['resembles_by_nats']:.1f} nats over {label}"
    print(f"  path most like {said['resembles']}{more}")
    for words, name in (("nearest usual path", ""), (f"nearest of {label}", "_of_label")):
        if near := said[f"nearest_usual_path{name}"]:
            print(f"  {words}: {near['label']}, training image {near['image']}, {near['distance']} filters differ")
    print(f"  with its least usual filters set right: {said['label_with_these_set_right']}")
    guess = "restored label (a guess)" if said["verdict"] == "ADVERSARIAL" else "on a usual path"
    print(f"  {guess}: {said['restored_label']}")
    print(f"  score {said['score']:.3f} = {said['base']:.3f} (an average image) + parts ({said['method']})")
    if "picture" in said:
        print(f"  picture: {said['picture']}")
    layers = [
        {
            "layer": layer["layer"],
            "open": Figure(f"{layer['open']} of {layer['filters']}"),
            "unusual": Figure(layer["unusual"]),
            "surprise, nats": Figure(f"{layer['surprise']:.1f}"),
            "usual surprise": Figure(f"{layer['usual_surprise']:.1f}"),
            "adds to score": Figure(f"{layer['part']:+.3f}"),
        }
        for layer in said["layers"]
    ]
    named = {layer["layer"] for layer in said["layers"]}
    others = [
        {**dict.fromkeys(layers[0], Figure()), "layer": name, "adds to score": Figure(f"{value:+.3f}")}
        for name, value in said["parts"].items()
        if name not in named
    ]
    show("layers", [*layers, *others])
    filters = [
        {
            "layer": state["layer"],
            "filter": state["filter"],
            "state": "open" if state["open"] else "closed",
            "usually open": Figure(f"{state['usually_open']:.1%}"),
            "surprise, nats": Figure(f"{state['surprise']:.2f}"),
            "adds to score": Figure(f"{state['part']:+.3f}"),
        }
        for state in said["least_usual_filters"]
    ]
    if filters:
        show(f"least usual filters for {label}", filters)
    else:
        print(f"least usual filters for {label}: none, every filter is as for most of its images")
