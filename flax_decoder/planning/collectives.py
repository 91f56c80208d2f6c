"""What devices send each other in a step: as the compiled program does it, and as the layout needs it on paper."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flax_decoder.config import Config
from flax_decoder.nn.axes import logical_axes
from flax_decoder.parallel.mesh import RULES
from flax_decoder.planning.hlo import Instruction, Program

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices.

    Attributes:
        kind: one of `KINDS`.
        operand_bytes: what each device puts in.
        group_size: how many devices take part in one exchange.
        times: how often it runs in a step.
    """

    kind: str
    operand_bytes: int
    group_size: int
    times: int

    @property
    def wire_bytes(self) -> float:
        """What one device sends in a step, on a ring of the group (Patarasuk and Yuan 2009).

        Gathering sends each part past all others; scattering a sum is that backwards; an all-reduce does both.
        """
        n, size = self.group_size, self.operand_bytes
        sent = {
            "all-gather": size * (n - 1),
            "reduce-scatter": size * (n - 1) / n,
            "all-reduce": 2 * size * (n - 1) / n,
            "all-to-all": size * (n - 1) / n,
            "collective-permute": size,
        }
        return sent[self.kind] * self.times


def collectives_of(program: Program) -> list[Collective]:
    """All exchanges of a compiled program; the parts of one that runs beside other work count once."""
    found = []
    seen = set()
    for name, instruction, times in program.runs():
        computation = program.computations[name]
        if (kind := _kind(instruction)) is not None:
            found.append(_collective(kind, instruction, computation, program, times))
        for fused in instruction.called("calls") if instruction.opcode == "fusion" else []:
            inside = program.computations[fused]
            for part in inside.values():
                if (kind := _kind(part)) is None:
                    continue
                # A TPU begins, continues and ends an exchange in three fusions that all show it.
                channel = re.search(r"channel_id=(\d+)", part.attributes)
                if channel and channel[0] in seen:
                    continue
                seen.add(channel[0] if channel else part.name)
                # It also fuses a sum with the slice that a device keeps of it, and then sends no more than for that.
                scatters = kind == "all-reduce" and any(
                    other.is_root and other.opcode == "dynamic-slice" and part.name in other.operands
                    for other in inside.values()
                )
                found.append(_collective("reduce-scatter" if scatters else kind, part, inside, program, times))
    return found


def _kind(instruction: Instruction) -> str | None:
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _collective(
    kind: str, instruction: Instruction, computation: Mapping[str, Instruction], program: Program, times: int
) -> Collective:
    size = sum(computation[name].num_bytes for name in instruction.operands)
    group = 2 if kind == "collective-permute" else _group_size(instruction.attributes, program.num_partitions)
    return Collective(kind, size, group, times)


def _group_size(attributes: str, num_partitions: int) -> int:
    """How many devices exchange with each other, from any of the forms in which HLO lists the groups."""
    if listed := re.search(r"replica_groups=\{(\{[\d,]*\})?", attributes):
        return len(listed[1].split(",")) if listed[1] else num_partitions
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=", attributes):
        return int(counted[1].split(",")[-1])
    # Axes of a mesh, or parts of them: mesh['a'=2,'b'=4] {'b', 'a':(1)2}
    named = re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", attributes)
    if named is None:
        raise ValueError(f"the groups of a collective are written in an unknown form: {attributes[:200]}")
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2]))


def bytes_by_kind(collectives: list[Collective]) -> dict[str, float]:
    """What one device sends in a step, by kind of exchange."""
    return {kind: sum(one.wire_bytes for one in collectives if one.kind == kind) for kind in KINDS}


def paper_bytes(config: Config, params: Any, mesh_sizes: Mapping[str, int]) -> dict[str, float]:
    """What one device must send in a step for its layout, by kind of exchange, counted without a compiler.

    * fsdp: each weight is gathered for the forward and again for the backward pass, and its gradient scattered, once
      for each part of the batch: three times the parameters (Rajbhandari et al. 2020, section 7.2.2).
    * data, context: gradients are summed over the devices that hold the same weights, once a step.
    * tensor: four all-reduces of the activations a layer, two forward and two backward (Shoeybi et al. 2020, section
      3), one of the embeddings and one of the head's gradient.
    * context: keys and values are passed around forward and backward, and their gradients once.

    Args:
        config: the run.
        params: the parameters or their shapes.
        mesh_sizes: devices along each axis of the mesh.

    Returns:
        Bytes for each of `KINDS`, in the compute dtype, as activations, weights at work and their gradients are.
    """
    model, num_parts = config.model, config.training.accumulation_steps
    item_bytes = jnp.dtype(model.dtype).itemsize
    data, fsdp, context, tensor = (mesh_sizes[axis] for axis in ("data", "fsdp", "context", "tensor"))
    spread = dict(RULES)
    sent = dict.fromkeys(KINDS, 0.0)
    for leaf, axes in zip(jax.tree.leaves(params), jax.tree.leaves(logical_axes(params)), strict=True):
        split = {spread.get(axis) for axis in axes if axis is not None}
        size = leaf.size * item_bytes / (tensor if "tensor" in split else 1)
        copies = data * context
        if "fsdp" in split:
            sent["all-gather"] += num_parts * 2 * _share(fsdp) * size
            sent["reduce-scatter"] += num_parts * _share(fsdp) * size
            size /= fsdp
        else:
            copies *= fsdp
        sent["all-reduce"] += 2 * _share(copies) * size
    tokens = config.training.batch_size * model.context_length / (data * fsdp * context)
    activations = tokens * model.embed_dim * item_bytes
    sent["all-reduce"] += (4 * model.num_layers + 2) * 2 * _share(tensor) * activations
    keys_values = 2 * tokens * model.kv_heads / tensor * model.head_width * item_bytes
    sent["collective-permute"] += model.num_layers * 3 * (context - 1) * keys_values
    return sent


def _share(n: int) -> float:
    """The part of an array that a device of n sends when all gather it, or scatter its sum, around a ring."""
    return (n - 1) / n
