"""`docs/fill_outputs.py`: pages show what their blocks print."""

import runpy
from pathlib import Path

filled = runpy.run_path(str(Path(__file__).resolve().parent.parent / "docs" / "fill_outputs.py"))["filled"]

PAGE = """Two numbers.

```python
total = 1 + 2
```

```python
print(total, "  ")
print("four")
```

```text
an older output
```

```text
a picture
```
"""


def test_what_blocks_print_stands_behind_them() -> None:
    page = filled(PAGE)
    assert page == PAGE.replace("an older output", "3\nfour")
    assert filled(page) == page


def test_output_is_added_and_taken_away() -> None:
    assert filled("```python\nprint(5)\n```\n") == "```python\nprint(5)\n```\n\n```text\n5\n```\n"
    assert filled("```python\nx = 5\n```\n\n```text\n5\n```\n") == "```python\nx = 5\n```\n"
