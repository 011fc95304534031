"""Slurm and KubeRay jobs: what is in the tree equals what make_job.sh writes, and both are well formed."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

import jsonschema
import pytest
import yaml

from tests.launchers.conftest import ROOT, neutral

MAKE = "scripts/cluster/make_job.sh"
SCHEMA = json.loads((ROOT / "tests/launchers/rayjob.schema.json").read_text())


@pytest.mark.parametrize(("kind", "file"), [("slurm", "slurm.sbatch"), ("kuberay", "rayjob.yaml")])
def test_the_files_in_the_tree_are_what_is_written(kind, file, launch):
    done = launch(MAKE, JOB_KIND=kind, NUM_NODES="2", check=True, OUTPUT_ROOT="")
    assert done.out == (ROOT / "scripts/cluster" / file).read_text()


@pytest.mark.parametrize("nodes", ["1", "4"])
def test_slurm(nodes, launch, pair_variables, tmp_path):
    variables = pair_variables("8b_to_4b") | {"METHOD_LIST": "pure_opd:1.0 tip:0.1", "WANDB_PROJECT": "it's $mine"}
    done = launch(MAKE, NUM_NODES=nodes, GPUS_PER_NODE="4", PARTITION="gpu", ACCOUNT="us", TIME_LIMIT="1-12:00:00", check=True, **variables)
    job = tmp_path / "job.sbatch"
    job.write_text(done.out)
    assert subprocess.run(["bash", "-n", job]).returncode == 0
    assert subprocess.run([ROOT / ".venv/bin/shellcheck", "-e", "SC1091,SC2016", job], capture_output=True, text=True).stdout == ""
    for line in (f"--nodes={nodes}", "--gpus-per-node=4", "--partition=gpu", "--account=us", "--time=1-12:00:00"):
        assert f"#SBATCH {line}\n" in done.out
    assert "export METHOD_LIST='pure_opd:1.0 tip:0.1'\n" in done.out
    assert f"export WANDB_PROJECT={shlex.quote(variables['WANDB_PROJECT'])}\n" in done.out
    assert ("ray.scripts.scripts start --head" in done.out) == (nodes != "1")
    if shutil.which("sbatch"):
        assert subprocess.run(["sbatch", "--test-only", job]).returncode == 0


@pytest.mark.parametrize("nodes", [1, 3])
def test_kuberay(nodes, launch, pair_variables):
    variables = pair_variables("8b_to_4b") | {"METHOD_LIST": "pure_opd:1.0 tip:0.1"}
    done = launch(MAKE, JOB_KIND="kuberay", NUM_NODES=str(nodes), LAUNCHER="scripts/train/run_tip.sh", check=True, **variables)
    job = yaml.safe_load(done.out)
    jsonschema.validate(job, SCHEMA)
    cluster = job["spec"]["rayClusterSpec"]
    assert sum(g["replicas"] for g in cluster.get("workerGroupSpecs", [])) == nodes - 1
    assert cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["env", "-C", "/workspace/ta-opd"] and words[-2:] == ["bash", "scripts/train/run_tip.sh"]
    assert "RAY_ADDRESS=auto" in words and (f"ACTOR_NUM_NODES={nodes}" in words) == (nodes > 1)
    assert not [w for w in words if w.startswith("METHOD_LIST")]  # run_tip.sh has no such variable


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_both_kinds_hold_the_same_variables(nodes, launch, pair_variables, place):
    given = pair_variables("8b_to_4b") | {"METHOD_LIST": "pure_opd:1.0 tip:0.1", "WANDB_PROJECT": "it's $mine", "NUM_ROLLOUT": "7", "LR": "2e-6"}
    slurm = launch(MAKE, NUM_NODES=nodes, check=True, **given).out
    job = yaml.safe_load(launch(MAKE, JOB_KIND="kuberay", NUM_NODES=nodes, check=True, **given).out)
    exported = [shlex.split(line)[1] for line in slurm.splitlines() if line.startswith("export ") and "=" in line and "PYTHONPATH" not in line]
    words = shlex.split(job["spec"]["entrypoint"])
    assert ["RAY_ADDRESS=auto", *exported] == words[3 : words.index("bash")]
    held = dict(word.split("=", 1) for word in exported)
    assert {name: held[name] for name in given} == {name: neutral(value, place) for name, value in given.items()}
    assert ("ACTOR_NUM_NODES" in held) == (nodes == "2")


def test_a_slurm_script_runs_its_launcher(launch, pair_variables, place, tmp_path):
    """One node needs nothing of Slurm: the script itself, as a dry run, shows the very commands of the launcher."""
    variables = pair_variables("8b_to_4b") | {"NUM_ROLLOUT": "7"}
    script = launch(MAKE, NUM_NODES="1", LAUNCHER="scripts/train/run_tip.sh", check=True, **variables).out
    (tmp_path / "job.sbatch").write_text(script.replace("PLACE/", f"{place}/"))
    environment = {"PATH": os.environ["PATH"], "HOME": str(place), "TIMESTAMP": "20260101_000000", "SLURM_SUBMIT_DIR": str(ROOT), "DRY_RUN": "1"}
    done = subprocess.run(["bash", tmp_path / "job.sbatch"], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert neutral(done.stdout, place) == launch("scripts/train/run_tip.sh", DRY_RUN="1", check=True, **variables).out


def test_a_slurm_script_of_several_nodes(launch, pair_variables, place, tmp_path):
    """With stand-ins for Slurm's programs: who is started where, with which address, token and CPUs, and how the job ends."""
    variables = pair_variables("8b_to_4b") | {"LAUNCHER": "scripts/train/run_tip.sh", "NUM_NODES": "3", "GPUS_PER_NODE": "4", "CPUS_PER_NODE": "24"}
    script = launch(MAKE, check=True, **variables).out.replace("PLACE/", f"{place}/")
    (tmp_path / "job.sbatch").write_text(script)
    record = f'printf "%s cpus=%s token=%s\\n" "$*" "$SRUN_CPUS_PER_TASK" "${{#RAY_AUTH_TOKEN}}" >> {tmp_path}/calls'
    stubs = {
        "scontrol": "printf 'n1\\nn2\\nn3\\n'", "srun": f'{record}\nif [[ $* == *gethostbyname* ]]; then echo 10.0.0.1; else sleep 60; fi',
        "python": f'if [[ $1 == -c ]]; then exec {shlex.quote(sys.executable)} "$@"; fi\nsleep 1\n{record}\necho "$RAY_ADDRESS"\nexit 7',
    }  # fmt: skip
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(place), "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "3",
        "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_CPUS_PER_TASK": "24", "PY": str(tmp_path / "python"),
    }  # fmt: skip
    process = subprocess.Popen(["bash", tmp_path / "job.sbatch"], env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.wait(60) == 7  # the launcher's own code
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # Slurm ends the steps
    assert process.stdout.read() == "10.0.0.1:20041\n"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 4 and all(line.endswith("cpus=24 token=64") for line in calls)
    head, rest = (next(line for line in calls if f" start {flag}" in line) for flag in ("--head", "--block --address"))
    assert "--nodelist=n1 " in head and "--port=20041" in head
    assert "--nodes=2 --ntasks=2 --exclude=n1 " in rest and "--address=10.0.0.1:20041" in rest
    assert "tools/run_on_ray.py --address 10.0.0.1:20041 --wait-nodes 3 -- bash scripts/train/run_tip.sh" in calls[-1]


def test_the_schema_refuses_what_kuberay_does_not_know():
    job = yaml.safe_load((ROOT / "scripts/cluster/rayjob.yaml").read_text())
    jsonschema.validate(job, SCHEMA)
    for change in (
        lambda j: j["spec"].update(entryPoint="x"),
        lambda j: j["metadata"].update(name="Upper"),
        lambda j: j["spec"]["rayClusterSpec"]["headGroupSpec"].pop("template"),
        lambda j: j["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update(x=1),
    ):
        broken = json.loads(json.dumps(job))
        change(broken)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)


@pytest.mark.parametrize("kind", ["slurm", "kuberay"])
def test_a_job_with_too_few_gpus_is_not_written(kind, launch, pair_variables, tmp_path):
    variables = pair_variables("8b_to_4b") | {"LAUNCHER": "scripts/train/run_tip.sh", "NUM_NODES": "2", "GPUS_PER_NODE": "8", "JOB_KIND": kind}
    sizes = {"ACTOR_NUM_GPUS_PER_NODE": "8", "ROLLOUT_NUM_GPUS": "16", "COLOCATE": "1", "JOB_FILE": str(tmp_path / "job")}
    done = launch(MAKE, **variables, **sizes)
    assert done.code == 2 and not (tmp_path / "job").exists()
    assert "NUM_NODES=2 x GPUS_PER_NODE=8: expected at least 17 GPUs, 16 for the trainer" in done.err and "got 16" in done.err
    assert "error: ROLLOUT_NUM_GPUS=all: expected an integer" in launch(MAKE, **(variables | sizes | {"ROLLOUT_NUM_GPUS": "all"})).err
    for fits in ({"TEACHER_MODEL": "", "TEACHER_URL": "http://a:1/generate"}, {"ACTOR_NUM_GPUS_PER_NODE": "7", "ROLLOUT_NUM_GPUS": "14"}):
        launch(MAKE, check=True, **(variables | sizes | fits))
    assert "expected at least 17 GPUs" in launch(MAKE, **(variables | sizes | {"COLOCATE": "0", "ACTOR_NUM_NODES": "1", "ROLLOUT_NUM_GPUS": "8"})).err


def test_cpu_nodes_and_a_python_of_the_job(launch):
    done = launch(MAKE, NUM_NODES="1", GPUS_PER_NODE="0", PY="/opt/env/bin/python", check=True)
    assert "gpus-per-node" not in done.out
    assert "export PY=/opt/env/bin/python\n" in done.out
    assert "PY=" not in launch(MAKE, NUM_NODES="1", check=True).out.replace("PY=${PY", "")


@pytest.mark.parametrize("kind", ["slurm", "kuberay"])
def test_an_empty_value_that_was_chosen_goes_into_the_job(kind, launch, pair_variables):
    """RECOMPUTE_GRANULARITY= switches recomputation off; in the job its default would switch it on again."""
    given = pair_variables("8b_to_4b") | {"RECOMPUTE_GRANULARITY": "", "OPD_TEACHER_NAME": "", "NUM_ROLLOUT": ""}
    done = launch(MAKE, JOB_KIND=kind, NUM_NODES="2", LAUNCHER="scripts/train/run_opd.sh", check=True, **given)
    words = shlex.split(done.out, comments=True) if kind == "slurm" else shlex.split(yaml.safe_load(done.out)["spec"]["entrypoint"])
    assert "RECOMPUTE_GRANULARITY=" in words
    assert not [w for w in words if w in ("OPD_TEACHER_NAME=", "NUM_ROLLOUT=", "PY=")]  # where empty is the default


@pytest.mark.parametrize("script", ["scripts/lib/run.sh", "scripts/setup.sh"])
def test_a_script_that_is_no_launcher_is_refused(script, launch):
    done = launch(MAKE, LAUNCHER=script)
    assert done.code == 2 and done.err == f"error: LAUNCHER={script}: expected a launcher (one that answers --variables), such as scripts/train/run_opd.sh\n"


def test_a_file_that_cannot_be_written_is_said(launch):
    done = launch(MAKE, JOB_FILE="/nowhere/job")
    assert done.code == 2 and done.err == "error: JOB_FILE=/nowhere/job: expected a file that can be written, got No such file or directory\n"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("TIME_LIMIT", "tomorrow", "hours:minutes:seconds"), ("MEMORY_PER_NODE", "lots", "a size such as 512G"),
        ("LAUNCHER", "scripts/none.sh", "a script of this project"), ("JOB_NAME", "TA_OPD", "lower-case letters"), ("NUM_NODES", "0", "an integer >= 1"),
        ("NAMESPACE", "My Space", "lower-case letters"), ("SHARED_MOUNT", "data", "an absolute path"), ("PROJECT_DIR", "./x", "an absolute path"),
        ("PARTITION", "gpu --exclusive", "a name without blanks"), ("ACCOUNT", "a b", "a name without blanks"),
    ],
)  # fmt: skip
def test_wrong_values(name, value, expected, launch):
    done = launch(MAKE, JOB_KIND="kuberay", **{name: value})
    assert done.code == 2 and f"error: {name}={value}: expected" in done.err and expected in done.err
