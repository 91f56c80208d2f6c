"""Plans a run: compiles its training step for devices, present or described, and reports memory, FLOPs and traffic."""

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flax_decoder.config import Config
from flax_decoder.errors import UserError
from flax_decoder.nn.decoder import Decoder
from flax_decoder.parallel.mesh import make_mesh, num_row_devices, sharding_of, use_mesh
from flax_decoder.planning.collectives import bytes_by_kind, collectives_of, paper_bytes
from flax_decoder.planning.hlo import parse_hlo
from flax_decoder.planning.roofline import Roofline, memory_bytes, product_flops, roofline
from flax_decoder.planning.speed import DEFAULT_VOCAB_SIZE
from flax_decoder.training.flops import flops_per_token
from flax_decoder.training.hardware import chip_of
from flax_decoder.training.out_of_memory import size_after
from flax_decoder.training.step import TrainState, jit_step, state_maker, state_shardings


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per chip."""

    params: int
    optimizer: int
    batch: int
    temporaries: int  # what lives only during a step: activations, gradients, gathered weights
    program: int  # the compiled program, if it lies in the same memory
    capacity: float | None  # memory of the chip; None if unknown

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.params + self.optimizer + self.batch + self.temporaries + self.program

    @property
    def fits(self) -> bool | None:
        """Whether the chip has room for the total; None if its memory is unknown."""
        return None if self.capacity is None else self.total <= self.capacity


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cost of one training step."""

    device: str  # JAX's name of the chip
    mesh: dict[str, int]  # devices along each axis
    tokens: int  # per step, over all chips
    parameters: int  # of the model
    memory: Memory
    flops: float  # of matrix products per chip, with recomputation
    model_flops: float  # the same without recomputation
    sent_bytes: dict[str, float] | None  # per chip, by kind of collective; None if the step was too big to compile
    paper_bytes: dict[str, float]  # the same as expected for the layout
    roofline: Roofline | None  # None for an unknown chip, or a step that was not compiled
    compile_seconds: float

    def __str__(self) -> str:
        """The tables that the command prints."""
        layout = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1) or "not split"
        lines = [
            f"{math.prod(self.mesh.values())} x {self.device}: {layout}; compiled in {self.compile_seconds:.0f} s",
            f"{self.parameters:,} parameters, {self.tokens:,} tokens per step",
            "",
            *self._memory_lines(),
            "",
            *self._traffic_lines(),
            "",
            *self._time_lines(),
        ]
        return "\n".join(lines)

    def _memory_lines(self) -> Iterator[str]:
        memory = self.memory
        yield f"{'memory per chip':<28}{'GB':>10}"
        for name in ("params", "optimizer", "batch", "temporaries", "program"):
            yield f"  {name:<26}{getattr(memory, name) / 1e9:>10.3f}"
        verdict = ""
        if memory.capacity is not None:
            answer = "fits" if memory.fits else "does not fit"
            verdict = f"  of {memory.capacity / 1e9:.1f}: {answer}, {memory.total / memory.capacity:.0%}"
        yield f"  {'total':<26}{memory.total / 1e9:>10.3f}{verdict}"

    def _traffic_lines(self) -> Iterator[str]:
        sent, paper = self.sent_bytes or {}, self.paper_bytes
        yield f"{'sent per chip and step':<28}{'GB':>10}{'on paper':>10}"
        for kind in paper:
            if sent.get(kind) or paper[kind]:
                yield f"  {kind:<26}{_giga(sent.get(kind)):>10}{_giga(paper[kind]):>10}"
        total, paper_total = sum(sent.values()) if sent else None, sum(paper.values())
        ratio = f"  {total / paper_total:.2f} times" if total is not None and paper_total else ""
        yield f"  {'total':<26}{_giga(total):>10}{_giga(paper_total):>10}{ratio}"

    def _time_lines(self) -> Iterator[str]:
        yield (
            f"each chip computes {self.flops / 1e12:,.4g} TFLOP of matrix products per step, "
            f"{self.model_flops / 1e12:,.4g} without recomputation"
        )
        bounds = self.roofline
        if bounds is None:
            yield "the peak rates of this device are unknown" if self.sent_bytes is not None else ""
            return
        yield (
            f"at peak rates: compute {bounds.compute_seconds:.4g} s, memory {bounds.memory_seconds:.4g} s, "
            f"network {bounds.network_seconds:.4g} s"
        )
        yield (
            f"a step takes at least {bounds.overlapped_seconds:.4g} s, MFU at most {bounds.mfu_bound:.1%}; "
            f"{bounds.serial_seconds:.4g} s if nothing overlaps"
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, for JSON."""
        memory = dataclasses.asdict(self.memory) | {"total": self.memory.total, "fits": self.memory.fits}
        return dataclasses.asdict(self) | {"memory": memory}


def _giga(count: float | None) -> str:
    return "?" if count is None else f"{count / 1e9:,.3f}"


def make_plan(config: Config, devices: list[Any]) -> Plan:
    """Compiles the training step of a run for `devices` (see `devices_of`), without allocating any array.

    Raises:
        UserError: the config does not fit the devices.
    """
    config = dataclasses.replace(config, model=config.model.with_vocab_size(_vocab_size(config)))
    mesh = make_mesh(config, devices)
    kind = mesh.devices.flat[0].device_kind
    chip = chip_of(kind)
    with use_mesh(mesh):
        state, batch = abstract_arguments(config, mesh)
        traced = jit_step(state, mesh, deterministic=config.training.deterministic).trace(state, batch)
        start = time.perf_counter()
        try:
            compiled, refusal = traced.lower().compile(), None
        except jax.errors.JaxRuntimeError as error:
            compiled, refusal = None, error
        compile_seconds = time.perf_counter() - start

    tokens = config.training.batch_size * config.model.context_length
    flops = product_flops(traced.jaxpr.jaxpr) / mesh.size
    adapters = None if state.frozen is None else _count(state.params)
    model_flops = flops_per_token(config.model, "causal", adapters) * tokens / mesh.size
    sent, bounds = None, None
    if compiled is not None:
        program = parse_hlo(compiled.as_text())
        sent = bytes_by_kind(collectives_of(program))
        if chip is not None:
            bounds = roofline(
                chip,
                flops=flops,
                model_flops=model_flops,
                memory_bytes=memory_bytes(program),
                wire_bytes=sum(sent.values()),
            )
    return Plan(
        device=kind,
        mesh=dict(mesh.shape),
        tokens=tokens,
        parameters=_count(state.all_params),
        memory=_memory(state, batch, compiled or refusal, _capacity(mesh)),
        flops=flops,
        model_flops=model_flops,
        sent_bytes=sent,
        paper_bytes=paper_bytes(config, state.params, mesh.shape, state.frozen),
        roofline=bounds,
        compile_seconds=compile_seconds,
    )


def abstract_arguments(config: Config, mesh: Mesh) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """Shapes and shardings of the state and of a batch."""
    make = state_maker(Decoder(config.model), config, num_row_devices(mesh))
    state = jax.eval_shape(lambda: make(jax.random.key(0)))
    state = jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), state, state_shardings(mesh, state))
    shape = config.training.batch_size, config.model.context_length
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding_of(mesh, "batch", "length"))
    names = ("inputs", "targets", "positions") if mesh.shape["context"] > 1 else ("inputs", "targets")
    return state, dict.fromkeys(names, tokens)


def _vocab_size(config: Config) -> int:
    """The vocabulary size, without reading the text: for a tokenizer that depends on it, a typical size."""
    match config.data.tokenizer:
        case _ if config.model.vocab_size is not None:
            return config.model.vocab_size
        case "bpe":
            return config.data.bpe_vocab_size
        case "char" | "byte":
            return DEFAULT_VOCAB_SIZE
    raise UserError("model.vocab_size is not set, and a plan reads no tokenizer: give --model.vocab-size N")


def _capacity(mesh: Mesh) -> float | None:
    """The memory of a chip: from the device if it is present, else from the table."""
    device = mesh.devices.flat[0]
    try:
        stats = device.memory_stats() or {}
    except (jax.errors.JaxRuntimeError, NotImplementedError):  # a described device
        stats = {}
    chip = chip_of(device.device_kind)
    return stats.get("bytes_limit", None if chip is None else chip.memory_bytes)


def _memory(state: Any, batch: Any, outcome: Any, capacity: float | None) -> Memory:
    """The memory of a step per chip; `outcome` is the compiled step, or the error that the compiler raised."""
    parts = {"params": state.all_params, "optimizer": (state.opt_state, state.step), "batch": batch}
    sizes = {name: sum(map(_bytes_per_device, jax.tree.leaves(tree))) for name, tree in parts.items()}
    if isinstance(outcome, Exception):
        temporaries, program = _refused_temporaries(outcome, sum(sizes.values())), 0
    else:
        stats = outcome.memory_analysis()
        # The next state takes the memory of the donated one; only other outputs need their own.
        temporaries = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
        program = stats.generated_code_size_in_bytes
    return Memory(**sizes, temporaries=temporaries, program=program, capacity=capacity)


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _bytes_per_device(leaf: jax.ShapeDtypeStruct) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def _refused_temporaries(error: Exception, state_bytes: int) -> int:
    """The temporaries of a step, from the compiler's out-of-memory error; raises any other error again."""
    temporaries = size_after("HLO temporaries", str(error))
    if temporaries is not None:
        return temporaries
    used = size_after("Used", str(error))
    if used is None:
        raise error
    return used - state_bytes
