"""Reads the text of a compiled program (HLO): what runs in it, and how often.

XLA's own cost analysis counts the body of a loop once; a training step is loops over layers and over parts of a batch.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# A shape, which may be a tuple with layouts and comments in it, ends where the first `word(` begins.
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ELEMENT = "get-tuple-element"
_BITS = {"pred": 8, "token": 0, "bf16": 16, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape.

    Attributes:
        dtype: as HLO writes it, such as "bf16".
        sizes: of its axes.
        layout: how it lies in memory, in braces.
    """

    dtype: str
    sizes: tuple[int, ...]
    layout: str

    @property
    def num_bytes(self) -> int:
        """The space its elements take."""
        bits = _BITS.get(self.dtype) or int((re.findall(r"\d+", self.dtype) or ["0"])[0])  # f8e4m3fn, u32
        return math.prod(self.sizes) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: what others call its result.
        arrays: its result; several for a tuple.
        opcode: what it does, such as "all-gather".
        operands: names of what it works on.
        attributes: the rest of the line.
        is_root: whether it is the computation's result.
    """

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def num_bytes(self) -> int:
        """The space its result takes."""
        return sum(array.num_bytes for array in self.arrays)

    def called(self, *names: str) -> list[str]:
        """The computations that an attribute of one of these names lists, such as `body=%loop`."""
        found = []
        for name in names:
            for group in re.findall(rf"\b{name}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes):
                found += re.findall(r"[\w.\-]+", group)
        return found


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        computations: the instructions of each, by name and by theirs.
        entry: the computation that the program starts with.
        num_partitions: devices that run it.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str
    num_partitions: int

    def runs(self, name: str | None = None, times: int = 1) -> Iterator[tuple[str, Instruction, int]]:
        """Each instruction with its computation's name and how often it runs, loops and calls followed.

        Fusions are one instruction; what they are made of is not walked.
        """
        for instruction in self.computations[name or self.entry].values():
            yield name or self.entry, instruction, times
            if instruction.opcode == "while":
                inner = times * self.trip_count(instruction, name or self.entry)
                for body in instruction.called("body"):
                    yield from self.runs(body, inner)
            elif instruction.opcode in ("call", "async-start", "conditional"):
                names = ("to_apply", "calls", "called_computations", "branch_computations")
                for callee in instruction.called(*names, "true_computation", "false_computation"):
                    yield from self.runs(callee, times)

    def trip_count(self, loop: Instruction, where: str) -> int:
        """How often a while loop turns: as the compiler says, else from its counter's start, step and bound.

        Args:
            loop: the loop.
            where: the computation that it stands in.

        Raises:
            ValueError: the loop is none that counts up to a constant.
        """
        if known := _TRIP_COUNT.search(loop.attributes):
            return int(known[1])
        condition, body = (self.computations[loop.called(part)[0]] for part in ("condition", "body"))
        outer = self.computations[where]
        start = outer[loop.operands[0]]

        def number(name: str, inside: dict[str, Instruction]) -> int | None:
            """The constant that a name stands for, also where it came into the loop from outside."""
            one = _origin(name, inside)
            if one.opcode == "constant":
                return int(one.attributes.partition(")")[0])
            if one.opcode == _ELEMENT and inside is not outer and start.opcode == "tuple":
                return number(start.operands[_index(one)], outer)
            return None

        compare = next(one for one in condition.values() if one.is_root)
        root = next(one for one in body.values() if one.is_root)
        counter = _origin(compare.operands[0], condition) if compare.operands else compare
        if compare.opcode == "compare" and "direction=LT" in compare.attributes and counter.opcode == _ELEMENT:
            place = _index(counter)
            increment = body[root.operands[place]]
            if increment.opcode == "add" and start.opcode == "tuple":
                first, bound = number(start.operands[place], outer), number(compare.operands[1], condition)
                steps = [
                    number(name, body) for name in increment.operands if not _is_element(_origin(name, body), place)
                ]
                if len(steps) == 1 and steps[0] and first is not None and bound is not None:
                    return -(-(bound - first) // steps[0])
        raise ValueError(f"loop {loop.name}: its number of turns is not known")


def _origin(name: str, inside: dict[str, Instruction]) -> Instruction:
    """The instruction that a name's value comes from, copies left out."""
    one = inside[name]
    return _origin(one.operands[0], inside) if one.opcode in ("copy", "bitcast") else one


def _index(element: Instruction) -> int:
    """Which part of a tuple a get-tuple-element takes."""
    found = re.search(r"\bindex=(\d+)", element.attributes)
    if found is None:
        raise ValueError(f"{element.name} takes no part of a tuple")
    return int(found[1])


def _is_element(instruction: Instruction, place: int) -> bool:
    return instruction.opcode == _ELEMENT and _index(instruction) == place


def parse_hlo(text: str) -> Program:
    """Reads what `compiled.as_text()` gives."""
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
            # The value of a constant stands where others have operands.
            attributes = f"{inputs}){attributes}" if opcode == "constant" else attributes
            current[name] = Instruction(name, arrays, opcode, operands, attributes, root is not None)
    partitions = re.search(r"\bnum_partitions=(\d+)", text[:20_000])
    return Program(computations, entry, int(partitions[1]) if partitions else 1)


def _split_at_parenthesis(text: str) -> tuple[str, str]:
    """What stands before and behind the parenthesis that closes one opened before the text."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:place], text[place + 1 :]
    return text, ""
