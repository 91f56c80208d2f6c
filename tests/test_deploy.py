"""The files in docs/deploy: what can be checked without a cluster."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

import flax_decoder as fd
from flax_decoder.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "docs" / "deploy"


def commands():
    """The arguments of `train` in each file."""
    docker, slurm, jobset = ((DEPLOY / name).read_text() for name in ("Dockerfile", "slurm.sh", "jobset.yaml"))
    return {
        "Dockerfile": shlex.split(re.search(r"docker run .* flax-decoder (.*)", docker)[1]),
        "slurm.sh": shlex.split(re.search(r"srun python train.py (.*)", slurm)[1]),
        "jobset.yaml": re.search(r"args: \[(.*)\]", jobset)[1].split(", "),
    }


@pytest.mark.parametrize("name", ["Dockerfile", "slurm.sh", "jobset.yaml"])
def test_the_command_is_one_of_ours(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    options, unknown = build_parser().parse_known_args(["train", *commands()[name]])
    assert unknown == [] and Path(options.config).is_file()
    given = {key: value for key, value in vars(options).items() if "." in key}
    assert set(given) == {"data.path", "run.folder"}
    fd.load_config(options.config, given)


def test_the_image_copies_what_is_there_and_installs_an_extra_that_is_there():
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert "train.py" in copied and all((ROOT / path).exists() for path in copied)
    (extra,) = re.findall(r'"\.\[(\w+)\]"', "\n".join(lines))
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
    assert {line.split()[0] for line in lines if line and line[0] != "#"} == {
        *("FROM", "WORKDIR", "COPY", "RUN", "ENV", "ENTRYPOINT")
    }


def test_the_manifests_can_be_read():
    yaml = pytest.importorskip("yaml")
    *access, job = yaml.safe_load_all((DEPLOY / "jobset.yaml").read_text())
    assert [part["kind"] for part in access] == ["ServiceAccount", "Role", "RoleBinding"]
    spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] and spec["completionMode"] == "Indexed"
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["serviceAccountName"] == access[0]["metadata"]["name"] == access[2]["subjects"][0]["name"]
    assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in pod["volumes"]]


def test_the_batch_script_is_bash_that_starts_all_tasks():
    script = DEPLOY / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    lines = script.read_text().splitlines()
    settings = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    code = [number for number, line in enumerate(lines) if line and line[0] != "#"]
    assert max(settings) < min(code)  # SLURM reads none behind the first command
