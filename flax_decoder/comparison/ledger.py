"""The result of a comparison with PyTorch: a row per tensor, and one sentence."""

import dataclasses
import json
import textwrap
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["holds", "rounding", "zero", "imprecise", "DIFFERS"]
VERDICTS: dict[Verdict, str] = {
    "holds": "differs by no more than float32 rounds",
    "rounding": "differs by more, but not in float64: magnified rounding",
    "zero": "the true gradient is zero: both sides have rounding errors only",
    "imprecise": "no difference in float64, but more than float32 rounds",
    "DIFFERS": "differs in float64 too",
}
NAME_WIDTH = 45


@dataclass(frozen=True)
class Row:
    """A tensor on both sides.

    Attributes:
        name: its name, such as layers.0.attention.q.
        shape: its shape.
        absolute: largest absolute difference.
        relative: the same over the largest number of PyTorch's tensor.
        floor: the relative difference expected of rounding to float32.
        float64: the relative difference in float64; None if it was not needed.
        verdict: one of `VERDICTS`.
        worst: in a row of several tensors, the one that differs most.
    """

    name: str
    shape: tuple[int, ...]
    absolute: float
    relative: float
    floor: float
    float64: float | None = None
    verdict: Verdict = "holds"
    worst: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the two sides agree."""
        return self.verdict in ("holds", "rounding", "zero")


@dataclass(frozen=True)
class Ledger:
    """The rows in the order of computation, and the conclusion.

    Attributes:
        rows: a row per tensor.
        cause: the likely cause of the first row that failed; None if all hold.
        notes: what a reader should know about this comparison.
    """

    rows: tuple[Row, ...]
    cause: str | None
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every row passed."""
        return self.first_failure is None

    @property
    def first_failure(self) -> Row | None:
        """The first row that failed."""
        return next((row for row in self.rows if not row.passed), None)

    @property
    def conclusion(self) -> str:
        """One sentence: all hold, or the first row that does not and the likely cause."""
        first = self.first_failure
        if first is None:
            return f"All {len(self.rows)} rows hold."
        num_failures = sum(not row.passed for row in self.rows)
        return f"{num_failures} of {len(self.rows)} rows do not hold; the first is {first.name}: {self.cause}"

    def to_json(self) -> str:
        """The ledger as JSON."""
        document = {
            "holds": self.holds,
            "conclusion": self.conclusion,
            "first_failure": self.first_failure.name if self.first_failure else None,
            "cause": self.cause,
            "notes": self.notes,
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }
        # JSON has no infinity, which masks that differ give: it becomes null.
        return json.dumps(json.loads(json.dumps(document), parse_constant=lambda name: None), indent=1)

    def __str__(self) -> str:
        """The table, at most 100 columns wide."""
        lines = [_line("tensor", "shape", "largest", "relative", "floor", "float64", "verdict")]
        for row in self.rows:
            worst = f": {row.worst.replace('/', '.')}" if row.worst and row.verdict != "holds" else ""
            numbers = (row.absolute, row.relative, row.floor, *([] if row.float64 is None else [row.float64]))
            absolute, relative, floor, exact = [*(f"{number:.1e}" for number in numbers), ""][:4]
            shape = "x".join(map(str, row.shape)) or "1"
            lines.append(_line(row.name + worst, shape, absolute, relative, floor, exact, row.verdict))
        used = [verdict for verdict in VERDICTS if any(row.verdict == verdict for row in self.rows)]
        notes = [*(f"{verdict}: {VERDICTS[verdict]}." for verdict in used if verdict != "holds"), *self.notes]
        wrapped = [line for note in [*notes, self.conclusion] for line in textwrap.wrap(note, 100)]
        return "\n".join([*lines, "", *wrapped])


def _line(name: str, shape: str, absolute: str, relative: str, floor: str, exact: str, verdict: str) -> str:
    name = name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 1] + "…"
    return f"{name:<{NAME_WIDTH}}{shape:>13} {absolute:>7} {relative:>8} {floor:>7} {exact:>7} {verdict}"
