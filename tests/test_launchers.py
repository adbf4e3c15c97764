"""The files that start jobs, each checked by its own tool: ``make test-launch``.

What a machine lacks is said by the skip's reason; ``make test-launch`` makes an
environment that has everything but Slurm and OpenMPI, which come from the system.
"""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from experiments.lab import netlab

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
BATCHES = sorted(LAUNCH.glob("*.sbatch"))
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), *BATCHES, ROOT / ".ci/run"]
TRAIN = ("--steps", "32", "--method", "3lc", "--save-every", "16")
pytestmark = pytest.mark.timeout(280)


def tool(name: str) -> str | None:
    """Return the path of a program beside this Python, or on the path."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


def needs_program(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(tool(name) is None, reason=f"there is no {name} here")


def needs_module(name: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f"{name} is not installed here")


def run(*command: str, **variables: str) -> str:
    """Return what a command prints; it must succeed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = {"PATH": path, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **given, **variables},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-9000:] + done.stderr[-9000:]
    return done.stdout + done.stderr


def loaded(path: Path) -> Any:
    import yaml

    return yaml.safe_load(path.read_text())


@needs_program("shellcheck")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    run(str(tool("shellcheck")), str(script))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_can_be_run(script: Path) -> None:
    run("bash", "-n", str(script))
    assert os.access(script, os.X_OK)


def test_an_attempt_does_not_meet_the_one_before_it(tmp_path: Path) -> None:
    """A rank died, another starts late: one restart, not as many as there are."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\nexec {sys.executable} "${{@//launch.train/tests.restarting}}"\n'
    )
    python.chmod(0o755)
    said = run(str(LAUNCH / "torchrun.sh"), PYTHON=str(python), RANKS="2", RESTARTS="1")
    for attempt in "01":
        for rank in "01":
            assert f"attempt {attempt}, rank {rank} met" in said


def test_torchrun_on_one_machine(tmp_path: Path) -> None:
    checkpoints = str(tmp_path / "checkpoints")
    said = run(str(LAUNCH / "torchrun.sh"), *TRAIN, CHECKPOINTS=checkpoints, RANKS="2")
    assert "torchrun: 2 ranks, from step 0" in said
    said = run(str(LAUNCH / "torchrun.sh"), *TRAIN, CHECKPOINTS=checkpoints, RANKS="2")
    assert "2 ranks, from step 32" in said


@pytest.mark.skipif(netlab.missing() is not None, reason=str(netlab.missing()))
@pytest.mark.parametrize("static", [False, True], ids=["c10d", "static"])
def test_torchrun_on_two_hosts_of_two_ranks(tmp_path: Path, static: bool) -> None:
    script = str(LAUNCH / "torchrun_nodes.sh")
    node = "NODE=$HOST " if static else ""
    said = run(
        *(
            sys.executable,
            "-m",
            "experiments.lab.netlab",
            "--hosts",
            "2",
            "--rate",
            "1gbit",
        ),
        *("--each", "--", "sh", "-c", f"{node}exec {script} {' '.join(TRAIN)}"),
        CHECKPOINTS=str(tmp_path / "checkpoints"),
        RANKS="2",
    )
    if static:
        assert "torchrun: 4 ranks, from step 0" in said
    saved = list((tmp_path / "checkpoints/step-32").glob("*.pt"))
    assert len(saved) == 4


@pytest.mark.skipif(netlab.missing() is not None, reason=str(netlab.missing()))
def test_torchrun_in_each_of_two_sites(tmp_path: Path) -> None:
    """Stopped after 16 steps, and started again."""
    lab = [sys.executable, "-m", "experiments.lab.netlab", "--rate", "100mbit"]
    for steps, first in (("16", 0), ("32", 16)):
        job = f"SITE=$HOST exec {LAUNCH}/sites_torchrun.sh {tmp_path} {steps}"
        said = run(*lab, "--each", "--", "sh", "-c", job)
        assert f"from step {first}: loss " in said
    for site in "01":
        assert (tmp_path / f"site-{site}/32/.metadata").exists()


@needs_module("kubernetes")
def test_the_jobs_of_sites_fit_the_published_api() -> None:
    import yaml
    from kubernetes import client  # type: ignore[import-not-found,unused-ignore]

    text = (LAUNCH / "sites_kubernetes.yaml").read_text()
    service, *jobs = yaml.safe_load_all(text)
    api = client.ApiClient()
    for given, kind in ((service, "V1Service"), *((job, "V1Job") for job in jobs)):
        # What is public wants a response in one version, and its text in another.
        read = api._ApiClient__deserialize(given, kind)
        assert api.sanitize_for_serialization(read) == given
    said = []
    for site, job in enumerate(jobs):
        pod = job["spec"]["template"]
        assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
        assert pod["spec"]["subdomain"] == service["metadata"]["name"]
        (node,) = pod["spec"]["containers"]
        said.append({one["name"]: one["value"] for one in node["env"]})
        assert said[-1].pop("SITE") == str(site)
        assert said[-1]["MACHINES"] == str(job["spec"]["completions"])
    assert said[0] == said[1]
    first = f"{jobs[0]['metadata']['name']}-0.{service['metadata']['name']}"
    assert (said[0]["HEAD"], said[0]["SITES"]) == (first, str(len(jobs)))


@needs_module("kubernetes")
def test_what_comes_and_goes_fits_the_published_api() -> None:
    import yaml
    from kubernetes import client

    text = (LAUNCH / "torchft_kubernetes.yaml").read_text()
    kinds = "Service", "NetworkPolicy", "NetworkPolicy", "Deployment", "Job"
    parts = list(yaml.safe_load_all(text))
    api = client.ApiClient()
    for given, kind in zip(parts, kinds, strict=True):
        read = api._ApiClient__deserialize(given, f"V1{kind}")
        assert api.sanitize_for_serialization(read) == given
    service, guard, among, lighthouse, job = (one["spec"] for one in parts)
    (light,) = lighthouse["template"]["spec"]["containers"]
    (replica,) = job["template"]["spec"]["containers"]
    said = {one["name"]: one.get("value") for one in (*light["env"], *replica["env"])}
    labels = [one["template"]["metadata"]["labels"] for one in (lighthouse, job)]
    port = service["ports"][0]["port"]
    assert service["selector"] == lighthouse["selector"]["matchLabels"] == labels[0]
    assert said["LIGHTHOUSE"] == f"http://{parts[0]['metadata']['name']}:{port}"
    assert (
        said["PORT"] == str(port) == str(light["readinessProbe"]["tcpSocket"]["port"])
    )
    for policy, label in ((guard, labels[0]), (among, labels[1])):
        assert policy["podSelector"]["matchLabels"] == label
        (rule,) = policy["ingress"]
        assert rule["from"] == [{"podSelector": {"matchLabels": labels[1]}}]
    assert guard["ingress"][0]["ports"] == [{"port": port, "protocol": "TCP"}]


@needs_program("mpirun")
def test_mpirun(tmp_path: Path) -> None:
    checkpoints = str(tmp_path / "checkpoints")
    said = run(str(LAUNCH / "mpirun.sh"), *TRAIN, CHECKPOINTS=checkpoints)
    assert "mpirun: 2 ranks, from step 0" in said


@needs_program("horovodrun")
def test_horovodrun(tmp_path: Path) -> None:
    checkpoints = str(tmp_path / "checkpoints")
    said = run(str(LAUNCH / "horovodrun.sh"), *TRAIN, CHECKPOINTS=checkpoints)
    assert "horovodrun: 2 ranks, from step 0" in said


@needs_module("ray")
def test_ray_train(tmp_path: Path) -> None:
    said = run(
        *(sys.executable, "-m", "launch.ray_train", "--storage", str(tmp_path), "--"),
        *TRAIN,
        RAY_TRAIN_V2_ENABLED="1",
    )
    assert "ray: 2 ranks, from step 0" in said


@needs_module("kubeflow_trainer_api")
def test_the_trainjob_fits_the_published_api() -> None:
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    given = loaded(LAUNCH / "kubeflow_trainjob.yaml")
    job = TrainerV1alpha1TrainJob.from_dict(given)
    assert job is not None
    # Fields that the API does not know are dropped: nothing may be missing.
    assert json.loads(job.to_json()) == given


@needs_module("kubeflow")
def test_the_pytorchjob_fits_the_published_api() -> None:
    from kubeflow.training import KubeflowOrgV1PyTorchJob
    from kubeflow.training.api_client import ApiClient

    given = loaded(LAUNCH / "kubeflow_pytorchjob.yaml")

    class Response:
        data = json.dumps(given)

    client = ApiClient()
    job = client.deserialize(Response(), KubeflowOrgV1PyTorchJob)
    assert client.sanitize_for_serialization(job) == given


@needs_module("sky")
@pytest.mark.filterwarnings("default")  # SkyPilot's own
def test_the_sky_file_fits_skypilots_schema() -> None:
    import sky

    task = sky.Task.from_yaml_config(
        {k: v for k, v in loaded(LAUNCH / "skypilot.yaml").items() if k != "workdir"}
    )
    assert task.num_nodes == 4
    assert "launch/torchrun_nodes.sh" in str(task.run)


@needs_program("hadolint")
def test_the_dockerfile_is_linted() -> None:
    run(str(tool("hadolint")), str(LAUNCH / "Dockerfile"))


def test_the_dockerfile_copies_what_there_is() -> None:
    for line in (LAUNCH / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            for name in line.split()[1:-1]:
                assert (ROOT / name).exists(), name


SLURM = """
ClusterName=lc3
SlurmctldHost={host}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
NodeName={host} CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=10 State=UP
"""
# Several jobs at once on the one node, which is said to have more than there may be.
SHARED = """
SlurmdParameters=config_overrides
SelectTypeParameters=CR_CPU
"""


@pytest.fixture
def slurm() -> Iterator[dict[str, str]]:
    """A Slurm of one node that ends with the test; yields what sbatch must know."""
    with started(SLURM, os.cpu_count() or 1) as given:
        yield given


@pytest.fixture
def shared_slurm() -> Iterator[dict[str, str]]:
    """See ``slurm``: one whose node takes four jobs of one processor at once."""
    with started(SLURM + SHARED, 4) as given:
        yield given


@contextmanager
def started(template: str, cpus: int) -> Iterator[dict[str, str]]:
    """Have a Slurm run, until the end of the context."""
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    folder.chmod(0o755)
    for part in ("state", "spool"):
        (folder / part).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    config = folder / "slurm.conf"
    config.write_text(
        template.format(
            host=socket.gethostname().split(".")[0],
            folder=folder,
            ports=[s.getsockname()[1] for s in sockets],
            cpus=cpus,
        )
    )
    for held in sockets:
        held.close()
    names = {"key-file": "key", "socket": "sock", "pid-file": "pid"}
    names |= {"log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={folder}/munge.{end}" for option, end in names.items()]
    try:
        for command in (
            ["munged", "--force", *options],
            ["slurmctld", "-f", str(config)],
            ["slurmd", "-f", str(config)],
        ):
            subprocess.run(command, check=True, timeout=30, capture_output=True)
        yield {"SLURM_CONF": str(config)}
    finally:
        for name in ("slurmd", "slurmctld", "munge"):
            pid = folder / f"{name}.pid"
            if pid.exists():
                os.kill(int(pid.read_text()), signal.SIGTERM)
        shutil.rmtree(folder, ignore_errors=True)


@needs_program("munged")
@needs_program("slurmctld")
@needs_program("slurmd")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may start slurmd")
def test_slurm(slurm: dict[str, str], tmp_path: Path) -> None:
    """A job of one node and two ranks on a Slurm of this machine."""
    log = tmp_path / "job.log"
    run(
        *("sbatch", "--wait", "--nodes", "1", "--output", str(log)),
        *(str(LAUNCH / "slurm.sbatch"), *TRAIN),
        **slurm,
        RANKS="2",
        CHECKPOINTS=str(tmp_path / "checkpoints"),
    )
    assert "torchrun: 2 ranks, from step 0" in log.read_text()


@needs_program("munged")
@needs_program("slurmctld")
@needs_program("slurmd")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may start slurmd")
def test_slurm_takes_a_component_for_each_site(slurm: dict[str, str]) -> None:
    """It has one node, and each component wants its own, so nothing starts."""
    said = run("sbatch", "--test-only", str(LAUNCH / "sites_slurm.sbatch"), **slurm)
    assert "allocation failure" not in said


@needs_module("torchft")
@needs_program("munged")
@needs_program("slurmctld")
@needs_program("slurmd")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may start slurmd")
def test_slurm_puts_replicas_of_torchft_into_the_queue_again(
    shared_slurm: dict[str, str], tmp_path: Path
) -> None:
    """A lighthouse and two replicas; one is taken back by Slurm and joins again."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    node = socket.gethostname().split(".")[0]
    given = {"PORT": str(port), "LIGHTHOUSE": f"http://{node}:{port}"}
    given |= {"TIMEOUT_S": "8", "EPOCHS": "30", "GRACE_MS": "500"}

    def submit(*arguments: str) -> str:
        command = "sbatch", "--parsable", "--output", f"{tmp_path}/%a", *arguments
        return run(*command, **shared_slurm, **given).strip().splitlines()[-1]

    def wait_for(ready: Callable[[], bool]) -> None:
        end = time.monotonic() + 120
        while not ready():
            logs = [path.read_text()[-2000:] for path in tmp_path.iterdir()]
            assert time.monotonic() < end, (logs, run("squeue", **shared_slurm))
            time.sleep(0.2)

    def joined(replica: str) -> int:
        log = tmp_path / replica
        return log.read_text().count("joined: ") if log.exists() else 0

    script = str(LAUNCH / "torchft.sbatch")
    light = submit("--array", "9", script, "lighthouse")
    replicas = submit("--array", "0-1", script, "replica")
    try:
        wait_for(lambda: joined("0") == joined("1") == 1)
        run("scontrol", "requeue", f"{replicas}_1", **shared_slurm)
        end = time.monotonic() + 60
        while "PENDING" not in run(
            *("squeue", "--noheader", "--format", "%T", "--job", f"{replicas}_1"),
            **shared_slurm,
        ):
            assert time.monotonic() < end
            time.sleep(0.2)
        run(
            "scontrol", "update", f"jobid={replicas}_1", "starttime=now", **shared_slurm
        )
        wait_for(lambda: joined("1") == 2)
        logs = [tmp_path / replica for replica in "01"]
        wait_for(lambda: all("accuracy 0." in log.read_text() for log in logs))
        assert joined("0") == 1
    finally:
        run("scancel", light, replicas, **shared_slurm)


def test_a_slurm_of_two_sites_starts_them(tmp_path: Path) -> None:
    """With programs in Slurm's place that do what it does for two components."""
    tools = {
        "scontrol": "echo 127.0.0.1",
        "srun": """
            while [[ $1 == -* ]]; do shift; done
            for task in 0 1; do SLURM_PROCID=$task "$@" & tasks+=($!); done
            for task in "${tasks[@]}"; do wait "$task"; done
        """,
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\nset -e\n{text}")
        (tmp_path / name).chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as free:
        job = free.getsockname()[1] - 20_000
    said = run(
        *("bash", "-c", f'PATH={tmp_path}:$PATH exec "$@"', "_"),
        *(str(LAUNCH / "sites_slurm.sbatch"), str(tmp_path / "kept"), "16"),
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_JOB_ID=str(job % 20_000),
        **{f"SLURM_JOB_NUM_NODES_HET_GROUP_{site}": "1" for site in "01"},
        **{f"SLURM_JOB_NODELIST_HET_GROUP_{site}": "here" for site in "01"},
    )
    assert "from step 0: loss " in said
    assert len(list((tmp_path / "kept").glob("site-*/16/.metadata"))) == 2
