"""How long a step must take at least: what it computes, reads and sends, over what the chip can do of each."""

import dataclasses
import math
from typing import Any

from jax.extend import core

from flax_decoder.planning.hlo import Instruction, Program
from flax_decoder.training.hardware import Chip

# These move nothing: they name, pair or steer what others made. What is started is counted where it is done.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call")


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Bounds of a step's time on a chip (Williams et al. 2009).

    Attributes:
        compute_seconds: matrix products at the chip's peak.
        memory_seconds: reads and writes at its memory's bandwidth.
        network_seconds: what it sends, at the bandwidth of all its links.
        mfu_bound: model FLOP/s utilization of a step that takes no longer than the longest of the three.
    """

    compute_seconds: float
    memory_seconds: float
    network_seconds: float
    mfu_bound: float

    @property
    def overlapped_seconds(self) -> float:
        """The time where computing, reading and sending go on at once."""
        return max(self.compute_seconds, self.memory_seconds, self.network_seconds)

    @property
    def serial_seconds(self) -> float:
        """The time where each waits for the others."""
        return self.compute_seconds + self.memory_seconds + self.network_seconds


def roofline(chip: Chip, *, flops: float, model_flops: float, memory_bytes: float, wire_bytes: float) -> Roofline:
    """The bounds for one chip.

    Args:
        chip: what it can do.
        flops: what it computes in a step, activations that are computed twice included.
        model_flops: the part of it that the model itself asks for.
        memory_bytes: what it reads and writes.
        wire_bytes: what it sends.
    """
    seconds = flops / chip.peak_flops, memory_bytes / chip.memory_bandwidth, wire_bytes / chip.interconnect_bandwidth
    return Roofline(*seconds, mfu_bound=model_flops / chip.peak_flops / max(seconds))


def product_flops(jaxpr: core.Jaxpr) -> float:
    """Operations of all matrix products of a traced program, over all devices, loops and recomputation included.

    Args:
        jaxpr: the program, such as `jax.jit(f).trace(x).jaxpr.jaxpr`. A loop whose number of turns is not fixed counts
            once.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, settings = equation.primitive.name, equation.params
        inner = [product_flops(one) for one in _jaxprs(settings)]
        match name:
            case "dot_general":
                (contracted, _), _ = settings["dimension_numbers"]
                left, result = _shape(equation.invars[0]), _shape(equation.outvars[0])
                total += 2 * math.prod(result) * math.prod(left[axis] for axis in contracted)
            case "scan":
                total += settings["length"] * sum(inner)
            case "cond":
                total += max(inner)
            case "shard_map":
                # Inside, shapes are those of one device. JAX has changed the name of the setting.
                axes = next(value for setting, value in settings.items() if setting.endswith("manual_axes"))
                total += sum(inner) * math.prod(settings["mesh"].shape[axis] for axis in axes)
            case "pallas_call":
                # The kernels here are of attention, and skip the blocks that a causal mask leaves empty.
                grid = math.prod(size for size in settings["grid_mapping"].grid if isinstance(size, int))
                total += grid * sum(inner) / 2
            case _ if name.startswith("dot_product_attention_"):
                total += _fused_attention_flops(name, equation)
            case _:
                total += sum(inner)
    return total


def _fused_attention_flops(name: str, equation: Any) -> float:
    """cuDNN's causal attention: two products forward and five backward, of which it leaves out the upper half."""
    q_shape, (_, num_keys, *_) = map(_shape, equation.invars[:2])
    products = 5 if "_bwd" in name else 2
    return products * 2 * math.prod(q_shape) * num_keys / 2


def _shape(variable: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = variable.aval.shape
    return shape


def _jaxprs(settings: dict[str, Any]) -> list[Any]:
    """The programs among an operation's settings."""
    found = []
    for value in settings.values():
        for one in value if isinstance(value, tuple | list) else [value]:
            inner = getattr(one, "jaxpr", one)
            if isinstance(inner, core.Jaxpr):
                found.append(inner)
    return found


def memory_bytes(program: Program) -> float:
    """What a compiled program moves to and from the chip's memory, by a rule that any chip obeys.

    What comes in is read once, and what an instruction leaves in memory is written once and read once. What stays
    inside of a fusion, or in the fast memory of a TPU core, is not counted; nor is that some results are read often.
    """
    total = sum(one.num_bytes for one in program.computations[program.entry].values() if one.opcode == "parameter")
    for _, instruction, times in program.runs():
        if instruction.opcode not in _FREE and not instruction.opcode.endswith("-start"):
            total += 2 * times * _written_bytes(instruction, program)
    return total


def _written_bytes(instruction: Instruction, program: Program) -> int:
    """The bytes of an instruction's result that were not there before and lie in the chip's main memory."""
    if instruction.opcode == "custom-call" and "AllocateBuffer" in instruction.attributes:
        return 0
    inside, root = {}, instruction
    for fused in instruction.called("calls") if instruction.opcode == "fusion" else []:
        inside = program.computations[fused]
        root = next(one for one in inside.values() if one.is_root)
    while root.opcode == "bitcast":
        root = inside[root.operands[0]]
    if root.opcode == "dynamic-update-slice" and inside:
        return inside[root.operands[1]].num_bytes  # written into an array that is there already
    # TPUs number their memories: S(1) is the core's own.
    return sum(array.num_bytes for array in instruction.arrays if "S(" not in array.layout)
