"""What the environment that a launcher sets says of this process and its devices; needs no JAX."""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

from flax_decoder.config import DistributedConfig
from flax_decoder.errors import UserError

# Environment variables in which a launcher tells each process the number of processes, and its own.
LAUNCHERS = {
    # Set by srun only: a single process in sbatch or salloc must not wait for others.
    "SLURM": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
}
# Those whose processes do not find each other by themselves: the number of processes.
OTHER_LAUNCHERS = {"torchrun": "WORLD_SIZE", "MPICH or Intel MPI": "PMI_SIZE"}
DEV = Path("/dev")


def in_a_job(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several that can find each other without configuration."""
    launched = any(int(environment.get(count, 1)) > 1 for count, _ in LAUNCHERS.values())
    # An indexed Job, such as those of a JobSet.
    in_kubernetes = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
    # GKE lists all workers of a TPU slice; elsewhere JAX asks the metadata server of the TPU.
    workers = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    has_slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1
    return launched or in_kubernetes or has_slices or (has_tpu() if workers is None else "," in workers)


def has_tpu() -> bool:
    """Whether this machine has TPU chips and libtpu."""
    chips = [*DEV.glob("accel[0-9]*"), *(DEV / "vfio").glob("[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def find_job(config: DistributedConfig, environment: Mapping[str, str]) -> tuple[int | None, int | None]:
    """The number of processes and the index of this one: from the config, else from the launcher; None if unknown."""
    count, index = config.num_processes, config.process_id
    for count_name, index_name in LAUNCHERS.values():
        if count_name in environment and index_name in environment:
            count = int(environment[count_name]) if count is None else count
            index = int(environment[index_name]) if index is None else index
    return count, index


def find_local(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """How many processes of the job are on this machine, and which of them this is; None if no launcher says it."""
    if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_LOCALID" in environment:
        counts = _per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
        node = int(environment.get("SLURM_NODEID", 0))
        return counts[min(node, len(counts) - 1)], int(environment["SLURM_LOCALID"])
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        return int(environment["OMPI_COMM_WORLD_LOCAL_SIZE"]), int(environment["OMPI_COMM_WORLD_LOCAL_RANK"])
    return None


def local_device_ids(environment: Mapping[str, str]) -> list[int] | None:
    """Which of the GPUs that this process sees are its own, for `jax.distributed.initialize`.

    By itself, JAX gives a process under SLURM or Open MPI one GPU, with the process's index on the machine. Here the
    processes of a machine share all its GPUs.

    Returns:
        Their indices; an empty list is all of them, and None leaves it to JAX: JAX_LOCAL_DEVICE_IDS is set, no launcher
        tells how many processes the machine has, or it has no NVIDIA GPU.

    Raises:
        UserError: the processes of this machine do not divide its GPUs.
    """
    local = find_local(environment)
    if environment.get("JAX_LOCAL_DEVICE_IDS") or local is None:
        return None
    num_processes, index = local
    if num_processes == 1:
        return []
    num_gpus = num_visible_gpus(environment)
    if num_gpus == 0:
        return None
    if num_gpus < max(num_processes, int(environment.get("SLURM_GPUS_ON_NODE", 0))):
        return []  # the launcher shows each process its own
    if num_gpus % num_processes != 0:
        raise UserError(
            f"this machine has {num_gpus} GPUs for {num_processes} processes of the job, which do not divide them:\n"
            "start one process for each machine, or one for each GPU"
        )
    each = num_gpus // num_processes
    return list(range(index * each, (index + 1) * each))


def num_visible_gpus(environment: Mapping[str, str]) -> int:
    """The number of NVIDIA GPUs that a process of this machine sees."""
    names = environment.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return len(list(DEV.glob("nvidia[0-9]*")))
    return len([name for name in names.split(",") if name.strip() not in ("", "-1", "NoDevFiles")])


def idle_part(environment: Mapping[str, str], num_local: int) -> str | None:
    """What SLURM has allocated and this run, with `num_local` devices in this process, leaves idle: a line, or None."""
    in_step = "SLURM_STEP_NUM_TASKS" in environment
    num_nodes = int(environment.get("SLURM_JOB_NUM_NODES", 1))
    num_used = int(environment.get("SLURM_STEP_NUM_NODES", 1)) if in_step else 1
    if num_used < num_nodes:
        return f"SLURM has allocated {num_nodes} nodes, but this run uses {num_used}: start it with srun on all"
    num_gpus, num_processes = int(environment.get("SLURM_GPUS_ON_NODE", 0)), (find_local(environment) or (1, 0))[0]
    if num_local * num_processes < num_gpus:
        return (
            f"SLURM has allocated {num_gpus} GPUs on this node, but this run uses {num_local * num_processes}: see "
            "--gpus-per-task, CUDA_VISIBLE_DEVICES and the installed jax"
        )
    return None


def refuse_lone_process(environment: Mapping[str, str]) -> None:
    """Raises UserError for one of several processes that would each run alone."""
    for launcher, count in OTHER_LAUNCHERS.items():
        if environment.get(count, "1").isdigit() and int(environment.get(count, "1")) > 1:
            raise UserError(
                f"{launcher} has started {environment[count]} processes ({count}), which do not find each other: give "
                "--distributed.coordinator\nHOST:PORT, --distributed.num-processes and --distributed.process-id; or "
                "run alone with --distributed.num-processes 1"
            )


def _per_node(counts: str) -> list[int]:
    """The processes of each node, out of SLURM's way to write them: "2(x3),1" is 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, times in found for _ in range(int(times or 1))]
