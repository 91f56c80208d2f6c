"""A job of several processes: joining it, and communicating within it.

All processes run the same program on the same config, each on its own devices; only the first one prints and creates
files. They share the run folder, so it must be on a shared file system.
"""

import atexit
import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from flax_decoder.config import DistributedConfig
from flax_decoder.errors import FaultError, LostProcessError, UserError
from flax_decoder.parallel.launchers import find_job, in_a_job, local_device_ids, refuse_lone_process

T = TypeVar("T")
# How long processes that are done wait for those that still write or hash the last checkpoint: JAX's 5 minutes are too
# few for a slow disk. One that has died is noticed by its heartbeat.
SHUTDOWN_SECONDS = 3600
# The exit code of a process whose job has lost another one: a start of all processes goes on.
LOST_CODE = 75
LOST = (
    "another process of the job has ended, or no longer answers; its output may say why. Start all processes again: "
    "training goes on from the newest checkpoint"
)
# What collectives and the coordination service of JAX say then.
_SAID_OF_LOST = re.compile(
    "Gloo|NCCL|Connection (closed|reset)|coordination service|[Hh]eartbeat|UNAVAILABLE|BarrierError"
)
_ENDING = threading.Lock()
# How long a process that has failed waits for the others, which may fail for the same reason.
_LEAVE_SECONDS = 10
# The longest path on Linux, in bytes.
_MAX_PATH = 4096


def join(config: DistributedConfig) -> None:
    """Joins the job that this process belongs to, if any; call it before anything is computed.

    Args:
        config: where the other processes are; fields that are not set come from the launcher (SLURM, Open MPI,
            Kubernetes, or a TPU pod).

    Raises:
        UserError: the other processes were not found, the number or index of this one is missing, or the processes of
            this machine do not divide its GPUs.
    """
    count, index = find_job(config, os.environ)
    if config.coordinator is not None and (count is None or index is None):
        raise UserError(
            "distributed.coordinator is set, but not the number of processes or the index of this one: "
            "give --distributed.num-processes N and --distributed.process-id I"
        )
    found = config.coordinator is not None or in_a_job(os.environ)
    if not found and (config.process_id is not None or (config.num_processes or 1) > 1):
        raise UserError(
            f"distributed.num_processes = {config.num_processes} and process_id = {config.process_id} do not say "
            "where the other processes are: give --distributed.coordinator HOST:PORT"
        )
    if count == 1 or jax.distributed.is_initialized():
        return
    if not found:
        return refuse_lone_process(os.environ)
    own_devices = local_device_ids(os.environ)
    if config.coordinator is not None and index != 0:
        wait_for(config.coordinator, config.join_seconds)
    try:
        jax.distributed.initialize(
            config.coordinator,
            count,
            index,
            own_devices,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            initialization_timeout=config.join_seconds,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot join the other processes of the job: {str(error).splitlines()[0]};\n"
            "give --distributed.coordinator HOST:PORT, or run alone with --distributed.num-processes 1"
        ) from error
    # JAX calls abort() in a thread of its own when another process is lost. That ends the process before Python
    # handles a signal, so the C library is told to call the handler.
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)
    atexit.register(_leave_after_a_mistake)  # before the function of JAX that waits for all processes


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
    end_lost()


def end_lost() -> NoReturn:
    """Ends this process, as the job has lost another one: with a line, which is the last, and `LOST_CODE`.

    A thread of JAX may notice the same at this moment, print, and end the process, too.
    """
    with _ENDING:
        line = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.write(line, f"fault: {LOST}\n".encode())
        os._exit(LOST_CODE)


@contextlib.contextmanager
def telling_of_lost() -> Iterator[None]:
    """Turns what JAX raises when another process of the job is lost into LostProcessError."""
    try:
        yield
    except Exception as error:
        if jax.process_count() > 1 and is_lost(error):
            raise LostProcessError(LOST) from error
        raise


def is_lost(error: BaseException | None) -> bool:
    """Whether JAX has raised an error because another process of the job is lost, or has caused it."""
    while error is not None:
        if isinstance(error, LostProcessError) or (
            isinstance(error, RuntimeError | ValueError) and _SAID_OF_LOST.search(str(error))
        ):
            return True
        error = error.__cause__
    return False


def _leave_after_a_mistake() -> None:
    if hasattr(sys, "last_value"):  # Python has printed a traceback
        leave(1)


def leave(code: int) -> None:
    """Ends this process if it belongs to a job, as others may wait for it in a computation, and it would for their end.

    Those notice that its connections are closed, and end with `LOST_CODE`. If all come here, they end as always.
    """
    if not jax.distributed.is_initialized():
        return
    with contextlib.suppress(RuntimeError):  # not all have come
        _client().wait_at_barrier("leave", _LEAVE_SECONDS * 1000)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait_for(coordinator: str, seconds: float) -> None:
    """Waits until HOST:PORT accepts connections; without that, JAX would abort with an unclear message.

    Raises:
        UserError: it did not within the given time.
    """
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=1.0).close()
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"distributed.coordinator = {coordinator}: no answer in {seconds} seconds ({error}); "
                    "does process 0 run there, and can this machine reach it?"
                ) from None
        time.sleep(0.2)


def is_first() -> bool:
    """Whether this is the process that prints and writes for all processes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def printing_once() -> Iterator[None]:
    """Within it, only the first process prints."""
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def first_alone(act: Callable[[], T]) -> T:
    """Calls `act` in the first process, then in the others, which find the files that it made.

    Raises:
        FaultError: in the others, if the first one failed.
    """
    if jax.process_count() == 1:
        return act()
    if not is_first():
        if not broadcast(True):
            raise FaultError("the first process of the job has stopped; its output says why")
        return act()
    done = False
    try:
        result = act()
        done = True
    finally:
        broadcast(done)
    return result


def broadcast(value: T) -> T:
    """The value of the first process: a number, a bool, or an array."""
    if jax.process_count() == 1:
        return value
    result: T = multihost_utils.broadcast_one_to_all(np.asarray(value)).tolist()
    return result


def broadcast_path(find: Callable[[], Path] | None) -> Path:
    """The path that `find` finds in the one process that has it, the first.

    Raises:
        FaultError: it was not found; in all processes, so that none waits for another.
    """
    if jax.process_count() == 1:
        assert find is not None
        return find()
    found, reason = b"", "the first process of the job has stopped; its output says why"
    if find is not None:
        try:
            found = os.fsencode(find())
        except FaultError as error:
            reason = str(error)
    # Arrays must have one size in all processes; paths have no zero bytes.
    sent = bytes(broadcast(np.frombuffer(found.ljust(_MAX_PATH, b"\0"), np.uint8))).rstrip(b"\0")
    if not sent:
        raise FaultError(reason)
    return Path(os.fsdecode(sent))


def _client() -> Any:
    """What talks to the coordination service of the job."""
    from orbax.checkpoint import multihost  # loaded by then; at the top it would slow down what saves nothing

    return multihost.get_jax_distributed_client()


def gather_at_first(name: str, make: Callable[[], str]) -> list[str]:
    """The texts that all processes make, in the first one; nothing in the others.

    It needs no devices, so a thread may call it while they compute.

    Args:
        name: what is gathered; another one in each call.
        make: makes the text of this process.

    Raises:
        FaultError: in the first process, if another one could not make its text, and does not say so itself.
    """
    client = _client()
    if not is_first():
        text = ""
        try:
            text = make()
        finally:
            client.key_value_set(f"{name}/{jax.process_index()}", text)
        return []
    texts = [make()]
    for index in range(1, jax.process_count()):
        texts.append(client.blocking_key_value_get(f"{name}/{index}", SHUTDOWN_SECONDS * 1000))
        if not texts[-1]:
            raise FaultError(f"process {index} of the job has failed; its output says why")
    return texts


def ask_largest(find: Callable[[], int]) -> Callable[[], int]:
    """Begins to ask all processes for a number; what it returns waits for the largest.

    A single process looks when the answer is asked for. Several look now, and their devices compare the numbers between
    what they have been given to compute before and what they will be given next: nobody waits for the latter.
    """
    if jax.process_count() == 1:
        return find
    devices = np.asarray(jax.devices()).reshape(jax.process_count(), -1)
    mesh = Mesh(devices, ("processes", "local_devices"))
    numbers = multihost_utils.host_local_array_to_global_array(np.asarray([find()]), mesh, PartitionSpec("processes"))
    with jax.set_mesh(mesh):
        largest = jax.jit(jnp.max, out_shardings=PartitionSpec())(numbers)
    return lambda: int(largest.addressable_data(0))
