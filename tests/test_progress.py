import io

import pytest
from rich.console import Console

from flax_decoder.training import progress
from flax_decoder.training.progress import Progress


def row(step, **more):
    return {"step": step, "train_loss": 2.5, "tokens_per_second": 50.0, "mfu": "unknown", **more}


def shown(monkeypatch, terminal, *rows):
    output = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda **settings: Console(file=output, force_terminal=terminal, width=100, **settings)
    )
    with Progress(num_steps=400, step=0, tokens_per_step=10) as shown_progress:
        for one in rows:
            shown_progress.update(one)
    return output.getvalue()


def test_without_a_terminal_there_are_plain_lines(monkeypatch):
    output = shown(monkeypatch, False, row(10), row(20), row(25, val_loss=2.25, val_bits_per_byte=3.5))
    assert output.splitlines() == [
        "step  20  loss 2.5000  50 tokens/s  76 s left",
        "step  25  loss 2.5000  validation 2.2500 (3.500 bits per byte)",
    ]


def test_a_terminal_has_a_bar_with_loss_speed_and_time_left(monkeypatch):
    output = shown(monkeypatch, True, row(10), row(20))
    assert "20/400" in output and "loss 2.5000  50 tokens/s" in output and "\x1b[" in output
    assert "s left" not in output


@pytest.mark.parametrize("terminal", [True, False])
def test_the_part_of_the_peak_is_told_where_it_is_known(monkeypatch, terminal):
    known = shown(monkeypatch, terminal, row(10, mfu=0.4321), row(20, mfu=0.4321))
    assert "50 tokens/s  43.2% MFU" in known
    assert "MFU" not in shown(monkeypatch, terminal, row(10), row(20))
