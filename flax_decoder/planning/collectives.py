"""Bytes that devices send each other in a training step: counted in the compiled program, and expected on paper."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flax_decoder.config import Config
from flax_decoder.nn.axes import logical_axes
from flax_decoder.nn.precision import accumulation_dtype
from flax_decoder.parallel.mesh import RULES
from flax_decoder.planning.hlo import Instruction, Program

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation."""

    kind: str  # one of KINDS
    operand_bytes: int  # input per device
    group_size: int  # devices that communicate with each other
    times: int  # executions per step

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends per step with ring algorithms (Patarasuk and Yuan 2009)."""
        n, size = self.group_size, self.operand_bytes
        sent = {
            "all-gather": size * (n - 1),
            "reduce-scatter": size * _sent_fraction(n),
            "all-reduce": 2 * size * _sent_fraction(n),  # a reduce-scatter, then an all-gather of the sums
            "all-to-all": size * _sent_fraction(n),
            "collective-permute": size,
        }
        return sent[self.kind] * self.times


def collectives_of(program: Program) -> list[Collective]:
    """All collectives of a compiled program; the start and the end of an asynchronous one count once."""
    found = []
    seen = set()
    for name, instruction, times in program.runs():
        if one := _collective(instruction, program.computations[name], program.num_partitions, times):
            found.append(one)
        for callee in instruction.called("calls") if instruction.opcode == "fusion" else []:
            fused = program.computations[callee]
            for part in fused.values():
                if (one := _collective(part, fused, program.num_partitions, times)) is None:
                    continue
                # On TPU the start, the middle and the end of a collective are three fusions that all contain it.
                channel = re.search(r"channel_id=(\d+)", part.attributes)
                if channel and channel[0] in seen:
                    continue
                seen.add(channel[0] if channel else part.name)
                # A TPU fuses an all-reduce with the slice that the device keeps, and then sends a reduce-scatter.
                root = next(other for other in fused.values() if other.is_root)
                sliced = root.opcode == "dynamic-slice" and part.name in root.operands
                found.append(dataclasses.replace(one, kind="reduce-scatter") if sliced else one)
    return found


def _collective(
    instruction: Instruction, computation: Mapping[str, Instruction], num_partitions: int, times: int
) -> Collective | None:
    """The collective that an instruction is or starts, if any."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    operand_bytes = sum(computation[name].num_bytes for name in instruction.operands)
    group = 2 if kind == "collective-permute" else _group_size(instruction.attributes, num_partitions)
    return Collective(kind, operand_bytes, group, times)


def _group_size(attributes: str, num_partitions: int) -> int:
    """Devices per replica group, from any of the forms in which HLO lists the groups."""
    # {{0,1},{2,3}}, or {} for one group of all devices
    if listed := re.search(r"replica_groups=\{(\{[\d,]*\})?", attributes):
        return len(listed[1].split(",")) if listed[1] else num_partitions
    # [2,4]<=[8]: two groups of four
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=", attributes):
        return int(counted[1].split(",")[-1])
    # mesh['a'=2,'b'=4] {'b', 'a':(1)2}: axes of a mesh, or parts of them
    named = re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", attributes)
    if named is None:
        raise ValueError(f"the replica groups of a collective have an unknown form: {attributes[:200]}")
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2]))


def bytes_by_kind(collectives: list[Collective]) -> dict[str, float]:
    """Bytes that a device sends per step, by kind of collective."""
    return {kind: sum(one.wire_bytes for one in collectives if one.kind == kind) for kind in KINDS}


def paper_bytes(config: Config, params: Any, mesh_sizes: Mapping[str, int], frozen: Any = None) -> dict[str, float]:
    """Bytes that a device must send per step for its layout, by kind of collective, computed without a compiler.

    * fsdp: each weight is gathered for the forward and again for the backward pass, and its gradient is scattered, once
      per accumulation step: three times the parameters (Rajbhandari et al. 2020, section 7.2.2).
    * data, context: gradients are summed over the devices with the same weights, once per step.
    * tensor: four all-reduces of the activations per layer, two forward and two backward (Shoeybi et al. 2020, section
      3), one of the embeddings and one of the head's gradient.
    * context: keys and values travel around the ring forward and backward, and their gradients once.

    Activations and gathered weights are in the compute dtype, gradients in float32. `params`, which may be abstract,
    learn; those that are `frozen` have no gradient to send.
    """
    model = config.model
    item_bytes = jnp.dtype(model.dtype).itemsize
    data, fsdp, context, tensor = (mesh_sizes[axis] for axis in ("data", "fsdp", "context", "tensor"))
    widening = accumulation_dtype(model.dtype).itemsize / item_bytes
    num_parts = config.training.num_parts(data * fsdp)
    mesh_axis_of = dict(RULES)
    sent = dict.fromkeys(KINDS, 0.0)
    both = [(leaf, axes, True) for leaf, axes in _with_axes(params)]
    for leaf, axes, learns in both + [(leaf, axes, False) for leaf, axes in _with_axes(frozen)]:
        split = {mesh_axis_of.get(axis) for axis in axes if axis is not None}
        size = leaf.size * item_bytes / (tensor if "tensor" in split else 1)
        copies = data * context
        if "fsdp" in split:
            sent["all-gather"] += num_parts * 2 * _sent_fraction(fsdp) * size
            sent["reduce-scatter"] += learns * num_parts * _sent_fraction(fsdp) * size * widening
            size /= fsdp
        else:
            copies *= fsdp
        sent["all-reduce"] += learns * 2 * _sent_fraction(copies) * size * widening
    tokens = config.training.batch_size * model.context_length / (data * fsdp * context)
    activations = tokens * model.embed_dim * item_bytes
    sent["all-reduce"] += (4 * model.num_layers + 2) * 2 * _sent_fraction(tensor) * activations
    keys_values = 2 * tokens * model.kv_heads / tensor * model.head_width * item_bytes
    sent["collective-permute"] += model.num_layers * 3 * (context - 1) * keys_values
    return sent


def _with_axes(params: Any) -> list[tuple[Any, Any]]:
    return list(zip(jax.tree.leaves(params), jax.tree.leaves(logical_axes(params)), strict=True))


def _sent_fraction(n: int) -> float:
    """The fraction of an array that each of n devices sends to gather it, or to scatter its sum, around a ring."""
    return (n - 1) / n
