"""What the port's tests need around the real code: a stock-shaped slime package, and the servers it talks to.

The package has only the names that a stock checkout provides to hooks, with plain behaviour of its own; the servers are real
HTTP servers that answer /generate from recorded cases.
"""

import asyncio
import gzip
import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from aiohttp import web

REPO = Path(__file__).parents[2]
CASES = REPO / "tests" / "data" / "selection_cases.json.gz"

STOCK_FILES = {
    "slime/__init__.py": "",
    "slime/rollout/__init__.py": "",
    "slime/utils/__init__.py": "",
    "slime/utils/types.py": """
        from dataclasses import dataclass, field
        from enum import Enum

        @dataclass
        class Sample:
            group_index: int = None
            index: int = None
            prompt: str = ""
            tokens: list = field(default_factory=list)
            multimodal_inputs: dict = None
            response: str = ""
            response_length: int = 0
            label: str = None
            reward: object = None
            loss_mask: list = None
            rollout_log_probs: list = None
            teacher_log_probs: object = None
            metadata: dict = field(default_factory=dict)
            session_id: str = None

            class Status(Enum):
                PENDING = "pending"
                COMPLETED = "completed"
                TRUNCATED = "truncated"
                ABORTED = "aborted"

            status: "Sample.Status" = Status.PENDING

            def get_reward_value(self, args):
                return self.reward

            def update_from_meta_info(self, args, meta_info):
                kinds = {"length": "TRUNCATED", "abort": "ABORTED", "stop": "COMPLETED"}
                self.status = Sample.Status[kinds[meta_info["finish_reason"]["type"]]]

            def append_response_tokens(self, args=None, *, tokens=None, log_probs=None, trainable=True, meta_info=None, text=None):
                before = self.response_length
                self.response += text
                self.tokens = self.tokens + tokens
                self.response_length += len(tokens)
                self.loss_mask = ([1] * before if self.loss_mask is None else self.loss_mask) + [1] * len(tokens)
                self.rollout_log_probs = (self.rollout_log_probs or []) + log_probs
                self.update_from_meta_info(args, meta_info)
        """,
    "slime/utils/misc.py": """
        import importlib

        def load_function(path):
            module, _, name = path.rpartition(".")
            return getattr(importlib.import_module(module), name)
        """,
    "slime/utils/http_utils.py": """
        import json
        import aiohttp

        async def post(url, payload, max_retries=60, headers=None):
            async with aiohttp.ClientSession() as session, session.post(url, json=payload, headers=headers) as response:
                response.raise_for_status()
                return json.loads(await response.read())
        """,
    "slime/rollout/rm_hub/__init__.py": """
        from slime.utils.misc import load_function

        async def async_rm(args, sample, **kwargs):
            if args.custom_rm_path is not None:
                return await load_function(args.custom_rm_path)(args, sample, **kwargs)
            assert args.rm_type == "exact"
            return float(sample.response == sample.label)

        async def batched_async_rm(args, samples, **kwargs):
            return await load_function(args.custom_rm_path)(args, samples, **kwargs)
        """,
    "slime/rollout/sglang_rollout.py": """
        import asyncio
        import inspect
        from slime.rollout.rm_hub import async_rm, batched_async_rm
        from slime.utils.http_utils import post
        from slime.utils.misc import load_function

        class Tokenizer:
            def encode(self, text, add_special_tokens=True):
                assert not add_special_tokens
                return [int(word) for word in text.split()]

        class GenerateState:
            def __init__(self, args):
                self.tokenizer = Tokenizer()

        async def generate(args, sample, sampling_params):
            sample.tokens = GenerateState(args).tokenizer.encode(sample.prompt, add_special_tokens=False)
            payload = {"input_ids": sample.tokens, "sampling_params": sampling_params, "return_logprob": True}
            output = await post(f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate", payload)
            items = output["meta_info"]["output_token_logprobs"]
            sample.append_response_tokens(args, tokens=[i[1] for i in items], log_probs=[i[0] for i in items],
                                          meta_info=output["meta_info"], text=output["text"])
            return sample

        async def generate_and_rm(args, sample, sampling_params, evaluation=False):
            custom = load_function(args.custom_generate_function_path) if args.custom_generate_function_path else generate
            extra = {"evaluation": evaluation} if "evaluation" in inspect.signature(custom).parameters else {}
            sample = await custom(args, sample, sampling_params, **extra)
            if not args.group_rm and sample.reward is None:
                sample.reward = await async_rm(args, sample)
            return sample

        async def rollout(args, samples, evaluation=False):
            params = {"temperature": args.rollout_temperature, "max_new_tokens": 64}
            samples = await asyncio.gather(*(generate_and_rm(args, s, dict(params), evaluation) for s in samples))
            if args.group_rm:
                for sample, reward in zip(samples, await batched_async_rm(args, samples), strict=True):
                    sample.reward = reward
            return samples
        """,
    "train_step.py": """
        import asyncio
        import json
        import sys
        from types import SimpleNamespace
        import yaml
        from slime.rollout.sglang_rollout import rollout
        from slime.utils.misc import load_function
        from slime.utils.types import Sample

        def main(job):
            args = SimpleNamespace(**job["args"])
            if args.custom_config_path:
                with open(args.custom_config_path) as file:
                    for key, value in (yaml.safe_load(file) or {}).items():
                        setattr(args, key, value)
            out = []
            for rollout_id in job["rollout_ids"]:
                samples = asyncio.run(rollout(args, [Sample(**fields) for fields in job["samples"]]))
                if args.custom_rollout_log_function_path:
                    load_function(args.custom_rollout_log_function_path)(rollout_id, args, samples, {}, 1.0)
                raw, rewards = load_function(args.custom_reward_post_process_path)(args, samples)
                out.append({
                    "rewards": rewards, "raw": raw, "loss_masks": [s.loss_mask for s in samples],
                    "teacher_log_probs": [s.teacher_log_probs.tolist() for s in samples],
                    "dtype": str(samples[0].teacher_log_probs.dtype), "reward": [s.reward for s in samples],
                    "left": sorted({k for s in samples for k in vars(s)} - set(Sample.__dataclass_fields__)),
                    "metadata": [s.metadata for s in samples], "tokens": [s.tokens for s in samples],
                })
            evaluated = []
            if job.get("evaluate"):
                evaluated = asyncio.run(rollout(args, [Sample(**fields) for fields in job["evaluate"]], evaluation=True))
            heavy = sorted({m.split(".")[0] for m in sys.modules} & {"ray", "sglang", "megatron"})
            from_slime = sorted(m for m in sys.modules if m.split(".")[0] == "slime")
            import ta_opd
            print(json.dumps({"rollouts": out, "evaluation": [s.reward for s in evaluated], "heavy": heavy,
                              "slime": from_slime, "ta_opd": ta_opd.__file__}))

        main(json.load(sys.stdin))
        """,
}


def load_cases() -> list[dict]:
    with gzip.open(CASES) as file:
        return json.load(file)


def plain_samples(case: dict) -> list[SimpleNamespace]:
    """The samples of a case as plain objects with the fields of slime's Sample (none called opd_weights)."""
    return [
        SimpleNamespace(
            tokens=list(s["tokens"]),
            response_length=s["response_length"],
            loss_mask=None if s["loss_mask"] is None else list(s["loss_mask"]),
            rollout_log_probs=list(s["rollout_log_probs"]),
            metadata={"student_top_logprobs": s["student_top_logprobs"]},
            index=s["index"],
            group_index=s["group_index"],
            status=SimpleNamespace(value=s["status"]),
        )
        for s in case["samples"]
    ]


def kept_rows(samples: list, masks: list | None = None) -> list[int]:
    """Row numbers (over the response tokens of the batch) that the loss masks keep."""
    masks = [s.loss_mask for s in samples] if masks is None else masks
    flat = np.concatenate([np.asarray(mask if mask is not None else [], int) for mask in masks])
    return np.flatnonzero(flat).tolist()


def make_stock(directory: Path) -> Path:
    """A stock-shaped slime package in `directory`."""
    for name, text in STOCK_FILES.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip())
    return directory


def run_stock(stock: Path, job: dict, *, ta_opd_at: Path = REPO) -> dict:
    """Run `train_step.py` of a stock package in a fresh process that sees it and ta_opd, nothing of this tree's slime."""
    environment = {**os.environ, "PYTHONPATH": f"{stock}{os.pathsep}{ta_opd_at}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(stock / "train_step.py")], input=json.dumps(job), capture_output=True, text=True,
        env=environment, cwd=stock, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


class Server:
    """An HTTP server on a free port of this machine, in a thread; `answer(payload)` gives the reply (or a status code)."""

    def __init__(self, answer):
        self.answer, self.requests = answer, []

    def __enter__(self) -> "Server":
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(30)
        self.url = f"http://127.0.0.1:{self.port}/generate"
        return self

    def __exit__(self, *_) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)

    def _run(self, ready: threading.Event) -> None:
        asyncio.run(self._serve(ready))

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/generate", self._handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.Response:
        payload = await request.json()
        self.requests.append(payload)
        reply = self.answer(payload)
        if isinstance(reply, int):
            return web.Response(status=reply, text="not now")
        return web.Response(text=json.dumps(reply), content_type="application/json")


def student_of(case: dict):
    """The student server of a case: answers a prompt with the recorded response."""
    by_prompt = {tuple(s["tokens"][: len(s["tokens"]) - s["response_length"]]): s for s in case["samples"]}

    def answer(payload: dict) -> dict:
        sample = by_prompt[tuple(payload["input_ids"])]
        response = sample["tokens"][len(payload["input_ids"]) :]
        meta_info = {
            "output_token_logprobs": [[p, t, None] for p, t in zip(sample["rollout_log_probs"], response, strict=True)],
            "finish_reason": {"type": "length" if sample["status"] == "truncated" else "stop"},
        }
        if payload.get("top_logprobs_num"):
            meta_info["output_top_logprobs"] = sample["student_top_logprobs"]
        return {"text": "x" * len(response), "meta_info": meta_info}

    return answer


def teacher_of(case: dict):
    """The teacher server of a case: scores the recorded tokens from `logprob_start_len` on."""
    by_tokens = {tuple(s["tokens"]): i for i, s in enumerate(case["samples"])}

    def answer(payload: dict) -> dict:
        i = by_tokens[tuple(payload["input_ids"])]
        sample, top = case["samples"][i], case["teacher_replies"][i]["meta_info"]["input_top_logprobs"]
        prompt = len(sample["tokens"]) - sample["response_length"]
        values = [None, *[-1.0] * (prompt - 1), *case["teacher_log_probs"][i]]
        start = payload["logprob_start_len"]
        meta_info = {"input_token_logprobs": [[None, sample["tokens"][start], None]]}
        meta_info["input_token_logprobs"] += [
            [v, t, None] for v, t in zip(values[start + 1 :], sample["tokens"][start + 1 :], strict=True)
        ]
        if payload.get("top_logprobs_num"):
            meta_info["input_top_logprobs"] = [None, *top[start + 1 :]]
        return {"text": "", "meta_info": meta_info}

    return answer
