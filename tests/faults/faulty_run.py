"""Runs a command of flax-decoder that sends itself a signal at a named point.

python faulty_run.py SIGNAL POINT COUNT DELAY ARGUMENTS: the signal is sent DELAY seconds after the point is reached for
the COUNTth time.
"""

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from flax_decoder import cli

WRITING = os.O_WRONLY | os.O_RDWR


class Trigger:
    """Sends a signal to this process at the COUNTth call."""

    def __init__(self, number, count, delay):
        self.number, self.count, self.delay = number, count, delay

    def comes_next(self):
        """Whether the next call sends the signal."""
        return self.count == 1

    def __call__(self):
        self.count -= 1
        if self.count != 0:
            return
        if self.delay > 0:
            threading.Timer(self.delay, os.kill, (os.getpid(), self.number)).start()
        else:
            os.kill(os.getpid(), self.number)


def call(place, name, act, when):
    """Patches a function of a module or class so that `act` is called before or after it."""
    original = getattr(place, name)

    def replacement(*args, **kwargs):
        if when == "before":
            act()
        result = original(*args, **kwargs)
        if when == "after":
            act()
        return result

    setattr(place, name, replacement)


def arm(point, trigger):
    """Installs the trigger at a point."""
    if point == "file":
        arm_files(trigger)
        return
    import jax
    import orbax.checkpoint as ocp

    from flax_decoder.training import checkpoint, loop, run_folder

    places = {
        "opening": (loop, "open_run", "before"),
        "preparing": (run_folder, "prepare_corpus", "after"),
        "restoring": (loop, "restore_state", "before"),
        "amid restoring": (checkpoint, "_restore", "before"),
        "evaluation": (loop, "evaluate_batches", "before"),
        "save": (checkpoint.Checkpoints, "save", "before"),
        "before arrays": (ocp.AsyncCheckpointer, "save", "before"),
        "after arrays": (checkpoint, "write_manifest", "before"),
        "after manifest": (checkpoint, "write_manifest", "after"),
        "after rename": (checkpoint, "commit", "after"),
        "sampling": (loop, "generate", "before"),
        "after sampling": (loop, "plot_losses", "before"),
    }
    if point in places:
        place, name, when = places[point]
        call(place, name, trigger, when)
    elif point == "step":
        jit_step = loop.jit_step

        def jit_with_trigger(*args, **options):
            take_step = jit_step(*args, **options)

            def replacement(*args):
                trigger()
                return take_step(*args)

            return replacement

        loop.jit_step = jit_with_trigger
    elif point == "compile":
        # JAX has just lowered a program that XLA is about to compile; the programs of the step come last.
        def listen(event, seconds, **_):
            if event == "/jax/core/compile/jaxpr_to_mlir_module_duration" and in_call_of("run_steps"):
                trigger()
            if event == "/jax/core/compile/backend_compile_duration" and trigger.count == 0:
                print("XLA has compiled it", flush=True)

        jax.monitoring.register_event_duration_secs_listener(listen)
    elif point == "amid arrays":
        save = ocp.AsyncCheckpointer.save

        def replacement(writer, path, *args, **kwargs):
            if trigger.comes_next():
                threading.Thread(target=wait_for_arrays, args=(Path(path), trigger), daemon=True).start()
            else:
                trigger()
            save(writer, path, *args, **kwargs)

        ocp.AsyncCheckpointer.save = replacement
    elif point in ("pruning", "clearing"):
        arm_deletion(point, trigger)
    else:
        raise ValueError(point)


def fail(number, frame):
    raise RuntimeError("a mistake")


def in_call_of(name):
    """Whether a function of that name is on the stack of this thread."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != name:
        frame = frame.f_back
    return frame is not None


def wait_for_arrays(new, trigger):
    """Calls the trigger when the first bytes of arrays are in the folder of a save."""
    while True:
        for inner, _, names in os.walk(new.parent):
            with contextlib.suppress(OSError):
                if new.name in inner and "ocdbt.process" in inner and names:
                    trigger()
                    return
        time.sleep(0)


def arm_deletion(point, trigger):
    """Triggers after a checkpoint is renamed for deletion, with half of its files deleted."""
    rmtree = shutil.rmtree

    def replacement(path, *args, **kwargs):
        name = Path(path).name
        if (point == "pruning" and name.startswith(".old-")) or (point == "clearing" and name.startswith(".new-")):
            if trigger.comes_next():
                files = sorted(file for file in Path(path).rglob("*") if file.is_file())
                for file in files[: len(files) // 2]:
                    file.unlink()
            trigger()
        rmtree(path, *args, **kwargs)

    shutil.rmtree = replacement


def arm_files(trigger):
    """Triggers when a file in an unfinished folder is opened for writing."""

    def listen(event, details):
        if event == "open":
            path, _, flags = details
            if isinstance(path, str | os.PathLike) and ".new-" in os.fspath(path) and flags & WRITING:
                trigger()

    sys.addaudithook(listen)


if __name__ == "__main__":
    name, point, count, delay, *arguments = sys.argv[1:]
    signal.signal(signal.SIGUSR1, fail)
    arm(point, Trigger(signal.Signals[name], int(count), float(delay)))
    sys.exit(cli.main(arguments))
