import dataclasses
from pathlib import Path

import pytest

from flax_decoder.config import Config, OptimizerConfig, TrainingConfig
from flax_decoder.training.advice import advice, changes_of_schedule, how_to_prolong, next_commands

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
            FALLING, None, COSINE, 2, ["Still falling", "new run with --training.num-steps 2000",
            "--optimizer.restarts 1000:", "wsd, prolong the run before"], id="falling, cosine",
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


def test_more_steps_come_with_a_restart_where_the_rate_would_jump():
    longer = "--training.num-steps 2000"
    assert how_to_prolong(CONSTANT, 1000) == longer == how_to_prolong(OptimizerConfig(final_fraction=1.0), 1000)
    assert how_to_prolong(WSD, 1000) == f"{longer} --optimizer.restarts 1000"
    assert how_to_prolong(OptimizerConfig(restarts=(300,)), 1000) == f"{longer} --optimizer.restarts '[300, 1000]'"


def test_what_a_run_with_other_steps_does_is_said():
    def lines(saved, asked, done, **optimizer):
        one, other = (Config(training=TrainingConfig(num_steps=steps)) for steps in (saved, asked))
        return changes_of_schedule(one, dataclasses.replace(other, optimizer=OptimizerConfig(**optimizer)), done)

    assert lines(1000, 1000, 500) == [] == lines(1000, 1000, 500, weight_decay=0.2)
    (line,) = lines(1000, 2000, 1000)
    assert "at 0.00059 instead of 0.0001" in line and "--optimizer.restarts 1000 would" in line
    (line,) = lines(1000, 2000, 1000, restarts=1000)
    assert "at 0.00012 instead of 0.0001, where its schedule begins anew" in line and "--optimizer" not in line
    (line,) = lines(2000, 1000, 800)
    assert "at 0.00019 instead of 0.00073" in line and "--optimizer" not in line


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
