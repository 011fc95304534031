#!/usr/bin/env python
"""Services against real servers: sampling, scoring, exact-support designs, overlap, memory a token, weight sync.

    python benchmarks/services.py                                  # CPU, tiny models made on the spot
    python benchmarks/services.py --device cuda                    # one GPU: Qwen3-1.7B student, 4B teacher, random weights
    python benchmarks/services.py --device cuda --parts sync --sync-gpus 0,1     # sync to an engine on another GPU

Prints one table a part. Random weights: times and bytes are real, texts are noise. Shape of the work on a GPU: 64 prompts of
256 tokens, 512 sampled tokens each (--prompts, --prompt-len, --response-len). `generate` also samples each of --loads once, and `score`
scores the last of them; with the seconds of single steps from the server's log they are what fit_serving.py fits.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "slime_ta_opd")]

from benchmarks import decode_log, own_lengths  # noqa: E402
from benchmarks.own_lengths import PreparedIds, held_bytes, own_length, own_params, resident, take_metrics  # noqa: E402
from benchmarks.service_models import bucketed, hf_shapes, write_model  # noqa: E402
from slime.backends.sglang_utils import loop  # noqa: E402
from slime.backends.sglang_utils.client import SGLangClient  # noqa: E402
from slime.backends.sglang_utils.clients import Clients  # noqa: E402
from slime.backends.sglang_utils.server import SGLangServer  # noqa: E402
from slime.rollout.data_source import PromptDataSource  # noqa: E402
from slime.rollout.sglang_rollout import generate_rollout  # noqa: E402
from slime.utils import memory  # noqa: E402
from ta_opd.slime_patch.teacher import exact_windows, merge_known  # noqa: E402

PARTS = ("generate", "score", "exact", "overlap", "router", "sync")
LOADS = ("8x256@16", "256x256@0", "256x256@64", "256x1024@16")  # about 25 s on an H200, the score of the last among them


def main() -> None:
    o = options()
    if memory.one_arena():  # as the rollout manager's process is started
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **memory.one_arena()})
    with tempfile.TemporaryDirectory(prefix="services-") as folder:
        bench = Bench(o, Path(folder))
        try:
            bench.start()
            for part in o.parts:
                getattr(bench, part)()
        finally:
            bench.stop()


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--prompts", type=int)
    p.add_argument("--prompt-len", type=int)
    p.add_argument("--response-len", type=int)
    p.add_argument("--ks", type=int, nargs="+", default=[0, 16, 64])
    p.add_argument("--repeats", type=int, default=2)
    p.add_argument("--loads", nargs="*", metavar="RESPONSESxTOKENS@K", help=f"further sizes, each sampled once; on a GPU {' '.join(LOADS)}")
    p.add_argument("--sync-gpus", default="0", help="GPUs of trainer and engine among those visible, e.g. 0 (colocated) or 0,1 (apart)")
    p.add_argument("--teacher-quantization", help="of the teacher's server, such as fp8")
    p.add_argument("--json", help="also write the rows here")
    o = p.parse_args()
    small = o.device == "cpu"
    o.prompts = o.prompts or (16 if small else 64)
    o.prompt_len = o.prompt_len or (32 if small else 256)
    o.response_len = o.response_len or (64 if small else 512)
    words = ([] if small else LOADS) if o.loads is None else o.loads
    try:
        o.loads = [Load.parse(w) for w in words]
    except ValueError as error:
        p.error(f"--loads: {error}")
    return o


class Load(NamedTuple):
    """Responses at once, tokens of each, K."""

    responses: int
    tokens: int
    k: int

    @classmethod
    def parse(cls, word: str) -> Load:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)@(\d+)", word)
        if match is None:
            raise ValueError(f"expected RESPONSESxTOKENS@K such as 256x1024@16, got {word!r}")
        return cls(*(int(x) for x in match.groups()))


class Bench:
    def __init__(self, o, folder: Path):
        self.o, self.folder = o, folder
        self.rng = np.random.default_rng(0)
        self.rows: list[dict] = []
        self.servers: list[SGLangServer] = []
        if o.json:
            Path(o.json).parent.mkdir(parents=True, exist_ok=True)  # before minutes of work whose rows have to go there
        cuda = o.device == "cuda"
        self.names = ("1.7B", "4B") if cuda else ("tiny", "tiny")
        longest = max([o.response_len, *(load.tokens for load in o.loads)])
        most = max([o.prompts, *(load.responses for load in o.loads)])
        self.args = argparse.Namespace(
            device=o.device, sglang_dtype="bfloat16" if cuda else "float32", rollout_max_context_len=o.prompt_len + longest,
            rollout_max_response_len=o.response_len, rollout_temperature=1.0, rollout_top_p=1.0, rollout_top_k=-1, rollout_seed=1,
            sglang_server_concurrency=max(256, most), teacher_concurrency=64, request_timeout=600, request_retries=3, sglang_api_key=None,
            teacher_timeout=60, opd_topk_metrics_k=16, opd_exact_cmass=False, rollout_batch_size=o.prompts, n_samples_per_prompt=1,
            input_key="prompt", label_key=None, apply_chat_template=False, sglang_mem_fraction_static=0.4,
            teacher_mem_fraction_static=0.5, teacher_quantization=o.teacher_quantization, sglang_cuda_graph_max_bs=min(256, max(64, most)), teacher_cuda_graph_max_bs=8, opd_type="sglang",
            weight_sync="auto", output_dir=str(folder / "out"), sglang_host="127.0.0.1",
        )  # fmt: skip

    # ------------------------------------------------------------------ set-up

    def start(self) -> None:
        args = self.args
        apart = "," in self.o.sync_gpus and self.o.parts == ["sync"]
        gpus = self.o.sync_gpus.split(",")
        visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1,2,3,4,5,6,7").split(",")
        args.hf_checkpoint = str(write_model(self.folder / "student", self.names[0], args.sglang_dtype, 0))
        teacher = str(write_model(self.folder / "teacher", self.names[1], args.sglang_dtype, 1))
        args.student_config = json.loads(Path(args.hf_checkpoint, "config.json").read_text())
        args.sglang_passthrough = [*decode_log.FLAGS, *(["--load-format", "dummy"] if self.o.device == "cuda" else [])]
        roles = [("student", args.hf_checkpoint)] + ([] if self.o.parts == ["sync"] else [("teacher", teacher)])
        for role, path in roles:
            env = {"CUDA_VISIBLE_DEVICES": visible[int(gpus[-1] if apart else gpus[0])]} if self.o.device == "cuda" else {"OMP_NUM_THREADS": "1"}
            log = Path(os.environ.get("OUT", tempfile.gettempdir())) / f"services-{role}.log"
            self.servers.append(SGLangServer.for_run(args, role, path, log_file=log, device_env=env))
        begin = time.time()
        for server in self.servers:  # one after another: the first compiles kernels that the second finds
            server.start().wait_ready(900)
        print(f"servers ready after {time.time() - begin:.0f} s")
        urls = [s.url for s in self.servers]
        self.clients = Clients.connect(args, urls[:1], {"default": urls[1:]} if urls[1:] else {})
        vocab = args.student_config["vocab_size"]
        self.prompts = [self.rng.integers(300, vocab, self.o.prompt_len).tolist() for _ in range(self.o.prompts)]
        self.responses: list[list[int]] = []
        self.sequences: list[list[int]] = []  # of the last load

    def stop(self) -> None:
        if getattr(self, "clients", None):
            self.clients.close()
        for server in self.servers:
            server.stop()
        if self.o.json:
            Path(self.o.json).write_text(json.dumps(self.rows, indent=1))

    def row(self, part: str, **values) -> None:
        self.rows.append({"part": part, **values})
        shown = (f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {len(v)}" if isinstance(v, list) else f"{k} {v}" for k, v in values.items())
        print(f"{part:<9} " + "  ".join(shown), flush=True)

    # ------------------------------------------------------------------ parts

    def generate(self) -> None:
        """Every run starts with an empty cache. steps: see decode_log.step_seconds."""
        self._sample(self.prompts, self.o.response_len, 0)  # warm up
        for k in self.o.ks:
            runs = [self._sample(self.prompts, self.o.response_len, k) for _ in range(self.o.repeats)]
            seconds, replies, steps = min(runs, key=lambda x: x[0])
            self._report("generate", k, seconds, replies, self.o.response_len, steps=steps)
        self.responses = [r.output_ids for r in replies]
        for load in self.o.loads:
            prompts = self._more_prompts(load.responses)
            seconds, replies, steps = self._sample(prompts, load.tokens, load.k)
            self._report("generate", load.k, seconds, replies, load.tokens, steps=steps)
            self.sequences = [p + r.output_ids for p, r in zip(prompts, replies, strict=True)]

    def _more_prompts(self, count: int) -> list[list[int]]:
        """Prompts of their own, so that no position is in the cache for two."""
        vocab = self.args.student_config["vocab_size"]
        return [self.rng.integers(300, vocab, self.o.prompt_len).tolist() for _ in range(count)]

    def _sample(self, prompts, length: int, k: int):
        """(seconds, replies, seconds of single steps), all at once, from an empty cache."""
        student, log = self.clients.student, self.servers[0].log_file
        params = {"temperature": 1.0, "max_new_tokens": length, "ignore_eos": True}
        loop.run(student.flush_cache())
        begin = decode_log.size(log)
        seconds, replies = timed(gather([student.generate(p, {**params, "sampling_seed": i}, k) for i, p in enumerate(prompts)]))
        return seconds, replies, decode_log.read(log, begin)

    def _report(self, part: str, k: int, seconds: float, replies, length: int, **more) -> None:
        """One row; `length`: sampled or scored tokens of each reply."""
        tokens = len(replies) * length
        size, parse = sum(r.reply_bytes for r in replies), sum(r.parse_seconds for r in replies)
        self.row(part, K=k, seconds=seconds, tokens_per_second=tokens / seconds, MB=size / 1e6, bytes_per_token=size / tokens,
                 parse_us_per_token=1e6 * parse / tokens, responses=len(replies), response_len=length, prompt_len=self.o.prompt_len, **more)  # fmt: skip

    def _need_responses(self) -> None:
        if not self.responses:
            self.responses = [r.output_ids for r in self._sample(self.prompts, self.o.response_len, 0)[1]]

    def score(self) -> None:
        """Response span only (our way) and the whole sequence (the released way), every repeat shown: the first one compiles."""
        self._need_responses()
        sequences = [p + r for p, r in zip(self.prompts, self.responses, strict=True)]
        teacher = self.clients.teachers["default"]
        for k in self.o.ks:
            for name, length in (("response", self.o.response_len), ("whole", self.o.prompt_len + self.o.response_len - 1)):
                runs = []
                for _ in range(self.o.repeats):
                    loop.run(teacher.flush_cache())
                    seconds, replies = timed(gather([teacher.score(s, length, k) for s in sequences]))
                    runs.append(seconds)
                self._report("score", k, min(runs), replies, self.o.response_len, span=name, repeats="/".join(f"{s:.3f}" for s in runs))
            runs = []
            for _ in range(self.o.repeats):  # the prompts are in the server's cache now
                seconds, replies = timed(gather([teacher.score(s, self.o.response_len, k) for s in sequences]))
                runs.append(seconds)
            self._report("score", k, min(runs), replies, self.o.response_len, span="response, prompt cached", repeats="/".join(f"{s:.3f}" for s in runs))
        if self.sequences:
            load = self.o.loads[-1]
            loop.run(teacher.flush_cache())
            seconds, replies = timed(gather([teacher.score(s, load.tokens, load.k) for s in self.sequences]))
            self._report("score", load.k, seconds, replies, load.tokens, span="response, last load")

    def exact(self) -> None:
        """Ways to learn the teacher's log-probs at every one of the student's top-16 ids from an unmodified server.

        The student's ids are the teacher's own top-16 with a quarter replaced (by one of 2,000 frequent ids), so that the result
        does not hang on how near two models of random weights happen to be.
        """
        self._need_responses()
        k, length, teacher = 16, self.o.response_len, self.clients.teachers["default"]
        n = min(self.o.prompts, 16)
        sequences = [p + r for p, r in zip(self.prompts[:n], self.responses[:n], strict=True)]
        scores = timed(gather([teacher.score(s, length, k) for s in sequences]))[1]
        wanted, known = [], []
        for score in scores:
            ids = score.topk.ids.copy()
            replaced = self.rng.random(ids.shape) < 0.25
            ids[replaced] = self.rng.integers(300, min(2300, self.args.student_config["vocab_size"]), int(replaced.sum()))
            wanted.append(ids)
            known.append(np.isfinite(merge_known(ids, score.topk)))
        print(f"exact     the teacher's own top-{k} already holds {np.mean([x.mean() for x in known]):.1%} of the student's ids; {n} samples")
        designs = {"whole union, all ids": (length, False), "whole union, missing ids": (length, True)}
        for w in (64, 32, 16, 8, 4):
            if w < length:
                designs[f"windows of {w}, missing ids"] = (w, True)
        designs["windows of 16, all ids"] = (16, False)
        designs["every position alone, missing ids"] = (1, True)
        for name, (window, only_missing) in designs.items():
            dear = window >= length
            use = 4 if dear else n
            asks, entries, requests = [], 0, 0
            for sequence, ids_LK, known_LK in list(zip(sequences, wanted, known, strict=True))[:use]:
                windows = exact_windows(ids_LK, known_LK if only_missing else None, max_ids=10**6, window=window)
                shifted = [(b + self.o.prompt_len, e + self.o.prompt_len, ids) for b, e, ids in windows]
                requests += len(shifted)
                entries += sum((e - b) * len(ids) for b, e, ids in shifted)
                asks.append((sequence, shifted))
            runs = 1 if dear else self.o.repeats
            seconds = min(timed(gather([teacher.score_windows(s, w) for s, w in asks]))[0] for _ in range(runs))
            tokens = use * length
            self.row("exact", design=name, seconds=seconds, us_per_token=1e6 * seconds / tokens, requests=requests,
                     numbers_per_token=entries / tokens)  # fmt: skip

    def overlap(self) -> None:
        """A whole rollout: scoring starts when a sample is finished. Also bytes a token that stay in memory."""
        self.args.custom_generate_function_path = f"{Path(own_lengths.__file__).resolve()}:sample_of_own_length"
        lengths = [own_length(i, self.o.response_len) for i in range(self.o.prompts)]
        file = self.folder / "prompts.jsonl"
        file.write_text("".join(json.dumps({"prompt": "x" * self.o.prompt_len}) + "\n" for _ in range(self.o.prompts)))
        source = PromptDataSource(argparse.Namespace(**vars(self.args), prompt_data=str(file)), PreparedIds(self.prompts))
        tokens, student = sum(lengths), self.clients.student
        alone = 1e9
        for _ in range(self.o.repeats):
            calls = [student.generate(p, own_params(i, n), 16) for i, (p, n) in enumerate(zip(self.prompts, lengths, strict=True))]
            seconds, replies = timed(gather(calls))
            alone = min(alone, seconds)
        last = max(range(len(lengths)), key=lengths.__getitem__)
        sequence = self.prompts[last] + replies[last].output_ids
        one = min(timed(self.clients.teachers["default"].score(sequence, lengths[last], 16))[0] for _ in range(self.o.repeats))
        del replies
        gc.collect()
        for name in ("score_after_generation", "score_whole_sequence"):
            loop.run(self.clients.teachers["default"].flush_cache())
            began = time.perf_counter()
            source.next_group = source.next_index = source.position = 0
            generate_rollout(argparse.Namespace(**vars(self.args), **{name: True}), 0, source, self.clients)
            self.row("overlap", for_comparison=name, seconds=time.perf_counter() - began, **self.clients.take_seconds())
        kept_rollouts, before = [], resident()
        for n in range(self.o.repeats):
            loop.run(self.clients.teachers["default"].flush_cache())
            began = time.perf_counter()
            source.next_group = source.next_index = source.position = 0  # the same prompts, lengths and seeds each time
            groups = generate_rollout(self.args, n, source, self.clients)
            seconds, parts = time.perf_counter() - began, self.clients.take_seconds()
            kept_rollouts.append(groups)
            columns = take_metrics([s for g in groups for s in g]) / tokens
            grown = (psutil.Process().memory_info().rss - before) / (tokens * len(kept_rollouts))  # as the loop leaves it
            kept = held_bytes([s for g in groups for s in g]) / tokens
            self.row("overlap", seconds=seconds, generation_alone=alone, last_score=one, ratio=seconds / (alone + one),
                     not_hidden=parts["score"], bytes_per_token=kept, metric_bytes_until_selection=columns, rollouts_kept=n + 1, resident_bytes_per_token=grown)  # fmt: skip

    def router(self) -> None:
        """Two engines, 8 samples a prompt: our own balancing (fewest in flight) against sglang-router in front.

        one engine a prompt: what rollouts do, samples of a prompt stay together as long as the load allows.
        """
        from slime.backends.sglang_utils.router import Router

        if self.o.device == "cuda":
            print("router    skipped: needs a second GPU for the second engine")
            return
        args, samples = self.args, 8
        second = SGLangServer.for_run(args, "student", args.hf_checkpoint, log_file=self.folder / "second.log", device_env={"OMP_NUM_THREADS": "1"})
        self.servers.append(second)
        urls = [self.servers[0].url, second.start().wait_ready(900).url]
        prompts = [self.rng.integers(300, args.student_config["vocab_size"], self.o.prompt_len).tolist() for _ in range(max(2, self.o.prompts // samples))]
        for policy in ("own, one engine a prompt", "own, fewest in flight", "router cache_aware", "router round_robin"):
            router = None
            if policy.startswith("router"):
                router = Router((None, None), self.folder / "router.log", policy=policy.split()[1]).start()
                router.serve(urls)
            client = SGLangClient(urls, name="student", router=router.url if router else None)
            params = {"temperature": 1.0, "max_new_tokens": self.o.response_len, "ignore_eos": True}
            best = None
            for turn in range(self.o.repeats + 1):  # the first one warms up
                loop.run(client.flush_cache())
                calls = [client.generate(p, {**params, "sampling_seed": 100 * i + j}, 16, key=i if "prompt" in policy else None)
                         for i, p in enumerate(prompts) for j in range(samples)]  # fmt: skip
                seconds, replies = timed(gather(calls))
                cached = sum(r.cached_tokens for r in replies) / (len(replies) * self.o.prompt_len)
                if turn and (best is None or seconds < best[0]):
                    best = (seconds, cached)
            self.row("router", way=policy, seconds=best[0], tokens_per_second=len(prompts) * samples * self.o.response_len / best[0],
                     prompt_tokens_from_cache=best[1])  # fmt: skip
            client.close()
            if router:
                router.stop()
        second.stop()

    def sync(self) -> None:
        import torch

        from slime.backends.sglang_utils.weight_sync import WeightSender
        from slime.ray.actor_group import rank_environment

        cuda = self.o.device == "cuda"
        apart = "," in self.o.sync_gpus
        device = f"cuda:{self.o.sync_gpus.split(',')[0]}" if cuda else "cpu"
        if cuda:
            torch.cuda.set_device(device)
            os.environ |= rank_environment(argparse.Namespace(device="cuda", weight_sync="auto", colocate=not apart, rollout_external_engine_addrs=None))  # NCCL has not looked yet
        dtype = torch.bfloat16 if cuda else torch.float32
        named = [(n, 0.02 * torch.randn(s, dtype=dtype, device=device)) for n, s in hf_shapes(self.args.student_config)]
        engines = {"urls": self.clients.student.urls, "api_key": None, "tp": 1, "colocated": cuda and not apart}
        sender = WeightSender(self.args, engines, True)
        for n in range(self.o.repeats + 1):
            done = sender.send(iter(bucketed(named, 512 * 2**20)), n)
            self.row("sync", way=sender.way, round=n, seconds=done["seconds"], GB=done["bytes"] / 1e9)
        sender.close()


# ---------------------------------------------------------------------- helpers


def timed(coroutine):
    begin = time.perf_counter()
    result = loop.run(coroutine)
    return time.perf_counter() - begin, result


async def gather(coroutines):
    return await asyncio.gather(*coroutines)


if __name__ == "__main__":
    main()
