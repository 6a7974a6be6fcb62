"""Which library cuts the paths of a class into the combinations that say most: all of them by the same checks.

    python -m benchmarks.concepts --bundle DIR [--data-dir DIR] [--quick] [--json FILE]

Only how filters are grouped differs; which filters of a group make a combination, and how it is judged, is the
product's. Frequent itemsets need mlxtend (`pip install mlxtend`), else their rows stay empty. With --quick only the
cuts are run, on random bits.
"""

import math
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from sklearn.cluster import SpectralCoclustering
from sklearn.decomposition import MiniBatchDictionaryLearning

from benchmarks.interpretation import (
    CLOSING_RATIO,
    PURER_THAN_RANDOM,
    PURER_THAN_SINGLE,
    CombinationFigures,
    SeenPaths,
    combination_figures,
    seen_paths,
)
from benchmarks.report import Row, print_rows, write_rows
from detector.bundle import Bundle
from detector.datasets import load_splits
from detector.errors import ArtifactError
from detector.interpretation.census import Doubles
from detector.interpretation.concepts import LEAST_SHARE, Cut, nmf_parts

# Itemsets grow with two to the power of the filters: only so many of the heaviest take part.
_ITEMS = 20


def dictionary_parts(weighted: Doubles, parts: int, seed: int) -> Doubles:
    """Parts by sparse dictionary learning with atoms and codes that are not negative."""
    model = MiniBatchDictionaryLearning(
        parts, positive_dict=True, positive_code=True, fit_algorithm="cd", transform_algorithm="lasso_cd",
        random_state=seed, max_iter=50,
    ).fit(weighted)  # fmt: skip
    return np.asarray(model.components_)


def coclustered_parts(weighted: Doubles, parts: int, seed: int) -> Doubles:
    """Parts by spectral co-clustering of images and filters (Dhillon 2001): each filter belongs to one part."""
    used = np.flatnonzero(weighted.any(axis=0))
    images = weighted.any(axis=1)
    loadings = np.zeros((parts, weighted.shape[1]))
    if len(used) <= parts:
        return loadings
    model = SpectralCoclustering(parts, random_state=seed).fit(weighted[np.ix_(images, used)])
    loadings[model.column_labels_, used] = weighted[:, used].max(axis=0)
    return loadings


def itemset_parts(weighted: Doubles, parts: int, _seed: int) -> Doubles:
    """Parts that are the heaviest maximal frequent itemsets (Grahne and Zhu 2003) of the heaviest filters."""
    import pandas
    from mlxtend.frequent_patterns import fpmax

    heaviest = np.argsort(-weighted.sum(axis=0), kind="stable")[:_ITEMS]
    found = fpmax(pandas.DataFrame(weighted[:, heaviest] > 0), min_support=LEAST_SHARE)
    weight = weighted.max(axis=0)
    itemsets = [heaviest[list(items)] for items in found["itemsets"]]
    itemsets.sort(key=lambda filters: -float(weight[filters].sum()))
    loadings = np.zeros((parts, weighted.shape[1]))
    for part, filters in zip(loadings, itemsets[:parts], strict=False):
        part[filters] = weight[filters]
    return loadings


CUTS: Mapping[str, Cut] = {
    "non-negative matrix factorisation": nmf_parts,
    "sparse dictionary": dictionary_parts,
    "spectral co-clustering": coclustered_parts,
    "maximal frequent itemsets": itemset_parts,
}


def main(
    bundle: Annotated[Path | None, typer.Option(help="A decoupled network.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where its data lies.")] = None,
    quick: Annotated[bool, typer.Option(help="The cuts alone, on random bits.")] = False,
    json: Annotated[Path | None, typer.Option(help="File for the rows {figure, value, bar, met}.")] = None,
) -> None:
    """Compare and print."""
    torch.set_num_threads(1)
    if bundle is None and not quick:
        raise typer.BadParameter("expected --bundle DIR or --quick, got neither")
    seen = None
    if bundle is not None and not quick:
        opened = Bundle(bundle)
        seen = seen_paths(opened, load_splits(opened.manifest.network.data, data_dir))
    rows: list[Row] = []
    for name, cut in CUTS.items():
        found, began = None, time.process_time()
        if cut is itemset_parts and not find_spec("mlxtend"):
            began = math.nan
        elif seen is None:
            cut(np.random.default_rng(0).random((500, 600)) * (np.random.default_rng(1).random((500, 600)) < 0.3), 3, 0)
        else:
            found = _judged(seen, cut)
        rows += _rows(name, found, time.process_time() - began)
    print_rows("how filters are grouped", rows)
    if json is not None:
        write_rows(json, rows)


def _judged(seen: SeenPaths, cut: Cut) -> CombinationFigures | None:
    try:
        return combination_figures(seen, 0, cut)
    except ArtifactError:  # no combination that an image shares
        return None


def _rows(name: str, found: CombinationFigures | None, seconds: float) -> Iterator[Row]:
    values: tuple[float | None, ...] = (None, None, None, None)
    if found is not None:
        ratio = found.own / found.others if found.others > 0 else None
        values = (found.combinations, found.over_single, found.over_random, ratio)
    figures = (
        ("classes with a combination", None),
        ("purer than their best filter, points", PURER_THAN_SINGLE),
        ("purer than random ones, points", PURER_THAN_RANDOM),
        ("closed, the class loses times as much", CLOSING_RATIO),
    )
    for (figure, bar), value in zip(figures, values, strict=True):
        yield Row(figure=f"{name}: {figure}", value=value, bar=bar, at_most=False)
    yield Row(figure=f"{name}: CPU seconds", value=None if math.isnan(seconds) else seconds)


if __name__ == "__main__":
    typer.run(main)
