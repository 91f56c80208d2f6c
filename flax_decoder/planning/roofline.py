"""A lower bound on the time of a step: what it computes, reads and sends, over the peak rates of the chip."""

import dataclasses
import math
from typing import Any

from jax.extend import core

from flax_decoder.planning.hlo import Instruction, Program
from flax_decoder.training.hardware import Chip

# Instructions that move no data. An asynchronous one counts where it is done, not where it starts.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call")


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Bounds of a step's time on a chip (Williams et al. 2009)."""

    compute_seconds: float  # matrix products at the chip's peak
    memory_seconds: float  # reads and writes at its memory bandwidth
    network_seconds: float  # sent bytes at the bandwidth of all its links
    mfu_bound: float  # model FLOP/s utilization of a step that takes as long as the longest of the three

    @property
    def overlapped_seconds(self) -> float:
        """The time if computation, memory and network overlap."""
        return max(self.compute_seconds, self.memory_seconds, self.network_seconds)

    @property
    def serial_seconds(self) -> float:
        """The time if nothing overlaps."""
        return self.compute_seconds + self.memory_seconds + self.network_seconds


def roofline(chip: Chip, *, flops: float, model_flops: float, memory_bytes: float, wire_bytes: float) -> Roofline:
    """The bounds of a step on one chip, which computes, reads and sends this; `model_flops` have no recomputation."""
    seconds = flops / chip.peak_flops, memory_bytes / chip.memory_bandwidth, wire_bytes / chip.interconnect_bandwidth
    return Roofline(*seconds, mfu_bound=model_flops / chip.peak_flops / max(seconds))


def product_flops(jaxpr: core.Jaxpr) -> float:
    """FLOPs of all matrix products of a program such as `jax.jit(f).trace(x).jaxpr.jaxpr`, over all devices.

    Loops and recomputation are included, but a while loop counts once.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inner = [product_flops(one) for one in _jaxprs(params)]
        match name:
            case "dot_general":
                (contracted, _), _ = params["dimension_numbers"]
                left, result = _shape(equation.invars[0]), _shape(equation.outvars[0])
                total += 2 * math.prod(result) * math.prod(left[axis] for axis in contracted)
            case "scan":
                total += params["length"] * sum(inner)
            case "cond":
                total += max(inner)
            case "shard_map":
                # Shapes inside are per device. JAX has changed the name of this parameter.
                axes = next(value for param, value in params.items() if param.endswith("manual_axes"))
                total += sum(inner) * math.prod(params["mesh"].shape[axis] for axis in axes)
            case "pallas_call":
                # These are kernels of attention, which skip the blocks above the diagonal: about half of the grid.
                grid = math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int))
                total += grid * sum(inner) / 2
            case _ if name.startswith("dot_product_attention_"):
                total += _fused_attention_flops(name, equation)
            case _:
                total += sum(inner)
    return total


def _fused_attention_flops(name: str, equation: Any) -> float:
    """cuDNN's causal attention: half of two products forward, and of five backward."""
    q_shape, (_, num_keys, *_) = map(_shape, equation.invars[:2])
    products = 5 if "_bwd" in name else 2
    return products * 2 * math.prod(q_shape) * num_keys / 2


def _shape(variable: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = variable.aval.shape
    return shape


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among the parameters of an equation."""
    values = [one for value in params.values() for one in (value if isinstance(value, tuple | list) else [value])]
    return [inner for value in values if isinstance(inner := getattr(value, "jaxpr", value), core.Jaxpr)]


def memory_bytes(program: Program) -> float:
    """A lower bound on the bytes that a compiled program moves to and from the chip's main memory.

    Parameters are read once; the result of each instruction is written once and read once. Values inside a fusion or in
    the fast memory of a TPU core are not counted, nor are repeated reads.
    """
    total = sum(one.num_bytes for one in program.computations[program.entry].values() if one.opcode == "parameter")
    for _, instruction, times in program.runs():
        if instruction.opcode not in _FREE and not instruction.opcode.endswith("-start"):
            total += 2 * times * _written_bytes(instruction, program)
    return total


def _written_bytes(instruction: Instruction, program: Program) -> int:
    """Bytes of an instruction's result that are newly written to the chip's main memory."""
    if instruction.opcode == "custom-call" and "AllocateBuffer" in instruction.attributes:
        return 0
    inside, root = {}, instruction
    for fused in instruction.called("calls") if instruction.opcode == "fusion" else []:
        inside = program.computations[fused]
        root = next(one for one in inside.values() if one.is_root)
    while root.opcode == "bitcast":
        root = inside[root.operands[0]]
    if root.opcode == "dynamic-update-slice" and inside:
        return inside[root.operands[1]].num_bytes  # an update in place
    # On TPU, S(1) is the memory of the core.
    return sum(array.num_bytes for array in instruction.arrays if "S(" not in array.layout)
