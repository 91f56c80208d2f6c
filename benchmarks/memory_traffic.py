"""Bytes that a training step reads and writes in the memory of the device, by the text of the compiled program.

    pip install -e . && python benchmarks/memory_traffic.py
    pip install -e ".[cuda13]" && python benchmarks/memory_traffic.py --topology h100:1 [--json FILE] [--against FILE]
        [--batch-size N] [--model.FIELD VALUE] [--training.FIELD VALUE]

The step is that of GPT-2 124M with 32 x 1,024 tokens (`gpu_train.py`). It is compiled for the devices at hand or,
without having them, for those of a topology (`flax-decoder plan --help`); nothing is computed. Each instruction of the
program reads its operands from memory and writes its result, a fusion as a whole; where only a slice of an operand is
read, the slice counts. Caches are not modelled. `--against` compares with the JSON file of another run.
"""

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from gpu_train import SHAPES, changes_of, config_of

from flax_decoder.planning.hlo import Instruction, Program, parse_hlo
from flax_decoder.planning.topology import LOCAL, devices_of, prepare

# Instructions that move nothing.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
SLICES = {"slice", "dynamic-slice", "gather"}
# What an instruction belongs to: the first that is found in the name JAX gave it.
PARTS = {
    "attention": r"/attention/|dot_product_attention",
    "norms": r"_norm\b|/Norm",
    "feed-forward": r"feed_forward",
    "loss and head": r"logits|cross_entropy|summed_losses|chunk|loss",
    "optimizer": r"adam|clip|apply_gradients|cond|norm",
    "embedding": r"embed|look_up|scatter",
}


def main(arguments: list[str] | None = None) -> None:
    """Prints the bytes of each part of a step, and the instructions that move most."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default=LOCAL)
    parser.add_argument("--shape", choices=SHAPES, default="124M")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape of the same kind")
    parser.add_argument("--batch-size", metavar="N", help="sequences per step")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="instructions to list")
    parser.add_argument("--hlo", type=Path, metavar="FILE", help="write the text of the program")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--against", type=Path, metavar="FILE", help="the JSON file of another run")
    options, rest = parser.parse_known_args(arguments)
    prepare(options.topology)
    changes = changes_of(rest) | ({"training.batch_size": options.batch_size} if options.batch_size else {})
    text = compiled_step(options.shape, changes, options.topology, options.tiny)
    if options.hlo:
        options.hlo.write_text(text, encoding="utf-8")
    moved = traffic(parse_hlo(text))
    before = json.loads(options.against.read_text(encoding="utf-8"))["GB"] if options.against else {}
    by_part: Counter[str] = Counter()
    for row in moved:
        by_part[row["part"]] += row["GB"]
    by_part["all"] = sum(by_part.values())
    for part, count in by_part.most_common():
        compared = f"  before {before[part]:8.2f}  {count / before[part]:6.1%}" if before.get(part) else ""
        print(f"{part:<24}{count:10.2f} GB{compared}")
    print()
    for row in sorted(moved, key=lambda row: row["GB"], reverse=True)[: options.top]:
        print(f"{row['GB']:8.2f} GB  {row['name']}  {row['from']}")
    if options.json:
        options.json.write_text(json.dumps({"GB": by_part, "instructions": moved}, indent=1), encoding="utf-8")


def compiled_step(shape: str, changes: dict[str, Any], topology: str, tiny: bool = False) -> str:
    """The text of a training step compiled for the first device of a topology; call `prepare` first."""
    from flax_decoder.parallel.mesh import make_mesh, use_mesh
    from flax_decoder.planning.plan import abstract_arguments
    from flax_decoder.training.step import jit_step

    config = config_of(shape, changes, tiny)
    mesh = make_mesh(config, devices_of(topology)[:1])
    with use_mesh(mesh):
        state, batch = abstract_arguments(config, mesh)
        return (
            jit_step(state, mesh, deterministic=config.training.deterministic).lower(state, batch).compile().as_text()
        )


def traffic(program: Program) -> list[dict[str, Any]]:
    """Each instruction that moves bytes: its name, the name JAX gave it ("from"), its part, and GB per step."""
    rows = []
    for computation, one, times in program.runs():
        if one.opcode in FREE or one.opcode.endswith("-done"):
            continue
        num_bytes = times * (bytes_read(one, program, computation) + bytes_written(one, program))
        origin = re.search(r'op_name="([^"]*)"', one.attributes)
        name = origin[1] if origin else ""
        part = next((part for part, pattern in PARTS.items() if re.search(pattern, name)), "other")
        is_product = one.opcode == "dot" or re.search(r'custom_call_target="__cublas|"__triton_gemm"', one.attributes)
        part += ", products" if is_product else ""
        rows.append({"name": one.name, "from": name, "part": part, "GB": num_bytes / 1e9})
    return rows


def bytes_read(one: Instruction, program: Program, computation: str) -> float:
    """Bytes of the operands of an instruction, of which each counts once."""
    outside = program.computations[computation]
    inside = fused(one, program)
    total = 0
    for i, operand in enumerate(one.operands):
        if operand in one.operands[:i] or operand not in outside or outside[operand].opcode == "constant":
            continue
        if one.opcode in SLICES and i == 0:
            total += one.num_bytes
            continue
        slices = slices_of_parameter(inside, i) if inside else None
        total += outside[operand].num_bytes if slices is None else sum(part.num_bytes for part in slices)
    return total


def bytes_written(one: Instruction, program: Program) -> float:
    """Bytes of the result of an instruction; of an update in place, those of the update."""
    inside = fused(one, program)
    root = next((part for part in inside.values() if part.is_root), one)
    while root.opcode == "bitcast":
        root = inside[root.operands[0]]
    if root.opcode == "dynamic-update-slice" and inside:
        return inside[root.operands[1]].num_bytes
    # Beside its result, the call of a library has some memory to work in, which it may leave alone.
    arrays = [array for array in one.arrays if one.opcode != "custom-call" or array.dtype not in ("s8", "u8")]
    return sum(array.num_bytes for array in arrays)


def fused(one: Instruction, program: Program) -> dict[str, Instruction]:
    """The instructions of a fusion, by name; of another instruction none."""
    return {
        name: part
        for callee in (one.called("calls") if one.opcode == "fusion" else [])
        for name, part in program.computations[callee].items()
    }


def parameter_number(one: Instruction) -> int:
    """Which operand of the fusion a parameter is."""
    return int(re.match(r"\d+", one.attributes)[0]) if one.opcode == "parameter" else -1


def slices_of_parameter(inside: dict[str, Instruction], index: int) -> list[Instruction] | None:
    """What a fusion reads of one of its operands, if that is only slices; None if it reads all of it.

    An operand that is updated in place is not read.
    """
    names = {name for name, one in inside.items() if parameter_number(one) == index}
    slices: list[Instruction] = []
    for one in inside.values():  # in the order of the text: operands come first
        if not names & set(one.operands):
            continue
        if one.opcode == "bitcast":
            names.add(one.name)
        elif names & set(one.operands[1:]) or one.opcode not in (*SLICES, "dynamic-update-slice"):
            return None
        elif one.opcode in SLICES:
            slices.append(one)
    return slices


if __name__ == "__main__":
    sys.exit(main())
