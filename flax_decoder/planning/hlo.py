"""Parses the text of a compiled program (HLO): its instructions, and how often each runs.

XLA's own cost analysis counts the body of a loop once; a training step loops over layers and over accumulation steps.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# A shape may be a tuple with layouts and comments; it ends where the first `word(` begins.
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ELEMENT = "get-tuple-element"
_BITS = {"pred": 8, "token": 0, "bf16": 16, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape."""

    dtype: str  # as HLO writes it: "bf16"
    sizes: tuple[int, ...]
    layout: str  # in braces

    @property
    def num_bytes(self) -> int:
        """The size of its elements."""
        bits = _BITS.get(self.dtype) or int((re.findall(r"\d+", self.dtype) or ["0"])[0])  # f8e4m3fn, u32
        return math.prod(self.sizes) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str  # of its result
    arrays: tuple[Array, ...]  # its result; several for a tuple
    opcode: str  # such as "all-gather"
    operands: tuple[str, ...]  # names of the inputs
    attributes: str  # the rest of the line
    is_root: bool  # whether it is the result of the computation

    @property
    def num_bytes(self) -> int:
        """The size of its result."""
        return sum(array.num_bytes for array in self.arrays)

    def called(self, *names: str) -> list[str]:
        """The computations in attributes of these names, such as `body=%loop`."""
        found = []
        for name in names:
            for group in re.findall(rf"\b{name}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes):
                found += re.findall(r"[\w.\-]+", group)
        return found


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program."""

    computations: dict[str, dict[str, Instruction]]  # instructions by name
    entry: str  # the computation that the program starts with
    num_partitions: int  # devices that run it

    def runs(self, name: str | None = None, times: int = 1) -> Iterator[tuple[str, Instruction, int]]:
        """Yields (computation, instruction, executions) for each instruction, through loops and calls.

        A fusion is one instruction; its parts are not yielded.
        """
        name = name or self.entry
        for instruction in self.computations[name].values():
            yield name, instruction, times
            if instruction.opcode == "while":
                for body in instruction.called("body"):
                    yield from self.runs(body, times * self.trip_count(instruction, name))
            elif instruction.opcode in ("call", "async-start", "conditional"):
                names = ("to_apply", "calls", "called_computations", "branch_computations")
                for callee in instruction.called(*names, "true_computation", "false_computation"):
                    yield from self.runs(callee, times)

    def trip_count(self, loop: Instruction, caller: str) -> int:
        """Iterations of a while loop in computation `caller`: known to the compiler, else derived from its counter.

        Raises:
            ValueError: the loop does not count up to a constant.
        """
        if known := _TRIP_COUNT.search(loop.attributes):
            return int(known[1])
        condition, body = (self.computations[loop.called(part)[0]] for part in ("condition", "body"))
        outer = self.computations[caller]
        start = outer[loop.operands[0]]

        def constant(name: str, computation: dict[str, Instruction]) -> int | None:
            """The value of a constant, which may also come from outside the loop."""
            one = _origin(name, computation)
            if one.opcode == "constant":
                return int(one.attributes.partition(")")[0])
            if one.opcode == _ELEMENT and computation is not outer and start.opcode == "tuple":
                return constant(start.operands[_index(one)], outer)
            return None

        compare, root = (next(one for one in part.values() if one.is_root) for part in (condition, body))
        counter = _origin(compare.operands[0], condition) if compare.operands else compare
        if compare.opcode == "compare" and "direction=LT" in compare.attributes and counter.opcode == _ELEMENT:
            index = _index(counter)
            increment = body[root.operands[index]]
            if increment.opcode == "add" and start.opcode == "tuple":
                first, bound = constant(start.operands[index], outer), constant(compare.operands[1], condition)
                origins = {name: _origin(name, body) for name in increment.operands}
                others = [name for name, one in origins.items() if one.opcode != _ELEMENT or _index(one) != index]
                step = constant(others[0], body) if len(others) == 1 else None
                if step and first is not None and bound is not None:
                    return -(-(bound - first) // step)
        raise ValueError(f"loop {loop.name}: the number of iterations is unknown")


def _origin(name: str, computation: dict[str, Instruction]) -> Instruction:
    """The instruction that a value comes from, through copies."""
    one = computation[name]
    return _origin(one.operands[0], computation) if one.opcode in ("copy", "bitcast") else one


def _index(element: Instruction) -> int:
    """The index of a get-tuple-element."""
    found = re.search(r"\bindex=(\d+)", element.attributes)
    if found is None:
        raise ValueError(f"{element.name} has no index into a tuple")
    return int(found[1])


def parse_hlo(text: str) -> Program:
    """Parses the result of `compiled.as_text()`."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            root, name, shape, opcode, rest = found.groups()
            inputs, attributes = _split_at_parenthesis(rest)
            arrays = tuple(
                Array(dtype, tuple(int(size) for size in sizes.split(",") if size), layout or "")
                for dtype, sizes, layout in _ARRAY.findall(shape)
            )
            operands = tuple(re.findall(r"%([\w.\-]+)", inputs))
            # A constant has its value in place of operands, and a parameter its number.
            attributes = f"{inputs}){attributes}" if opcode in ("constant", "parameter") else attributes
            current[name] = Instruction(name, arrays, opcode, operands, attributes, root is not None)
    partitions = re.search(r"\bnum_partitions=(\d+)", text[:20_000])
    return Program(computations, entry, int(partitions[1]) if partitions else 1)


def _split_at_parenthesis(text: str) -> tuple[str, str]:
    """The text before and after the parenthesis that closes one opened before the text."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""
