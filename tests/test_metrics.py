import json
import math
import sys
import types
import unittest.mock
from xml.etree import ElementTree

import numpy as np
import pytest

from flax_decoder.config import RunConfig
from flax_decoder.errors import BrokenError, UserError
from flax_decoder.training import metrics
from flax_decoder.training.metrics import MetricsLog, bits_per_byte, log_row, plot_losses, read_metrics

ROWS = [{"step": step, "train_loss": 3.0 / step, "seconds": 1.5 * step} for step in (2, 4, 6)]


def write_rows(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def test_lines_go_to_disk_as_they_come(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []  # no file has no lines
    log = MetricsLog(RunConfig(), tmp_path, 0)
    assert log.seconds() == 0 and read_metrics(tmp_path / "metrics.jsonl") == []
    for number, row in enumerate(ROWS, 1):
        log.add(row)
        assert read_metrics(tmp_path / "metrics.jsonl") == ROWS[:number] == log.rows
    assert log.seconds() == 9.0


@pytest.mark.parametrize(
    "tail", ['{"step": 8, "train_lo', '{"step": 8, "train_loss": 1.0}', '{"step": 8, "text": "\\u00']
)
def test_a_last_line_cut_short_is_left_out(tmp_path, tail):
    write_rows(tmp_path / "metrics.jsonl", ROWS, tail)
    assert read_metrics(tmp_path / "metrics.jsonl") == ROWS
    log = MetricsLog(RunConfig(), tmp_path, 6)
    log.add({"step": 8})
    assert read_metrics(tmp_path / "metrics.jsonl") == [*ROWS, {"step": 8}]


@pytest.mark.parametrize("name", ["val_loss/books", "val_bits_per_byte/books"])
def test_the_loss_of_a_source_is_a_number(tmp_path, name):
    write_rows(tmp_path / "metrics.jsonl", [{"step": 1, name: 2.0}])
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, name: 2.0}]
    write_rows(tmp_path / "metrics.jsonl", [{"step": 1, name: "unknown"}])
    with pytest.raises(BrokenError, match=f"line 1: {name} = 'unknown' is not a number of a run"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (4, 2), (5, 2), (6, 3)])
def test_lines_after_the_checkpoint_are_dropped(tmp_path, step, kept):
    write_rows(tmp_path / "metrics.jsonl", ROWS)
    log = MetricsLog(RunConfig(), tmp_path, step)
    assert log.rows == ROWS[:kept] == read_metrics(tmp_path / "metrics.jsonl")
    assert log.seconds() == (ROWS[kept - 1]["seconds"] if kept else 0)


# What was not flushed may be zeros after a power cut, and after them the next page.
@pytest.mark.parametrize(
    "damage",
    [b"\0" * 99 + b': 3.0}\n{"step": 8}\n', b"\0" * 99, b'{"step": "x"}\n{"step": 8}\n'],
    ids=["zeros and a line", "zeros", "another line"],
)
def test_damage_after_the_checkpoint_goes_with_the_lines_that_come_again(tmp_path, capsys, damage):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, ROWS)
    path.write_bytes(path.read_bytes() + damage)
    if damage.endswith(b"\n"):
        with pytest.raises(BrokenError, match="line 4: "):
            MetricsLog(RunConfig(), tmp_path, 8)
    assert MetricsLog(RunConfig(), tmp_path, 6).rows == ROWS == read_metrics(path)
    assert capsys.readouterr().err == ""


def test_a_file_that_cannot_be_read_is_not_replaced(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(BrokenError, match="cannot be read: is a folder"):
        MetricsLog(RunConfig(), tmp_path, 0)


def fake_tensorboard(monkeypatch, written, flush):
    """Stands in for the parts of tensorboardX that are used, which write into a list."""

    class EventsWriter:
        def __init__(self, prefix):
            written.append(prefix)

        def write_event(self, event):
            written.append((event["step"], *event.get("summary", ["start"])))

        def flush(self):
            flush()

    parts = {
        "event_file_writer": {"EventsWriter": EventsWriter},
        "proto.event_pb2": {"Event": lambda **fields: fields, "SessionLog": unittest.mock.Mock()},
        "summary": {"scalar": lambda name, value: (name, value)},
    }
    for name in ("tensorboardX", "tensorboardX.proto"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, content in parts.items():
        monkeypatch.setitem(sys.modules, f"tensorboardX.{name}", types.SimpleNamespace(**content))


def test_tensorboard_gets_each_number_at_its_step(tmp_path, monkeypatch):
    written = []
    fake_tensorboard(monkeypatch, written, lambda: written.append("flush"))
    MetricsLog(RunConfig(tensorboard=True), tmp_path, 2).add({"step": 3, "train_loss": 1.5})
    prefix = str(tmp_path / "tensorboard" / "events")
    # Lines from step 3 on that are there already, of a run that was killed, are to be forgotten.
    assert written == [prefix, (3, "start"), (3, "step", 3), (3, "train_loss", 1.5), "flush"]
    assert (tmp_path / "tensorboard").is_dir()


def fail(*args, **options):
    raise OSError(28, "No space left on device\n\x1b[2Jmore")


@pytest.mark.parametrize("when", ["opened", "told"])
@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_reporter_that_fails_is_switched_off_with_a_line(tmp_path, monkeypatch, capsys, name, when):
    asked = []

    def log(row=None, step=None):
        asked.append(step)
        raise RuntimeError("the network is gone\nand more")

    fake_tensorboard(monkeypatch, asked, log if when == "told" else None)
    run = types.SimpleNamespace(log=log)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=(lambda **_: run) if when == "told" else fail))
    if when == "opened" and name == "tensorboard":
        monkeypatch.setattr("pathlib.Path.mkdir", fail)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    log = MetricsLog(
        RunConfig(**{"tensorboard": {"tensorboard": True}, "wandb": {"wandb": "plays"}}[name]), tmp_path, 0
    )
    for row in ROWS:
        log.add(row)
    assert read_metrics(tmp_path / "metrics.jsonl") == ROWS
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: run.{name} is switched off, training goes on: ")
    assert ("No space left" if when == "opened" else "gone") in line and "more" not in line
    assert len(asked) == len(set(map(str, asked)))  # and is asked no more


def test_other_reporters_get_no_words(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(metrics, "open_reporters", lambda *_: [told.append])
    row = {"step": 3, "train_loss": 1.5, "mfu": "unknown", "mfu_causal": 0.25}
    MetricsLog(RunConfig(), tmp_path, 0).add(row)
    assert told == [{"step": 3, "train_loss": 1.5, "mfu_causal": 0.25}]
    assert read_metrics(tmp_path / "metrics.jsonl") == [row]


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for Weights & Biases: the options of each run, and the steps that it got, by id."""
    calls, steps = [], {}

    def init(id, **options):
        calls.append({"id": id} | options)
        return types.SimpleNamespace(
            offline=module.offline, log=lambda row, step: steps.setdefault(id, []).append(step)
        )

    module = types.SimpleNamespace(init=init, calls=calls, steps=steps, offline=False)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.mark.parametrize("offline", [True, False])
def test_wandb_goes_on_in_the_same_chart_with_no_step_twice(tmp_path, wandb, offline):
    wandb.offline = offline
    config, folder = RunConfig(wandb="plays"), tmp_path / "hamlet"
    folder.mkdir()
    for step, last in ((0, 6), (2, 8)):  # killed at step 6, and continued from the checkpoint of step 2
        log = MetricsLog(config, folder, step)
        for number in range(step + 1, last + 1):
            log.add({"step": number})
    first, second = wandb.calls
    assert first == second and first.items() >= {"project": "plays", "name": "hamlet", "resume": "allow"}.items()
    # The server itself drops steps that it has; some of them it may not have got.
    assert wandb.steps == {first["id"]: [*range(1, 9)] if offline else [*range(1, 7), *range(3, 9)]}


def test_each_run_has_a_chart_of_its_own(tmp_path, wandb):
    for folder in (tmp_path / "a/run", tmp_path / "b/run"):
        folder.mkdir(parents=True)
        MetricsLog(RunConfig(), folder, 0).add({"step": 1})
        MetricsLog(RunConfig(wandb="plays"), folder, 0).add({"step": 1})  # it has not got the line before
    assert len(wandb.steps) == 2 and list(wandb.steps.values()) == [[1], [1]]


def test_a_damaged_id_of_a_chart_is_told(tmp_path, wandb):
    (tmp_path / "wandb_id").write_bytes(b"a/b\n" * 1000)
    with pytest.raises(BrokenError, match=r"wandb_id: is damaged: .*delete it to begin a new chart"):
        MetricsLog(RunConfig(wandb="plays"), tmp_path, 0)
    assert wandb.calls == []


def rows_to_draw(evaluated):
    rows = [{"step": step, "train_loss": 3 / step} for step in range(1, 20)]
    rows[4]["train_loss"] = "unknown"  # as that of a step that was not applied
    if evaluated:
        rows[9] |= {"val_loss": 2.0, "val_bits_per_byte": 2.9}
        rows[18] |= {"val_loss": 1.0, "val_bits_per_byte": 1.4}
    return rows


@pytest.mark.parametrize("evaluated", [True, False])
def test_the_curves_as_svg_have_their_text_as_text(tmp_path, evaluated):
    rows = rows_to_draw(evaluated)
    write_rows(tmp_path / "metrics.jsonl", rows)
    plot_losses(tmp_path / "metrics.jsonl", str(tmp_path / "loss.svg"))
    root = ElementTree.parse(tmp_path / "loss.svg").getroot()
    words = {element.text for element in root.iter() if element.tag.endswith("text")}
    assert {"step", "loss (nats per token)", "training, single batches"} <= words
    assert ("validation, 1.000 at best" in words) == evaluated
    # Nothing but the two curves is written among them: the legend, with the lowest loss, is no part of the axes.
    (axes,) = (element for element in root.iter() if element.get("id") == "axes_1")
    written = {element.get("id", "").rstrip("_0123456789") for element in axes}
    assert written == {"patch", "matplotlib.axis", "line2d"}
    before = (tmp_path / "loss.svg").read_bytes()
    assert (metrics.TRAINING.encode() in before, metrics.VALIDATION.encode() in before) == (True, evaluated)
    plot_losses(rows, tmp_path / "loss.svg")
    assert (tmp_path / "loss.svg").read_bytes() == before  # the same from lines, and at any time


@pytest.mark.parametrize("rows", [[], [{"step": 1}], [{"step": 1, "train_loss": "unknown"}], "absent.jsonl"])
def test_without_losses_nothing_is_drawn(tmp_path, monkeypatch, rows):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^(rows|absent\.jsonl): has no losses to plot"):
        plot_losses(rows, "loss.png")
    assert list(tmp_path.iterdir()) == []


def test_a_curve_with_another_ending_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"loss\.jpg: the name of a picture must end in \.png or \.svg"):
        plot_losses(ROWS, tmp_path / "loss.jpg")
    assert list(tmp_path.iterdir()) == []


def test_bits_per_byte_is_the_loss_in_another_unit():
    # 10 tokens of ln 8 nats each are 30 bits; over 15 bytes that is 2 bits a byte.
    assert bits_per_byte(math.log(8), num_tokens=10, num_bytes=15) == pytest.approx(2.0)


def test_numbers_of_a_device_become_those_of_python():
    row = log_row(step=7, tokens=21, train_loss=np.float32(1.5))
    assert row == {"step": 7, "tokens": 21, "train_loss": 1.5}
    assert [type(value) for value in row.values()] == [int, int, float]
    json.dumps(row)
