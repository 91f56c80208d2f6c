"""The fault matrix: what must hold when a machine, a disk, a file or a user does the worst.

Each test says with `@pytest.mark.fault("row")` which row of the matrix it is a case of; a test that goes through
several cases itself says how many with the fixture `count_cases`. The summary shows a line for each row.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Notes the row of a test in its report, which is all that comes back from another worker."""
    outcome: Any = yield
    marker = item.get_closest_marker("fault")  # a test's own goes before that of its file
    if marker is not None:
        outcome.get_result().user_properties.append(("fault", marker.args[0]))


@pytest.fixture
def count_cases(record_property: Callable[[str, object], None]) -> Callable[[int], None]:
    """Says how many cases a test has gone through, where they are not one; call it at the end."""
    return lambda number: record_property("cases", number)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line for each row of the matrix: cases, how many held, the longest and the whole time in seconds."""
    rows: dict[str, list[tuple[int, bool, float]]] = defaultdict(list)
    skipped: dict[str, int] = defaultdict(int)
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            properties = dict(getattr(report, "user_properties", []))
            if "fault" not in properties:
                continue
            if outcome == "skipped":
                skipped[properties["fault"]] += 1
            elif report.when == "call" or outcome in ("failed", "error"):
                case = int(properties.get("cases", 1)), outcome == "passed", report.duration
                rows[properties["fault"]].append(case)
    if not rows and not skipped:
        return
    terminalreporter.section("fault matrix")
    width = max(map(len, [*rows, *skipped, "fault"]))
    terminalreporter.line(f"{'fault':{width}}  {'cases':>6}  {'held':>6}  {'longest s':>9}  {'all s':>7}")
    for name in sorted({*rows, *skipped}):
        cases = sum(number for number, _, _ in rows[name])
        held = sum(number for number, passed, _ in rows[name] if passed)
        longest = max((seconds for _, _, seconds in rows[name]), default=0.0)
        whole = sum(seconds for _, _, seconds in rows[name])
        note = f"  ({skipped[name]} skipped)" if skipped[name] else ""
        terminalreporter.line(f"{name:{width}}  {cases:6,}  {held:6,}  {longest:9.2f}  {whole:7.1f}{note}")
