import jax
import jax.numpy as jnp
import pytest

from flax_decoder.planning.hlo import parse_hlo

# A loop as the TPU compiler writes it: without a trip count. The counter starts at 1 and goes in steps of 2 (unrolled
# twice), and its bound comes from outside the loop.
COUNTED = """HloModule step, is_scheduled=true, num_partitions=4

%condition (wide.1: (s32[], f32[8], s32[])) -> pred[] {
  %wide.1 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}, s32[]{:T(128)}) parameter(0)
  %element.1 = s32[]{:T(128)} get-tuple-element(%wide.1), index=0
  %bound.1 = s32[]{:T(128)} get-tuple-element(%wide.1), index=2
  ROOT %compare.1 = pred[]{:T(512)} compare(%element.1, %bound.1), direction=LT
}

%body (wide.2: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %wide.2 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}, s32[]{:T(128)}) parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %element.2 = s32[]{:T(128)} get-tuple-element(%wide.2), index=0
  %copy.2 = s32[]{:T(128)} copy(%element.2), backend_config={"aliasing":{"lists":[]}}
  %add.2 = s32[]{:T(128)} add(%copy.2, %two)
  %values.2 = f32[8]{0:T(128)} get-tuple-element(%wide.2), index=1
  %bound.2 = s32[]{:T(128)} get-tuple-element(%wide.2), index=2
  ROOT %tuple.2 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}, s32[]{:T(128)}) tuple(%add.2, %values.2, /*index=2*/%bound.2)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %last = s32[]{:T(128)} constant(8), metadata={op_name="scan"}
  %copy.0 = s32[]{:T(128)} copy(%one)
  %tuple.0 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}, s32[]{:T(128)}) tuple(%copy.0, %p, %last)
  %while.0 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}, s32[]{:T(128)}) while(%tuple.0), condition=%condition, body=%body
  ROOT %result = f32[8]{0:T(128)} get-tuple-element(%while.0), index=1
}
"""


def trip_counts(text):
    program = parse_hlo(text)
    return {
        one.name: program.trip_count(one, caller)
        for caller, computation in program.computations.items()
        for one in computation.values()
        if one.opcode == "while"
    }


def test_the_trip_count_of_a_loop_comes_from_its_counter():
    program = parse_hlo(COUNTED)
    assert (program.entry, program.num_partitions) == ("main", 4)
    assert trip_counts(COUNTED) == {"while.0": 4}  # 1, 3, 5, 7
    times = {instruction.name: times for _, instruction, times in program.runs()}
    assert (times["add.2"], times["while.0"]) == (4, 1)


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ("direction=LT", "direction=GT"),
        ("add(%copy.2, %two)", "multiply(%copy.2, %two)"),
        ("constant(1)", "parameter(1)"),
    ],
)
def test_other_loops_are_refused(written, instead):
    assert written in COUNTED
    with pytest.raises(ValueError, match="number of iterations"):
        trip_counts(COUNTED.replace(written, instead))


def test_nested_loops_multiply():
    def inner(x, _):
        return jnp.sin(x) @ x, None

    def outer(x, _):
        return jax.lax.scan(inner, x, length=5)[0], None

    compiled = jax.jit(lambda x: jax.lax.scan(outer, x, length=3)[0]).lower(jnp.ones((7, 7))).compile()
    program = parse_hlo(compiled.as_text())
    products = [(one, times) for _, one, times in program.runs() if one.opcode in ("dot", "fusion", "custom-call")]
    assert max(times for _, times in products) == 15
    assert all(one.num_bytes == 7 * 7 * 4 for one, times in products if times == 15 and one.opcode == "dot")


@pytest.mark.parametrize(
    ("shape", "num_bytes"),
    [
        ("bf16[3,5]{1,0:T(8,128)(2,1)S(1)}", 30),
        ("(f32[2]{0}, /*index=1*/u8[7]{0}, pred[])", 16),
        ("f8e4m3fn[11]{0}", 11),
        ("s4[6]{0:E(4)}", 3),
        ("c64[2]{0}", 16),
        ("f32[]", 4),
        ("token[]", 0),
    ],
)
def test_the_size_of_shapes(shape, num_bytes):
    program = parse_hlo(f"ENTRY %main (p: f32[1]) -> f32[1] {{\n  ROOT %x.1 = {shape} custom-call(%p), a=1\n}}")
    instruction = program.computations["main"]["x.1"]
    assert (instruction.num_bytes, instruction.operands, instruction.is_root) == (num_bytes, ("p",), True)
