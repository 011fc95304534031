"""What the client adds to a rollout whose generation and scoring overlap: the real client, servers that take time but no processor.

    python benchmarks/overlap_client.py --json benchmarks/results/overlap_client.json        # 2 cores, half a minute

Two stand-in servers answer with prepared replies of real size (top-16: 220 and 204 bytes a token) when an H200 would have:
sampling 512 tokens of 64 responses in 2.68 s, scoring one response after another, 64 of them in 1.19 s (results/serving_h200.json,
where each model has the GPU alone). Responses have 256 to 512 tokens, as in services.py. Everything between is the product:
payloads, connections, parsing to arrays, the order of requests. The bound is 1.15 times generation alone plus the last sample's
scoring; `best_possible` is what this teacher leaves to a client that takes no time: responses that end together wait for each other.
All rollouts are kept; `resident_bytes` is by how much the resident set grew since the first one, a response token kept since then.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
from aiohttp import web

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "slime_ta_opd")]

from benchmarks.manager import generate_reply, score_reply  # noqa: E402
from benchmarks.own_lengths import PreparedIds, own_length, own_params, take_metrics  # noqa: E402
from benchmarks.selection import RESPONSE, machine, synthetic_batch  # noqa: E402
from benchmarks.services import gather, timed  # noqa: E402
from slime.backends.sglang_utils.client import SGLangClient  # noqa: E402
from slime.backends.sglang_utils.clients import Clients  # noqa: E402
from slime.rollout.data_source import PromptDataSource  # noqa: E402
from slime.rollout.sglang_rollout import generate_rollout  # noqa: E402
from slime.utils import memory  # noqa: E402

PROMPT, LONGEST, SAMPLES, K = 256, 512, 64, 16
STEP = 2.68 / LONGEST  # seconds a sampled token, all samples at once
SCORE = 1.19 / SAMPLES / (PROMPT + LONGEST)  # seconds a scored token, one sample after another


def serve(role: str) -> None:
    """A process that answers /generate for `role`; prints its port when its replies are ready."""
    batch = synthetic_batch(RESPONSE, K)
    make = generate_reply if role == "student" else score_reply
    replies = {n: make(batch, slice(0, n)) for n in range(LONGEST // 2, LONGEST + 1)}

    async def answer(request):
        body = json.loads(await request.read())
        if role == "student":
            length = body["sampling_params"]["max_new_tokens"]
            await asyncio.sleep(length * STEP)
        else:
            length = len(body["input_ids"]) - PROMPT
            async with busy:
                await asyncio.sleep((PROMPT + length) * SCORE)
        return web.Response(body=replies[length], content_type="application/json")

    async def main():
        nonlocal busy
        busy = asyncio.Lock()
        app = web.Application(client_max_size=2**24)
        app.router.add_post("/generate", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        print(runner.addresses[0][1], flush=True)
        await asyncio.Event().wait()

    busy = None
    asyncio.run(main())


def arguments(folder: Path) -> SimpleNamespace:
    from tests.sglang_utils.tiny import make_tokenizer

    make_tokenizer().save_pretrained(folder)
    (folder / "prompts.jsonl").write_text((json.dumps({"prompt": "x"}) + "\n") * SAMPLES)
    return SimpleNamespace(
        hf_checkpoint=str(folder), prompt_data=str(folder / "prompts.jsonl"), input_key="prompt", label_key=None, apply_chat_template=False,
        rollout_batch_size=SAMPLES, n_samples_per_prompt=1, rollout_max_response_len=LONGEST, rollout_max_context_len=PROMPT + LONGEST,
        rollout_temperature=1.0, rollout_top_p=1.0, rollout_top_k=-1, rollout_seed=1, opd_topk_metrics_k=K, opd_exact_cmass=False,
        opd_type="sglang", student_config={}, custom_generate_function_path=f"{ROOT / 'benchmarks' / 'own_lengths.py'}:sample_of_own_length",
    )  # fmt: skip


def best_possible(lengths: list[int]) -> float:
    """Seconds until the last response is scored where each is asked for the moment it is there."""
    free = 0.0
    for length in sorted(lengths):
        free = max(free, length * STEP) + (PROMPT + length) * SCORE
    return free


def measure(args: SimpleNamespace, clients: Clients, repeats: int) -> list[dict]:
    prompts = np.random.default_rng(0).integers(300, 4000, (SAMPLES, PROMPT)).tolist()
    lengths = [own_length(i, LONGEST) for i in range(SAMPLES)]
    student, teacher = clients.student, clients.teachers["default"]
    alone = [timed(gather([student.generate(p, own_params(i, n), K) for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))]))[0] for _ in range(repeats)]
    last = [timed(teacher.score(prompts[0] + [1] * max(lengths), max(lengths), K))[0] for _ in range(repeats)]
    source = PromptDataSource(args, PreparedIds(prompts))
    rows, kept, process, first = [], [], psutil.Process(), 0
    for n in range(repeats + 1):  # the first one opens the connections
        source.next_group = source.next_index = source.position = 0
        began, processor = time.perf_counter(), time.process_time()
        samples = [s for group in generate_rollout(args, n, source, clients) for s in group]
        seconds = time.perf_counter() - began
        assert sorted(s.response_length for s in samples) == sorted(lengths) and all(len(s.teacher_topk) == s.response_length for s in samples)
        kept.append(samples)
        columns = take_metrics(samples) / sum(lengths)
        first = process.memory_info().rss if n == 0 else first
        grown = (process.memory_info().rss - first) / (sum(lengths) * max(n, 1))
        rows.append({"seconds": seconds, "ratio": seconds / (min(alone) + min(last)), "not_hidden": clients.take_seconds()["score"],
                     "processor_seconds": time.process_time() - processor, "resident_bytes": grown, "metric_bytes_until_selection": columns})  # fmt: skip
    return [{"generation_alone": min(alone), "last_score": min(last), "best_possible": best_possible(lengths),
             "response_tokens": sum(lengths)}, *rows[1:]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", choices=("student", "teacher"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve:
        serve(options.serve)
        return 0
    if memory.one_arena():  # as the rollout manager's process is started
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **memory.one_arena()})
    servers = [subprocess.Popen([sys.executable, __file__, "--serve", role], stdout=subprocess.PIPE, text=True) for role in ("student", "teacher")]
    try:
        urls = [f"http://127.0.0.1:{server.stdout.readline().strip()}" for server in servers]
        clients = Clients(SGLangClient(urls[:1], name="student"), {"default": SGLangClient(urls[1:], name="teacher", max_concurrency=64)})
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(arguments(Path(folder)), clients, options.repeats)
        clients.close()
    finally:
        for server in servers:
            server.terminate()
            server.wait()
    for row in rows:
        print("  ".join(f"{name} {value:,.4g}" for name, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps({"command": "python benchmarks/overlap_client.py", "rows": rows, "machine": machine()}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
