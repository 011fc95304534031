"""Where every process of a run goes: Ray, one placement group, and slots for trainer ranks, engines and teachers.

On GPUs a slot is one GPU of the group. Trainer ranks come first, then the student's engines (the same GPUs with
--colocate), then the teachers (their own GPUs, or the trainer's with --teacher-colocate). On CPU a slot is a process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slime.backends.sglang_utils.secret import Secret
from slime.backends.sglang_utils.server import is_loopback
from slime.ray import cluster
from slime.utils.misc import human_bytes, quiet_environment
from ta_opd.errors import ConfigError, ServiceError

LOCAL_OBJECT_STORE = 512 * 2**20  # a laptop run ships a few MB a step


@dataclass(frozen=True)
class Slot:
    """One place for one process. gpu: physical or visible GPU id as CUDA_VISIBLE_DEVICES wants it, None on CPU."""

    bundle: int
    node: str
    gpu: str | None


@dataclass
class Layout:
    """How many slots a run needs, before Ray is asked. Indices count GPUs (or processes) of the whole run."""

    trainer: list[int]
    engines: list[list[int]]
    teachers: dict[str, list[list[int]]]
    total: int


@dataclass
class Placement:
    layout: Layout
    group: PlacementGroup
    slots: list[Slot]
    session: str | None  # folder of logs and sockets of a Ray that this run started; None where it joined one
    addresses: dict[str, str] = field(default_factory=dict)

    def stop(self) -> None:
        """Gives the slots back; on a cluster the next attempt of this driver needs them."""
        remove_placement_group(self.group)

    def options(self, index: int, env: dict[str, str] | None = None, gpus: list[int] | None = None) -> dict:
        """Ray actor options for a process in slot `index` that sees the GPUs of slots `gpus` (default: its own)."""
        slot = self.slots[index]
        visible = [self.slots[i].gpu for i in (gpus if gpus is not None else [index])]
        variables = {**({} if self.session else cluster.forwarded()), "PYTHONPATH": python_path(), **(env or {})}
        if slot.gpu is not None:
            variables |= {"CUDA_VISIBLE_DEVICES": ",".join(visible), "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
        elif not self.session:
            variables["CUDA_VISIBLE_DEVICES"] = ""  # the node of a cluster may have GPUs that this run does not want
        return {
            "num_cpus": 0,
            "num_gpus": 0,
            "runtime_env": {"env_vars": variables},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, slot.bundle, placement_group_capture_child_tasks=True),
        }


def python_path() -> str:
    """PYTHONPATH for child processes: this tree first, then what the parent had."""
    here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    parts = [here, os.path.dirname(here), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.pathsep.join(dict.fromkeys(p for p in parts if p))


def plan_layout(args) -> Layout:
    """Slots by the flags alone; the same for --dry-run and for the run."""
    trainer = list(range(args.world_size))
    cursor = args.world_size
    per, count = args.rollout_num_gpus_per_engine, args.rollout_num_gpus // args.rollout_num_gpus_per_engine
    engines: list[list[int]] = []
    if not args.rollout_external_engine_addrs:
        shared = args.colocate
        if shared and args.rollout_num_gpus > args.world_size:
            raise ConfigError(f"--colocate: expected --rollout-num-gpus of at most the trainer's {args.world_size}, got {args.rollout_num_gpus}")
        base = 0 if shared else cursor
        engines = [list(range(base + e * per, base + (e + 1) * per)) for e in range(count)]
        cursor = cursor if shared else cursor + args.rollout_num_gpus
    teachers: dict[str, list[list[int]]] = {}
    per, count = args.teacher_num_gpus_per_engine, args.teacher_num_gpus // args.teacher_num_gpus_per_engine
    for name, target in args.teachers.items():
        if isinstance(target, list):
            continue
        if args.teacher_colocate and args.teacher_num_gpus > args.world_size:
            raise ConfigError(f"--teacher-colocate: expected --teacher-num-gpus of at most {args.world_size}, got {args.teacher_num_gpus}")
        base = 0 if args.teacher_colocate else cursor
        teachers[name] = [list(range(base + e * per, base + (e + 1) * per)) for e in range(count)]
        cursor = cursor if args.teacher_colocate else cursor + args.teacher_num_gpus
    return Layout(trainer, engines, teachers, cursor)


def create_placement(args) -> Placement:
    """Joins the cluster at RAY_ADDRESS or starts a local Ray, reserves the slots and finds out where they are."""
    layout = plan_layout(args)
    session = start_ray(args, layout.total)
    unit = {"GPU": 1, "CPU": 1} if args.device == "cuda" else {"CPU": 1}
    group = placement_group([unit] * layout.total, strategy="PACK")
    if not group.wait(timeout_seconds=60):
        have, free = ({k: v for k, v in of().items() if k in ("CPU", "GPU")} for of in (ray.cluster_resources, ray.available_resources))
        remove_placement_group(group)
        raise ServiceError(f"placement: expected {layout.total} x {unit}, the cluster has {have} and of these {free} free; "
                           "lower the sizes, share with --colocate, or wait for other runs to end")  # fmt: skip
    where = [
        _where.options(num_cpus=1, num_gpus=unit.get("GPU", 0), scheduling_strategy=PlacementGroupSchedulingStrategy(group, i)).remote()
        for i in range(layout.total)
    ]
    order = {gpu: i for i, gpu in enumerate(os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))} if session else {}
    found = sorted(enumerate(ray.get(where)), key=lambda item: (item[1][0], _position(item[1][1], order), item[0]))
    slots = [Slot(bundle, node, gpu) for bundle, (node, gpu) in found]
    nodes = {slot.node for slot in slots}
    if len(nodes) > 1 and is_loopback(args.sglang_host):  # nobody on another node could reach a server there
        args.sglang_host = cluster.NODE_ADDRESS
        args.sglang_api_key = args.sglang_api_key or Secret(secrets.token_urlsafe(24))
    return Placement(layout, group, slots, session)


def start_ray(args, slots: int) -> str | None:
    """Session folder of the local Ray that this process started; None where it joined one that runs."""
    quiet_environment()
    os.environ["PYTHONPATH"] = python_path()
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # its note that a token is used
    if ray.is_initialized():
        return None
    with _own_signals():
        return _init_ray(args, slots)


def _init_ray(args, slots: int) -> str | None:
    address = os.environ.get("RAY_ADDRESS")
    if cluster.is_joined(address):
        head = cluster.check(address)
        try:
            ray.init(address=head, logging_level="warning", log_to_driver=True)
        except (ConnectionError, RuntimeError, ValueError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            raise ServiceError(
                f"RAY_ADDRESS={address}: the cluster answers, but this driver cannot join it: {lines[0]}. Expected a driver on one of the "
                "cluster's machines, with the same Python and Ray; from elsewhere use its job server, http://host:8265"
            ) from error
        return None
    cluster.private_token()
    memory = {} if args.device == "cuda" else {"object_store_memory": LOCAL_OBJECT_STORE}
    context = ray.init(address="local", num_cpus=max(slots, os.cpu_count() or 1), include_dashboard=False, logging_level="warning",
                       log_to_driver=True, **memory)  # fmt: skip
    return context.address_info["session_dir"]


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """ray.init puts its own handler of SIGTERM in the place of the run's: put back, and its exit is our interrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        if callable(handler):
            handler(signal.SIGTERM, None)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


def describe(layout: Layout, args) -> list[str]:
    """One line a process group, for --dry-run."""
    kind = "GPU" if args.device == "cuda" else "CPU process"
    lines = [f"trainer: {len(layout.trainer)} ranks on {kind} {_ids(layout.trainer)} (TP {args.tensor_model_parallel_size}, "
             f"PP {args.pipeline_model_parallel_size}, CP {args.context_parallel_size}, DP {args.data_parallel_size})"]  # fmt: skip
    lines += [f"student engine {e}: {kind} {_ids(slots)}" for e, slots in enumerate(layout.engines)]
    for name, replicas in layout.teachers.items():
        lines += [f"teacher {name!r} replica {r}: {kind} {_ids(slots)}" for r, slots in enumerate(replicas)]
    lines.append(f"slots in all: {layout.total} x {kind}")
    if args.device == "cpu":
        lines.append(f"local object store: {human_bytes(LOCAL_OBJECT_STORE)}")
    return lines


def _position(gpu: str | None, order: dict[str, int]) -> int:
    """Rank of a GPU on its node: the order of CUDA_VISIBLE_DEVICES where this process set it, else the id."""
    if gpu is None:
        return 0
    return order.get(gpu, int(gpu) if gpu.isdigit() else 0)


def _ids(slots: list[int]) -> str:
    return ",".join(map(str, slots))


@ray.remote
def _where() -> tuple[str, str | None]:
    gpus = ray.get_gpu_ids()
    return ray.util.get_node_ip_address(), str(gpus[0]) if gpus else None
