"""Which of the stored attacks a detector is fitted on.

What is fitted on strong attacks learns to see large changes, and misses small ones; what is fitted on weak and
minimum-norm attacks, which stop at the boundary, keeps its eyes open for both. How much that is worth here is printed
by `pathguard evaluate --protocol full` and told in docs/detection.md.
"""

from collections.abc import Callable, Mapping, Sequence

from attacks.store import AttackStore
from detector.errors import RequestError

WEAK_LINF = 2 / 255


def _is_weak(parameters: Mapping[str, object]) -> bool:
    budget = parameters.get("budget")
    return budget is None or (parameters["norm"] == "linf" and isinstance(budget, float) and budget <= WEAK_LINF)


def _is_usual(parameters: Mapping[str, object]) -> bool:
    """White box, and not an attacker who overlooks the gates or knows the detector."""
    return (
        parameters.get("gates") == "straight-through"
        and parameters.get("source") == "decoupled"
        and "detector" not in parameters
    )


FITTING_SETS: Mapping[str, Callable[[Mapping[str, object]], bool]] = {
    # minimum-norm attacks, and others of at most 2/255
    "weak": lambda parameters: _is_usual(parameters) and _is_weak(parameters),
    # all others
    "strong": lambda parameters: _is_usual(parameters) and not _is_weak(parameters),
    "all": _is_usual,
}


def fitting_recipes(store: AttackStore, text: str) -> list[str]:
    """The recipes of the store that `text` names: a set of `FITTING_SETS`, or recipes by commas, taken as they are.

    Raises:
        RequestError: a recipe is not in the store, or the set is empty.
    """
    stored = store.attacks("fitting")
    if text in FITTING_SETS:
        parameters = {key.recipe: record.parameters for key, record in store.records().items()}
        found = [recipe for recipe in stored if FITTING_SETS[text](parameters[recipe])]
    else:
        found = [name.strip() for name in text.split(",")]
    missing = [recipe for recipe in found if recipe not in stored]
    if missing or not found:
        raise RequestError(
            f"expected {', '.join(FITTING_SETS)} or some of the attacks {', '.join(stored)} to fit on; got {text!r}"
        )
    return found


def named_sets(store: AttackStore) -> dict[str, Sequence[str]]:
    """Set -> its recipes in the store; sets without any are left out."""
    sets: dict[str, Sequence[str]] = {}
    for name in FITTING_SETS:
        try:
            sets[name] = fitting_recipes(store, name)
        except RequestError:
            continue
    return sets
