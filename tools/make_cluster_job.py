"""Writes the job that runs a launcher on a cluster: a Slurm batch script or a KubeRay RayJob. scripts/cluster/make_job.sh calls this."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

from ta_opd.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
RAY_VERSION = "2.60.0"
NEVER_INTO_A_JOB = {"RAY_ADDRESS", "DRY_RUN"}


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.add_argument("--kind", choices=("slurm", "kuberay"), required=True)
    p.add_argument("--launcher", required=True, help="launcher to run, relative to the project")
    p.add_argument("--output", default="", help="file to write; empty: standard output")
    p.add_argument("--job-name", default="ta-opd")
    for name, default in (("nodes", 1), ("gpus", 8), ("cpus", 64)):
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--memory", default="512G")
    p.add_argument("--time", default="24:00:00")
    p.add_argument("--partition", default="")
    p.add_argument("--account", default="")
    p.add_argument("--namespace", default="default")
    p.add_argument("--image", default="ta-opd:gpu")
    p.add_argument("--project-dir", default="/workspace/ta-opd")
    p.add_argument("--claim", default="ta-opd-data")
    p.add_argument("--mount", default="/data")
    return p


def declared_variables(launcher: str) -> tuple[dict[str, str], set[str]]:
    """({name: default} of the launcher's variables in the order of its --help, names where empty is a choice of its own).

    Defaults may name other variables. Raises ConfigError where `launcher` is a script of another kind.
    """
    clean = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG")}
    done = subprocess.run(["bash", str(ROOT / launcher), "--variables"], env=clean, capture_output=True, text=True)
    if done.returncode or not done.stdout.startswith("about\t"):
        raise ConfigError(f"LAUNCHER={launcher}: expected a launcher (one that answers --variables), such as scripts/train/run_opd.sh")
    rows = [line.split("\t") for line in done.stdout.splitlines()[1:]]
    return {row[1]: row[3] for row in rows}, {row[1] for row in rows if row[6] == "?"}


def check_room(args: argparse.Namespace, values: dict[str, str]) -> None:
    """ConfigError where a run needs more GPUs than the job asks for. values: variables with the launcher's defaults."""
    if not args.gpus or "ROLLOUT_NUM_GPUS" not in values:
        return

    def count(name: str) -> int:
        if not values[name].isdigit():
            raise ConfigError(f"{name}={values[name]}: expected an integer >= 1")
        return int(values[name])

    trainer = count("ACTOR_NUM_NODES") * count("ACTOR_NUM_GPUS_PER_NODE")
    engines = 0 if values["STUDENT_URL"] else count("ROLLOUT_NUM_GPUS")
    served = values["OPD_TYPE"] == "sglang" and not values["TEACHER_URL"] and not values["TEACHERS"]
    teacher = max(len(values["TEACHER_GPU"].split(",")), count("TEACHER_NUM_GPUS_PER_ENGINE")) if served else 0
    total = (max(trainer, engines) if values["COLOCATE"] == "1" else trainer + engines) + teacher
    if total > args.nodes * args.gpus:
        how = "of these for engines too" if values["COLOCATE"] == "1" else f"{engines} for engines"
        raise ConfigError(
            f"NUM_NODES={args.nodes} x GPUS_PER_NODE={args.gpus}: expected at least {total} GPUs, {trainer} for the trainer (ACTOR_NUM_NODES x "
            f"ACTOR_NUM_GPUS_PER_NODE), {how} (ROLLOUT_NUM_GPUS, COLOCATE), {teacher} for the teacher; got {args.nodes * args.gpus}"
        )


def slurm(args: argparse.Namespace, variables: dict[str, str]) -> str:
    """A batch script: on several nodes a Ray cluster of this job's own, then the launcher on the first node."""
    options = {
        "job-name": args.job_name, "nodes": args.nodes, "ntasks-per-node": 1, "cpus-per-task": args.cpus, "mem": args.memory,
        "gpus-per-node": args.gpus or None, "time": args.time, "partition": args.partition or None, "account": args.account or None,
        "output": "%x_%j.log", "signal": "B:INT@120",
    }  # fmt: skip
    header = "\n".join(f"#SBATCH --{k}={v}" for k, v in options.items() if v is not None)
    exports = "\n".join(f"export {k}={shlex.quote(v)}" for k, v in variables.items()) or "# no variable was set: the launcher's defaults"
    run = (_SINGLE if args.nodes == 1 else _MULTI) + _WAIT
    return f"""#!/usr/bin/env bash
{header}
# Written by scripts/cluster/make_job.sh. Submit from the project's directory: sbatch THIS_FILE
set -euo pipefail
cd "${{SLURM_SUBMIT_DIR:-.}}"

{exports}

{run.replace("@LAUNCHER@", shlex.quote(args.launcher)).replace("@NODES@", str(args.nodes))}"""


_SINGLE = """bash @LAUNCHER@ &
"""

_MULTI = """PY=${PY:-.venv/bin/python}
export PYTHONPATH=$PWD:$PWD/slime_ta_opd${PYTHONPATH:+:$PYTHONPATH}
port=$((20000 + SLURM_JOB_ID % 20000))
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$("$PY" -c 'import secrets; print(secrets.token_hex(32))') # only this job may talk to its cluster
SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it from the job by itself
export RAY_AUTH_MODE RAY_AUTH_TOKEN SRUN_CPUS_PER_TASK
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts[0]}
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" "$PY" -c 'import socket; print(socket.gethostbyname(socket.gethostname()))')

srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \\
  "$PY" -m ray.scripts.scripts start --head --block --node-ip-address="$head_ip" --port="$port" --disable-usage-stats &
srun --overlap --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \\
  "$PY" -m ray.scripts.scripts start --block --address="$head_ip:$port" --disable-usage-stats &

RAY_ADDRESS=$head_ip:$port "$PY" tools/run_on_ray.py --address "$head_ip:$port" --wait-nodes @NODES@ \\
  -- bash @LAUNCHER@ &
"""

_WAIT = """launcher=$!
trap 'kill -TERM "$launcher"' INT TERM # shortly before the time limit: stop in order, the next job goes on from there
code=0
wait "$launcher" || code=$?
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" || code=$?; done
exit "$code" # Slurm ends what is left of the job's steps
"""


def kuberay(args: argparse.Namespace, variables: dict[str, str]) -> str:
    """A RayJob: the head and each worker are one node with its GPUs; the driver runs on the head."""
    resources = {"cpu": str(args.cpus), "memory": args.memory + "i"}
    if args.gpus:
        resources["nvidia.com/gpu"] = str(args.gpus)

    def pod(name: str) -> dict:
        return {
            "spec": {
                "containers": [
                    {
                        "name": name,
                        "image": args.image,
                        "workingDir": args.project_dir,
                        "resources": {"limits": dict(resources), "requests": dict(resources)},
                        "volumeMounts": [{"name": "shared", "mountPath": args.mount}, {"name": "shm", "mountPath": "/dev/shm"}],
                    }
                ],
                "volumes": [
                    {"name": "shared", "persistentVolumeClaim": {"claimName": args.claim}},
                    {"name": "shm", "emptyDir": {"medium": "Memory"}},
                ],
            }
        }

    cluster = {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token"},  # KubeRay 1.5.1 or newer makes the secret
        "headGroupSpec": {"rayStartParams": {"dashboard-host": "0.0.0.0"}, "template": pod("ray-head")},
    }
    if args.nodes > 1:
        cluster["workerGroupSpecs"] = [
            {
                "groupName": "nodes", "replicas": args.nodes - 1, "minReplicas": args.nodes - 1, "maxReplicas": args.nodes - 1,
                "rayStartParams": {}, "template": pod("ray-worker"),
            }
        ]  # fmt: skip
    environment = {"RAY_ADDRESS": "auto", **variables}
    launcher = [f"{k}={v}" for k, v in environment.items()]
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": args.job_name, "namespace": args.namespace},
        "spec": {
            "entrypoint": shlex.join(["env", "-C", args.project_dir, *launcher, "bash", args.launcher]),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 3600,
            "backoffLimit": 0,
            "rayClusterSpec": cluster,
        },
    }
    head = "# Written by scripts/cluster/make_job.sh. Submit: kubectl apply -f THIS_FILE\n"
    return head + yaml.safe_dump(job, sort_keys=False, width=120)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        defaults, may_be_empty = declared_variables(args.launcher)
        chosen = (name for name in defaults if os.environ.get(name) or (name in os.environ and name in may_be_empty))
        variables = {name: os.environ[name] for name in chosen if name not in NEVER_INTO_A_JOB}
        if args.nodes > 1:
            variables.setdefault("ACTOR_NUM_NODES", str(args.nodes))
        if args.nodes > 1 or args.kind == "kuberay":  # on one Slurm node the launcher itself looks at its GPU ids
            check_room(args, defaults | variables)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = (slurm if args.kind == "slurm" else kuberay)(args, variables)
    if args.output:
        try:
            Path(args.output).write_text(text, encoding="utf-8")
        except OSError as error:
            print(f"error: JOB_FILE={args.output}: expected a file that can be written, got {error.strerror}", file=sys.stderr)
            return 2
        print(f"wrote {args.output}")
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
