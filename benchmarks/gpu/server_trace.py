"""Where the GPU's time goes in a server that scores or samples: seconds of whole loads, and a profile of a few batches summed by kind of kernel.

    python benchmarks/gpu/server_trace.py --json OUT.json                        # a 4B teacher scores 256 x (256 + 1,024) at K = 16
    python benchmarks/gpu/server_trace.py --samples 4 --json OUT.json            # the same of 64 prompts
    python benchmarks/gpu/server_trace.py --role student --shape 1.7B --json OUT.json
    python benchmarks/gpu/server_trace.py --tiny --device cpu --json OUT.json    # the same code on any machine, without kernels to sum

Weights are made up by the server. The profile is SGLang's own (`/start_profile`: torch's profiler over the next batches); a profiled load
takes longer than the others and is not timed. Flags after -- go to the server.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import gzip
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if __package__ in (None, ""):
    sys.path[:0] = [str(ROOT), str(ROOT / "slime_ta_opd")]

from benchmarks.service_models import SHAPES, write_model  # noqa: E402
from slime.backends.sglang_utils import loop  # noqa: E402
from slime.backends.sglang_utils.client import SGLangClient  # noqa: E402
from slime.backends.sglang_utils.server import SGLangServer  # noqa: E402

# The first whose word is in a kernel's name. Copies hold those of logits to float32 and of queries and keys alike.
KINDS = {
    "rows read once": ("_groups_kernel", "_largest_kernel"), "quantization": ("quant_fp8",),
    "attention": ("_fwd_kernel", "_fwd_grouped", "FlashAttn", "flash::", "flash_fwd"), "matrix products": ("nvjet", "gemm", "cutlass", "cublas"), "top-K": ("topk", "TopK", "bitonic"), "soft-max": ("SoftMax",),
    "norms": ("Norm", "norm"), "gated activation": ("act_and_mul",), "rotation": ("rope",), "copies": ("direct_copy", "vectorized_gather", "Memcpy"),
}  # fmt: skip
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


def kind_of(name: str) -> str:
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")


def account(events: list[dict]) -> dict | None:
    """Of a Chrome trace's complete events: {span_ms, busy_ms, ms and launches by kind, largest first}; None without GPU events."""
    on_gpu = sorted((e for e in events if e.get("ph") == "X" and e.get("cat") in ON_GPU), key=lambda e: e["ts"])
    if not on_gpu:
        return None
    sums, launches = collections.Counter(), collections.Counter()
    begin = end = on_gpu[0]["ts"]
    busy = 0.0
    for event in on_gpu:
        sums[kind_of(event["name"])] += event["dur"]
        launches[kind_of(event["name"])] += 1
        last = event["ts"] + event["dur"]
        busy += max(0.0, last - max(end, event["ts"]))
        end = max(end, last)
    return {"span_ms": (end - begin) / 1e3, "busy_ms": busy / 1e3, "ms": {k: v / 1e3 for k, v in sums.most_common()}, "launches": dict(launches)}


class Load:
    """The same requests again and again, each time from an empty cache."""

    def __init__(self, o, url: str):
        self.o, self.client = o, SGLangClient([url], max_concurrency=o.responses, name=o.role)
        rng = np.random.default_rng(0)
        high = SHAPES[o.shape]["vocab_size"] - 1000
        prompts = [rng.integers(300, high, o.prompt_len).tolist() for _ in range(-(-o.responses // o.samples))]
        self.prompts = [prompts[i // o.samples] for i in range(o.responses)]
        self.responses = [rng.integers(300, high, o.response_len).tolist() for _ in range(o.responses)]

    async def once(self, profile: Path | None = None) -> float:
        o, client = self.o, self.client
        await client.flush_cache()
        if o.role == "teacher":
            calls = [client.score(p + r, o.response_len, o.k) for p, r in zip(self.prompts, self.responses, strict=True)]
        else:
            params = {"temperature": 1.0, "max_new_tokens": o.response_len, "ignore_eos": True}
            calls = [client.generate(p, {**params, "sampling_seed": i}, o.k) for i, p in enumerate(self.prompts)]
        begin = time.perf_counter()
        running = asyncio.gather(*calls)
        if profile is not None:
            await asyncio.sleep(o.profile_after)
            activities = ["CPU", "GPU"] if o.device == "cuda" else ["CPU"]
            await client.call(client.urls[0], "/start_profile", {"output_dir": str(profile), "num_steps": o.batches, "activities": activities})
        await running
        return time.perf_counter() - begin


def read_trace(folder: Path, wait: float = 30.0) -> list[dict]:
    """Events of the one trace that the server writes to `folder`; empty where none came."""
    end = time.monotonic() + wait
    while time.monotonic() < end:
        for file in folder.glob("*.json*"):
            try:
                return json.loads(gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes())["traceEvents"]
            except (OSError, EOFError, ValueError):  # still being written
                pass
        time.sleep(0.5)
    return []


def main(argv: list[str] | None = None) -> int:
    o = parse(argv)
    with tempfile.TemporaryDirectory(prefix="trace-") as name:
        folder = Path(name)
        dtype = "float32" if o.device == "cpu" else "bfloat16"
        model = write_model(folder / "model", o.shape, dtype, 0)
        flags = [*([] if o.shape == "tiny" else ["--load-format", "dummy"]), *o.extra]
        args = argparse.Namespace(device=o.device, sglang_dtype=dtype, rollout_max_context_len=o.prompt_len + o.response_len, rollout_batch_size=o.responses,
                                  n_samples_per_prompt=1, sglang_mem_fraction_static=0.8, teacher_mem_fraction_static=0.8, sglang_passthrough=flags)  # fmt: skip
        server = SGLangServer.for_run(args, o.role, str(model), log_file=folder / "server.log", device_env={"OMP_NUM_THREADS": "1"} if o.device == "cpu" else None)
        try:
            server.start()
            server.wait_ready(600)
            load = Load(o, server.url)
            loop.run(load.once())  # compiles what is compiled at first use
            seconds = [loop.run(load.once()) for _ in range(o.repeats)]
            loop.run(load.once(folder / "profile"))
            gpu = account(read_trace(folder / "profile"))
            load.client.close()
        finally:
            server.stop()
    tokens = o.responses * (o.response_len + (o.prompt_len if o.role == "teacher" else 0))
    result = {"command": ["server_trace.py", *(argv if argv is not None else sys.argv[1:])], "role": o.role, "shape": o.shape, "seconds": seconds,
              "tokens_per_second": tokens / min(seconds), "batches": o.batches, "gpu": gpu}  # fmt: skip
    if o.json:
        o.json.parent.mkdir(parents=True, exist_ok=True)
        o.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{o.role} {o.shape}: {o.responses} x ({o.prompt_len} + {o.response_len}), K = {o.k}: {', '.join(f'{s:.2f}' for s in seconds)} s, {tokens / min(seconds):,.0f} tokens/s")
    if gpu is None:
        print("no GPU events in the profile" + ("" if o.device == "cuda" else " (on a CPU there are none)"))
        return int(o.device == "cuda")
    print(f"{o.batches} batches: {gpu['span_ms']:.0f} ms, of which the GPU worked {gpu['busy_ms']:.0f} ({gpu['busy_ms'] / gpu['span_ms']:.0%})")
    for kind, ms in gpu["ms"].items():
        print(f"  {kind:18} {ms:9.2f} ms {gpu['launches'][kind]:6d} launches")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--role", choices=("teacher", "student"), default="teacher")
    add("--shape", choices=tuple(SHAPES), help="default: 4B of a teacher, 1.7B of a student")
    add("--responses", type=int, help="256; 8 with --tiny")
    add("--samples", type=int, default=1, help="responses a prompt")
    add("--prompt-len", type=int, help="256; 16 with --tiny")
    add("--response-len", type=int, help="1,024; 32 with --tiny")
    add("--k", type=int, default=16)
    add("--repeats", type=int, default=2)
    add("--batches", type=int, default=8, help="that are profiled")
    add("--profile-after", type=float, help="seconds after the start of the load; default 0.5, 0 with --tiny")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tiny", action="store_true", help="a tiny model and few tokens")
    add("--json", type=Path)
    add("extra", nargs="*", help="after --: further flags of the server")
    o = parser.parse_args(argv)
    sizes = {"responses": 8, "prompt_len": 16, "response_len": 32, "profile_after": 0.0, "shape": "tiny"} if o.tiny else {
        "responses": 256, "prompt_len": 256, "response_len": 1024, "profile_after": 0.5, "shape": "4B" if o.role == "teacher" else "1.7B"}  # fmt: skip
    for name, value in sizes.items():
        if getattr(o, name) is None:
            setattr(o, name, value)
    return o


if __name__ == "__main__":
    sys.exit(main())
