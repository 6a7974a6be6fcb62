"""What one number that a classifier reads stands for, and its name."""

import re
from dataclasses import dataclass

from detector.errors import RequestError

_NAME = re.compile(r"(?P<kind>[a-z-]+)(:(?P<layer>[^\[(]+))?(\[(?P<place>\d+)\])?(\((?P<measure>[a-z]+)\))?")


@dataclass(frozen=True, slots=True)
class Column:
    """One column of features; `str` gives its name, such as `bits:layer1.0.conv1[3]` or `margins[1]`.

    Attributes:
        kind: the features that it belongs to, in `detector.paths.features.FEATURES`.
        layer: name of the gated convolution; None for what is about no single layer.
        place: the filter, from 0; of inputs, the channel that the gate reads, from 0; of margins, which class after the
            first, from 1; None for a whole layer.
        measure: which of several measures of one layer; empty where there is one.
    """

    kind: str
    layer: str | None = None
    place: int | None = None
    measure: str = ""

    def __str__(self) -> str:
        layer = f":{self.layer}" if self.layer is not None else ""
        place = f"[{self.place}]" if self.place is not None else ""
        return f"{self.kind}{layer}{place}" + (f"({self.measure})" if self.measure else "")

    @classmethod
    def of_name(cls, name: str) -> "Column":
        """The column of that name: the inverse of `str`.

        Raises:
            RequestError: it is no name of a column.
        """
        found = _NAME.fullmatch(name)
        if found is None:
            raise RequestError(f"expected the name of a column such as bits:layer1.0.conv1[3], got {name!r}")
        place = found["place"]
        return cls(found["kind"], found["layer"], int(place) if place is not None else None, found["measure"] or "")
