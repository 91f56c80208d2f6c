import os
import sys
import types

import pytest
from jax._src import distributed, xla_bridge
from jax._src.clusters import cloud_tpu_cluster, cluster

from flax_decoder.config import DistributedConfig
from flax_decoder.errors import UserError
from flax_decoder.parallel import launchers, processes


@pytest.mark.parametrize(
    ("environment", "is_job", "found"),
    [
        ({}, False, (None, None)),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, True, (4, 3)),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, False, (1, 0)),
        # In a batch script, outside srun: one process.
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, False, (None, None)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, True, (2, 1)),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, True, (None, None)),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False, (None, None)),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "localhost"}, True, (None, None)),
        # Slices of one machine each.
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, True, (None, None)),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True, (None, None)),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False, (None, None)),
    ],
)
def test_launchers(monkeypatch, environment, is_job, found):
    monkeypatch.setattr(launchers, "has_tpu", lambda: False)
    assert launchers.in_a_job(environment) == is_job
    assert launchers.find_job(DistributedConfig(), environment) == found
    # The config has priority.
    assert launchers.find_job(DistributedConfig(num_processes=8, process_id=7), environment) == (8, 7)


def test_a_tpu_machine_is_part_of_a_job_unless_its_workers_are_listed(monkeypatch):
    monkeypatch.setattr(launchers, "has_tpu", lambda: True)
    assert launchers.in_a_job({})
    assert not launchers.in_a_job({"TPU_WORKER_HOSTNAMES": "localhost"})


# --- What JAX makes of it: its own detection runs, but nothing is started. ---

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NODELIST": "gpu[007-010]",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_GPUS_ON_NODE": "8",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
}
A_TASK_PER_GPU = SLURM | {
    "SLURM_NTASKS": "32",
    "SLURM_STEP_NUM_TASKS": "32",
    "SLURM_STEP_TASKS_PER_NODE": "8(x4)",
    "SLURM_PROCID": "19",
    "SLURM_LOCALID": "3",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
TWO_ON_A_MACHINE = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2", "HOSTNAME": "train-workers-0-2-x"}
TPU_POD = {"TPU_WORKER_HOSTNAMES": "t0,t1,t2,t3", "TPU_WORKER_ID": "2"}
TWO_SLICES = TPU_POD | {
    "MEGASCALE_COORDINATOR_ADDRESS": "s0-t0",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}


@pytest.fixture
def joined(monkeypatch):
    """`processes.join` in a given environment on a machine of 8 GPUs: what JAX resolves, None if nothing is joined."""
    told = ("SLURM", "OMPI", "TPU", "MEGASCALE", "KUBERNETES", "JAX_COORDINATOR", "CUDA", "PMI", "WORLD")
    for name in [*os.environ]:
        if name.startswith(told):
            monkeypatch.delenv(name)
    visible = {}

    def join(environment, **settings):
        state, visible["now"] = distributed.State(), "all"
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        nodes = [types.SimpleNamespace(name=f"nvidia{index}") for index in range(8)]
        monkeypatch.setattr(launchers, "DEV", types.SimpleNamespace(glob=lambda pattern: nodes))
        monkeypatch.setattr(launchers, "has_tpu", lambda: False)
        monkeypatch.setattr(distributed, "global_state", state)
        monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
        connection = types.SimpleNamespace(connect=lambda: None)

        def serve(*arguments, shutdown_timeout, **options):
            assert shutdown_timeout == processes.SHUTDOWN_SECONDS
            return connection

        runtime = types.SimpleNamespace(
            get_distributed_runtime_service=serve,
            get_distributed_runtime_client=lambda *arguments, **options: connection,
        )
        monkeypatch.setattr(distributed, "_jax", runtime)
        monkeypatch.setattr(state, "initialize_preemption_sync_manager", lambda: None)
        update = distributed.config.update

        def see(name, value):
            if name == "jax_cuda_visible_devices":
                visible["now"] = value
            elif name != "jax_rocm_visible_devices":
                update(name, value)

        monkeypatch.setattr(distributed.config, "update", see)
        monkeypatch.setattr(processes, "wait_for", lambda *arguments: None)
        on_tpu = any(name.startswith("TPU") for name in environment)
        for module in (cluster, cloud_tpu_cluster):
            monkeypatch.setattr(module, "running_in_cloud_tpu_vm", on_tpu)
        monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: ("", 404))
        monkeypatch.setattr(cloud_tpu_cluster.BaseTpuCluster, "wait_for_coordinator", lambda *arguments: None)
        monkeypatch.setitem(sys.modules, "kubernetes", fake_kubernetes())
        processes.join(DistributedConfig(**settings))
        if state.client is None:
            return None
        return state.coordinator_address, state.num_processes, state.process_id, visible["now"]

    return join


def fake_kubernetes():
    """As much of the client as JAX asks of a JobSet of four pods."""
    job = types.SimpleNamespace(
        metadata=types.SimpleNamespace(name="train-workers-0", labels={"jobset.sigs.k8s.io/jobset-name": "train"}),
        spec=types.SimpleNamespace(parallelism=4),
    )
    pod = types.SimpleNamespace(
        metadata=types.SimpleNamespace(
            name="train-workers-0-2-x",
            labels={"job-name": "train-workers-0"},
            owner_references=[types.SimpleNamespace(controller=True, kind="Job")],
        )
    )
    core = types.SimpleNamespace(list_namespaced_pod=lambda *arguments, **options: types.SimpleNamespace(items=[pod]))
    batch = types.SimpleNamespace(read_namespaced_job=lambda *arguments, **options: job)
    fake = types.ModuleType("kubernetes")
    fake.config = types.SimpleNamespace(load_incluster_config=lambda: None)
    fake.client = types.SimpleNamespace(
        CoreV1Api=lambda: core, BatchV1Api=lambda: batch, exceptions=types.SimpleNamespace(ApiException=OSError)
    )
    return fake


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (SLURM, ("gpu007", 4, 2, "all")),
        (A_TASK_PER_GPU, ("gpu007", 32, 19, "3")),
        # Two tasks a node, and nodes with other numbers of tasks.
        (
            A_TASK_PER_GPU | {"SLURM_STEP_TASKS_PER_NODE": "1,8,2(x2)", "SLURM_LOCALID": "1"},
            ("gpu007", 32, 19, "4,5,6,7"),
        ),
        # --gpus-per-task=1: each task sees one, which is its first.
        (A_TASK_PER_GPU | {"CUDA_VISIBLE_DEVICES": "3"}, ("gpu007", 32, 19, "all")),
        # Two tasks a node, which see four each.
        (
            A_TASK_PER_GPU | {"SLURM_STEP_TASKS_PER_NODE": "2(x4)", "CUDA_VISIBLE_DEVICES": "4,5,6,7"},
            ("gpu007", 32, 19, "all"),
        ),
        (A_TASK_PER_GPU | {"JAX_LOCAL_DEVICE_IDS": "6,7"}, ("gpu007", 32, 19, "6,7")),
        (SLURM | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}, ("gpu007", 4, 0, "all")),
        (OPEN_MPI, ("10.96.0.1", 4, 2, "all")),
        (TWO_ON_A_MACHINE, ("10.96.0.1", 4, 2, "4,5,6,7")),
        (TWO_ON_A_MACHINE | {"CUDA_VISIBLE_DEVICES": "1"}, ("10.96.0.1", 4, 2, "all")),
        (TPU_POD, ("t0", 4, 2, "all")),
        (TWO_SLICES, ("s0-t0", 8, 6, "all")),
        (TWO_SLICES | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, ("s0-t0", 2, 1, "all")),
    ],
)
def test_a_launched_process_gets_its_place_and_all_devices_of_its_machine(joined, environment, expected):
    address, *rest = joined(environment)
    assert (address.partition(":")[0], *rest) == expected


def test_a_pod_of_a_jobset_gets_its_place_and_all_devices(joined, monkeypatch):
    from jax._src.clusters.k8s_cluster import K8sCluster

    monkeypatch.setattr(K8sCluster, "_namespace", lambda: "default")
    monkeypatch.setattr("socket.gethostbyname", lambda name: "10.0.0.2")
    for method in ("_pod", "_job", "_controller"):
        getattr(K8sCluster, method).__func__.cache_clear()
    expected = ("train-workers-0-0.train:55527", 4, 2, "all")
    assert joined(KUBERNETES) == expected


def test_a_coordinator_that_is_given_changes_nothing_about_devices(joined):
    # Version 5 of Open MPI does not tell where the first process is, so that JAX knows no launcher.
    version_5 = {name: value for name, value in TWO_ON_A_MACHINE.items() if "orte" not in name}
    assert joined(version_5, coordinator="node1:8476") == ("node1:8476", 4, 2, "4,5,6,7")
    assert joined(SLURM, coordinator="node1:8476") == ("node1:8476", 4, 2, "all")


def test_processes_that_do_not_divide_the_gpus_of_their_machine_are_refused(joined):
    with pytest.raises(UserError, match="this machine has 8 GPUs for 3 processes of the job, which do not divide them"):
        joined(TWO_ON_A_MACHINE | {"OMPI_COMM_WORLD_LOCAL_SIZE": "3"})


def test_a_process_of_a_launcher_that_tells_too_little_does_not_train_alone(joined):
    with pytest.raises(UserError, match="torchrun has started 8 processes"):
        joined({"WORLD_SIZE": "8", "RANK": "3"})
    assert joined({"WORLD_SIZE": "8", "RANK": "3"}, num_processes=1) is None  # as was asked for


@pytest.mark.parametrize(
    ("environment", "num_local", "line"),
    [
        ({}, 1, None),
        (SLURM, 8, None),
        (A_TASK_PER_GPU, 1, None),
        (SLURM, 1, "SLURM has allocated 8 GPUs on this node, but this run uses 1"),
        # Without srun.
        ({"SLURM_JOB_NUM_NODES": "4"}, 8, "SLURM has allocated 4 nodes, but this run uses 1"),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2"}, 8, "SLURM has allocated 4 nodes, but this run uses 2"),
    ],
)
def test_devices_that_are_left_idle_are_a_line(environment, num_local, line):
    found = launchers.idle_part(environment, num_local)
    assert found is None if line is None else line in found
