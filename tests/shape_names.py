"""Holds the axes in array names to the truth: an x_BTD has three axes, and a letter has one size within a call."""

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import flax_decoder

PACKAGE = str(Path(flax_decoder.__file__).parent)
SUFFIX = re.compile(r"(?:^|_)([A-Z]+)$")


def contradictions(local_variables):
    """What is wrong among the local variables of one call, as text.

    A variable whose name ends in an underscore and capital letters, and whose value has a shape, must have one axis a
    letter. An integer named by one letter (B, T = tokens_BT.shape) is the size of that letter. B may be 1 beside
    another B: masks, positions and biases that all rows share.
    """
    sizes = {}
    for name, value in sorted(local_variables.items()):
        if len(name) == 1 and name.isupper() and type(value) is int:
            sizes[name] = (value, name)
    for name, value in sorted(local_variables.items()):
        match, shape = SUFFIX.search(name), getattr(value, "shape", None)
        if "_" not in name or match is None or not isinstance(shape, tuple):
            continue
        if len(shape) != len(match[1]):
            yield f"{name} has the shape {shape}"
            continue
        for letter, size in zip(match[1], shape, strict=True):
            if letter == "B" and size == 1:
                continue
            other_size, other = sizes.setdefault(letter, (size, name))
            if size != other_size and not (letter == "B" and other_size == 1):
                yield f"{letter} is {size} in {name} but {other_size} in {other}"


@contextlib.contextmanager
def checked_shape_names(folder: str = PACKAGE) -> Iterator[set[str]]:
    """Checks each function defined under a folder as it returns, and raises AssertionError at the end.

    Yields:
        The names of the functions seen, which grows.
    """
    problems, functions = set(), set()

    def on_return(frame, event, _):
        if event == "return" and frame.f_code.co_filename.startswith(folder):
            where = f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_qualname}"
            functions.add(where)
            problems.update(f"{where}: {problem}" for problem in contradictions(frame.f_locals))

    before = sys.getprofile()
    sys.setprofile(on_return)
    try:
        yield functions
    finally:
        sys.setprofile(before)
    assert not problems, "\n".join(sorted(problems))
