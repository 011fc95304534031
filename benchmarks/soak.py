"""Soak: 200 rollouts on CPU, and every ten of them a random process of an engine or a teacher is killed.

    python benchmarks/soak.py --json benchmarks/results/soak.json

Real SGLang, Ray and Megatron with tiny random models. Counts what was trained, the memory, processes, open files, ports and
files of the run, and fails (exit code 1) where a batch is not whole, memory grows, or anything is left behind.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "slime_ta_opd")]

from tests.e2e.live import SAMPLES, LiveRun  # noqa: E402

VICTIMS = {"scheduler": "sglang::scheduler", "detokenizer": "sglang::detokenizer", "server": "sglang_utils.launch", "supervisor": "supervise.py"}
GROWTH = 1.05  # last quarter against the second


def make_task(root: Path) -> SimpleNamespace:
    """Prompts and two tiny random Qwen3 models."""
    from examples.quickstart import arithmetic
    from tests.helpers.models import write_tiny_qwen3

    paths = arithmetic.write_task(root, num_train=64, num_heldout=16, seed=3)
    for seed, name in enumerate(("student", "teacher")):
        write_tiny_qwen3(root / name, paths["tokenizer"], seed)
    return SimpleNamespace(root=root, student=root / "student", teacher=root / "teacher", train=paths["train"])


def kind_of(process: psutil.Process) -> str:
    """driver's helper, "ray", "actor" or "server"; servers are restarted, the others must stay as they are."""
    line = " ".join(process.cmdline())
    if "sglang" in line:
        return "servers"
    if line.startswith("ray::") and not line.startswith(("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")):
        return "owners" if "ServerActor" in line else "actors"  # owners of servers are started anew with them
    return "ray"


def measure(run: LiveRun) -> dict:
    """Resident MiB and open files of the run's processes, by kind, how many there are, and how many of them are servers'."""
    mib: dict[str, float] = {}
    serving = 0
    files: dict[str, int] = {}
    found = run.look()
    for process in [psutil.Process(run.process.pid), *found]:
        try:
            kind = "driver" if process.pid == run.process.pid else kind_of(process)
            serving += kind == "servers"
            mib[kind] = mib.get(kind, 0.0) + process.memory_info().rss / 2**20
            files[kind] = files.get(kind, 0) + process.num_fds()
        except psutil.Error:
            continue
    return {"mib": mib, "files": files, "processes": len(found) + 1, "serving": serving}


def ports_of(run: LiveRun) -> set[int]:
    """Ports that the run's processes listen on."""
    pids = {run.process.pid, *(p.pid for p in run.look())}
    return {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in pids}


def files_of(run: LiveRun) -> set[str]:
    """What the run's processes have outside its directory: shared memory they map, Ray's session folder."""
    found = set()
    for process in run.look():
        try:
            found |= {m.path.split(" (")[0] for m in process.memory_maps() if m.path.startswith("/dev/shm/")}
            found |= {word.split("/sockets/")[0].split("=", 1)[1] for word in process.cmdline() if word.startswith("--raylet_socket_name=")}
        except (psutil.Error, OSError, IndexError):
            continue
    return found


def left_files(run: LiveRun, seen: set[str]) -> list[str]:
    scratch = [str(p) for p in Path("/tmp").glob("sgl-*") if int(p.name.split("-")[1]) in run.seen]
    return sorted(scratch + [name for name in seen if Path(name).exists()])


def line_of(process: psutil.Process) -> str:
    """Its command line; empty where it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def children_of(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def kill_one(run: LiveRun, dice: random.Random) -> str:
    """Kills a random process of a random server; its name."""
    role, what = dice.choice(["student", "teacher"]), dice.choice(list(VICTIMS))
    supervisors = [p for p in run.named("supervise.py") if f"/{role} " in line_of(p)]
    tree = [p for s in supervisors for p in (s, *children_of(s))]
    choice = [p for p in tree if VICTIMS[what] in line_of(p) and (what == "supervisor") == ("supervise.py" in line_of(p))]
    if not choice:  # between two starts
        return ""
    try:
        choice[0].kill()
    except psutil.Error:
        return ""
    return f"{role} {what}"


def soak(args, folder: Path) -> dict:
    dice = random.Random(args.seed)
    task = make_task(folder / "task")
    began = time.time()
    flags = ["--teacher-model", str(task.teacher), "--num-rollout", str(args.rollouts), "--opd-loss-type", "topk_reverse_kl",
             "--opd-budget-mask", "dlearn_high", "--opd-budget-ratio", "0.2", "--rollout-max-response-len", "16", "--save-interval", "50",
             "--keep-checkpoints", "1", "--opd-token-bank-dir", str(folder / "bank")]  # fmt: skip
    run = LiveRun(task, folder / "run", *flags)
    kills: list[dict] = []
    samples: list[dict] = []
    ports: set[int] = set()
    files: set[str] = set()
    try:
        while run.process.poll() is None:
            rows = len(run.rows())
            if rows > len(samples):
                samples += [measure(run)] * (rows - len(samples))
                ports |= ports_of(run)
                files |= files_of(run)
                print(f"\r{rows}/{args.rollouts} rollouts, {len(kills)} kills, {time.time() - began:.0f} s", end="", flush=True)
            due = args.every * (len(kills) + 1)
            if due <= rows < args.rollouts:
                time.sleep(dice.random())
                if victim := kill_one(run, dice):
                    kills.append({"after_rollout": rows - 1, "victim": victim, "second": round(time.time() - began, 1)})
            time.sleep(0.1)
    finally:
        seconds = time.time() - began
        left = run.left(30)
        run.stop()
    print()
    return report(args, run, kills, samples, ports, left, left_files(run, files), seconds)


def report(args, run, kills, samples, ports, left, files, seconds) -> dict:
    rows, n = run.rows(), len(samples)
    parts = {"second": samples[n // 4 : n // 2], "last": samples[3 * n // 4 :]}
    kinds = ("driver", "ray", "actors", "owners", "servers")
    mib = {kind: {name: round(statistics.median(s["mib"].get(kind, 0.0) for s in part), 1) for name, part in parts.items()} for kind in kinds}
    lasting = {name: round(sum(mib[kind][name] for kind in ("driver", "ray", "actors")), 1) for name in parts}
    complete = max(s["serving"] for s in samples)  # while a server is mended its memory is not there
    whole = {name: round(statistics.median(sum(s["mib"].values()) for s in part if s["serving"] == complete), 1) for name, part in parts.items()}
    fds = {kind: {name: statistics.median(s["files"].get(kind, 0) for s in part) for name, part in parts.items()} for kind in kinds}
    # other programs may get a port that the run had: only its own processes count
    listening = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in run.seen}
    try:
        run.check_samples(args.rollouts)
        doubled = ""
    except (AssertionError, OSError) as problem:
        doubled = str(problem) or "the rows or the samples of a rollout are not those expected"
    found = {
        "rollouts": len(rows), "samples_a_rollout": SAMPLES, "exit_code": run.process.returncode, "seconds": round(seconds, 1), "kills": kills,
        "seconds_a_rollout_without_faults": round(statistics.median(row["seconds/total"] for row in rows), 3),
        "seconds_a_rollout_worst": round(max(row["seconds/total"] for row in rows), 1),
        "short_batches": [row["rollout_id"] for row in rows if row["train/num_samples"] != SAMPLES],
        "lost_or_doubled": doubled, "mib": {**mib, "lasting": lasting, "all": whole},
        "growth_lasting": round(lasting["last"] / lasting["second"], 4), "growth_all": round(whole["last"] / whole["second"], 4),
        "open_files": fds, "processes": {name: statistics.median(s["processes"] for s in part) for name, part in parts.items()},
        "left_processes": left, "left_ports": sorted(ports & listening), "ports_seen": len(ports), "left_files": files,
    }  # fmt: skip
    found["passed"] = bool(
        found["rollouts"] == args.rollouts and found["exit_code"] == 0 and not found["short_batches"] and not doubled
        and found["growth_lasting"] <= GROWTH and found["growth_all"] <= GROWTH and not left and not found["left_ports"] and not files
        and len(kills) >= (args.rollouts - 1) // args.every
    )  # fmt: skip
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=200)
    parser.add_argument("--every", type=int, default=10, help="rollouts between two kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="keep the run here (default: a temporary one)")
    args = parser.parse_args(argv)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found = soak(args, folder)
    finally:
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({k: v for k, v in found.items() if k != "kills"}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
