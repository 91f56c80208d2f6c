import dataclasses
from pathlib import Path

import pytest

from flax_decoder.config import Config, OptimizerConfig
from flax_decoder.training.advice import advice, changes_at_seam, next_commands, prolonging

COSINE, CONSTANT, WSD = (OptimizerConfig(schedule=name) for name in ("cosine", "constant", "wsd"))
FALLING = (3.0, 2.6, 2.4, 2.25, 2.15, 2.05, 2.0, 1.95, 1.92, 1.9)
FLAT = (3.0, 2.1, 2.01, 2.0, 2.0, 1.995, 2.0, 1.994, 1.993, 1.993)


def curves(losses, train=None):
    """Rows with these validation losses, at steps 100, 200 and so on, and training losses, the same if none."""
    rows = []
    for number, (loss, below) in enumerate(zip(losses, train or losses, strict=True), 1):
        rows += [{"step": 100 * number - 5, "train_loss": below}, {"step": 100 * number - 2, "train_loss": "unknown"}]
        rows += [{"step": 100 * number, "train_loss": below, "val_loss": loss}]
    return rows


@pytest.mark.parametrize(
    ("losses", "train", "optimizer", "epochs", "parts"),
    [
        pytest.param((), None, COSINE, 2, ["No evaluation", "--training.eval-every 100"], id="none"),
        pytest.param(
            (*FALLING[:7], 1.99, 1.985, 1.985), None, COSINE, 2, ["Still falling"], id="flat only as the cosine ends"
        ),
        pytest.param((2.0,), None, COSINE, 2, ["Only one evaluation", "more often"], id="one"),
        pytest.param(
            FALLING, None, COSINE, 2, ["Still falling", "new run with --training.num-steps 2000", "0.0001 to 0.00059",
            "wsd, prolong the run before"], id="falling, cosine",
        ),
        pytest.param(
            FALLING, None, CONSTANT, 2, ["Still falling", "--training.num-steps 2000 goes on at the same"],
            id="falling, constant",
        ),
        pytest.param(
            FALLING, None, WSD, 2, ["Still falling", "prolong it before step 800"], id="falling, wsd"
        ),
        pytest.param(
            (*FLAT[:8], 1.95, 1.85), None, WSD, 2, ["settled", "larger model"], id="falling only as the rate falls"
        ),
        pytest.param(
            (3.0, 2.0, 1.6, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 2.1), (3.0, 2.0, 1.4, 1.2, 1.0, 0.8, 0.6, 0.5, 0.4, 0.4),
            COSINE, 30, ["since step 400: overfitting", "30.0 times", "400 steps", "--step best"], id="overfitting",
        ),
        pytest.param(
            (3.0, 2.0, 1.6, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 2.1), (3.0, 2.0, 1.4, 1.2, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1),
            COSINE, 0.4, ["since step 400", "no text was read twice", "Shuffle"], id="another kind of text at the end",
        ),
        pytest.param(
            (3.0, 2.6, 2.5, 3.0, 4.0, 4.5), None, COSINE, 2, ["step 300, and training", "learning-rate 0.0003"],
            id="diverging",
        ),
        pytest.param(
            (3.0, 2.2, 2.0, 1.9, 2.4, 2.3, 2.15, 2.0), None, COSINE, 2, ["falls again", "from step 400", "longer"],
            id="warmed up again",
        ),
        pytest.param(
            (4.62, 4.61, 4.6, 4.6, 4.6), None, COSINE, 2, ["ln V = 4.61", "learning-rate 0.003 or 0.0003"],
            id="not learning",
        ),
        pytest.param(FLAT, None, COSINE, 9, ["settled", "near it: a larger model would"], id="model too small"),
        pytest.param(
            FLAT, [0.8 * loss for loss in FLAT], COSINE, 9, ["settled", "at 1.59: more text", "larger model would not"],
            id="text too small",
        ),
        pytest.param(FLAT, None, COSINE, 0.74, ["only 74% of the", "fallen to 0.0001,", "longer"], id="rate too low"),
        pytest.param(FLAT, None, CONSTANT, 0.74, ["full learning rate", "schedule cosine or wsd"], id="rate never low"),
        pytest.param(
            (3.0, 2.0, 2.1, 2.0, 2.12, 2.0, 2.1, 2.0, 2.11, 2.005), None, CONSTANT, 9, ["flat", "let the rate fall"],
            id="up and down",
        ),
    ],
)  # fmt: skip
def test_advice_is_what_a_practitioner_would_say(losses, train, optimizer, epochs, parts):
    num_steps = 100 * max(len(losses), 10)
    text = advice(curves(losses, train), optimizer, num_steps=num_steps, epochs=epochs, vocab_size=100)
    assert [part for part in parts if part not in text] == [], text
    assert len(text.splitlines()) <= 2


def test_what_more_steps_do_to_the_rate():
    assert prolonging(CONSTANT, 1000) == "" == prolonging(OptimizerConfig(final_fraction=1.0), 1000)
    assert prolonging(WSD, 1000) == "raises its learning rate from 0.0001 to 0.001"


def test_what_more_steps_change_is_told_where_the_run_goes_on():
    def of(num_steps, **optimizer):
        config = Config(optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=10, **optimizer))
        return dataclasses.replace(config, training=dataclasses.replace(config.training, num_steps=num_steps))

    assert changes_at_seam(of(1000), of(2000), 1000) == [
        "the learning rate rises from 0.0001 to 0.00055 here, as the run now has 2000 steps instead of 1000; "
        "the loss rises too, for a while"
    ]
    assert changes_at_seam(of(1000), of(1000), 500) == []
    assert changes_at_seam(of(1000, schedule="constant"), of(2000, schedule="constant"), 1000) == []
    assert changes_at_seam(of(1000, schedule="wsd"), of(2000, schedule="wsd"), 700) == []


@pytest.mark.parametrize(
    ("sample", "prompt"),
    [
        ("a func, a b, a func", "func"),
        ("a b a", "a"),
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
        line.endswith(f": flax-decoder {name} 'my runs/x' --prompt {prompt}")
        for name, line in zip(("generate", "lens"), lines, strict=True)
    ] == [True, True]
    assert "docs/tour.md" in lines[1]
