from pathlib import Path

import pytest

from flax_decoder.training.advice import advice, next_commands


def validation(*losses):
    """Rows with these validation losses, at steps 100, 200 and so on; between them, lines without."""
    rows = []
    for number, loss in enumerate(losses, 1):
        rows += [{"step": 100 * number - 50, "train_loss": 1.0}, {"step": 100 * number, "val_loss": loss}]
    return rows


@pytest.mark.parametrize(
    ("losses", "parts"),
    [
        ((3.0, 2.5, 2.2, 2.0, 1.9), ["falling", "--training.num-steps 1000"]),
        ((3.0, 2.0, 2.2, 2.4, 2.6), ["risen since step 200", "overfitting", "200 steps"]),
        ((3.0, 2.0, 1.999, 1.998, 1.997), ["settled"]),
        ((3.0, 2.0, 2.0, 2.0, 2.001), ["settled"]),
        ((), ["Only one evaluation"]),
        ((2.0,), ["Only one evaluation"]),
    ],
)
def test_advice_follows_the_validation_loss(losses, parts):
    text = advice(validation(*losses))
    assert all(part in text for part in parts)


@pytest.mark.parametrize(
    ("sample", "prompt"),
    [
        ("\n 12_The func", "The"),
        ("été", "été"),
        ("在北京的天空下" * 9, ("在北京的天空下" * 3)[:20]),
        ("--- 3 ---", "TEXT"),
        ("", "TEXT"),
    ],
)
def test_what_to_do_next_stands_in_two_lines_that_can_be_copied(sample, prompt):
    lines = next_commands(Path("my runs/x"), sample).splitlines()
    assert [
        f" flax-decoder {name} 'my runs/x' --prompt {prompt}" in line
        for name, line in zip(("generate", "lens"), lines, strict=True)
    ] == [True, True]
    assert lines[1].endswith("docs/tour.md")
