"""A network peer that answers like SGLang's /generate, and misbehaves when told to: for the faults a real server will not show."""

import asyncio
import base64
import threading

import numpy as np
import orjson
from aiohttp import web

VOCAB = 50


def logprob(position: int, token: int) -> float:
    """The fake model's log-prob of `token` at `position` of the sequence; distinct everywhere."""
    return -0.01 - ((position * 31 + token * 17) % 97) / 10 - token * 1e-4


def row(position: int, k: int) -> list[tuple[float, int]]:
    return sorted(((logprob(position, t), t) for t in range(VOCAB)), reverse=True)[:k]


class FakeSGLang:
    """Serves in a thread of its own. `faults`: what happens to the next requests, one word each ("ok" when empty):

    500, 429, cut (half of the JSON), html, missing (no log-probs), null, abort, slow, drop (connection closed), 400, 401.
    """

    def __init__(self, *, flat=True, version="1", api_key=None, context=None):
        self.faults: list[str] = []
        self.requests: list[dict] = []
        self.aborted: list[str] = []
        self.connections: set[int] = set()  # ports of those who asked
        self.flat, self.version, self.api_key, self.context = flat, version, api_key, context
        self.in_flight = self.most_in_flight = 0
        self.delay, self._closing = 0.0, False
        self.responses_of = lambda ids, n: [(sum(ids) + i) % VOCAB for i in range(n)]
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        self._started.wait(10)

    def _serve(self):
        asyncio.set_event_loop(self._loop)
        app = web.Application(client_max_size=2**28)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_get("/health", self._health)
        self.runner = web.AppRunner(app)
        self._loop.run_until_complete(self.runner.setup())
        self.site = web.TCPSite(self.runner, "127.0.0.1", 0)
        self._loop.run_until_complete(self.site.start())
        self.port = self.runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._started.set()
        self._loop.run_forever()

    def stop(self):
        self._closing = True
        if self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self._loop).result(10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()

    async def _abort(self, request):
        self.aborted.append((await request.json()).get("rid"))
        return web.Response()

    async def _health(self, request):
        return web.Response()

    async def _model_info(self, request):
        return web.json_response({"model_path": "fake", "weight_version": self.version})

    async def _server_info(self, request):
        return web.json_response({"context_length": self.context or 128})

    async def _generate(self, request):
        body = await request.json()
        self.requests.append(body)
        self.connections.add(request.transport.get_extra_info("peername")[1])
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._answer(request, body, self.faults.pop(0) if self.faults else "ok")
        finally:
            self.in_flight -= 1

    async def _answer(self, request, body, fault):
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": "unauthorized"}, status=401)
        if self.delay:
            await asyncio.sleep(self.delay)
        asked = 0 if isinstance(body["input_ids"][0], list) else len(body["input_ids"]) + body["sampling_params"]["max_new_tokens"]
        if self.context and asked >= self.context:  # as SGLang: a sequence is shorter than the context
            return web.json_response({"error": {"message": f"{asked} tokens do not fit into {self.context}"}}, status=400)
        if fault == "slow":
            for _ in range(300):
                if not self._closing:
                    await asyncio.sleep(0.1)
        if fault == "drop":
            request.transport.close()
            return web.Response()
        if fault.isdigit():
            return web.json_response({"error": {"message": f"told to fail with {fault}"}}, status=int(fault))
        if fault == "html":
            return web.Response(body=b"<html>busy</html>")
        reply = self.reply(body)
        if fault == "missing":
            reply["meta_info"].pop("input_token_logprobs", None)
            reply["meta_info"].pop("output_token_logprobs", None)
        if fault == "null":
            for name in ("input_token_logprobs", "output_token_logprobs"):
                if reply["meta_info"].get(name):
                    reply["meta_info"][name][-1][0] = None
        if fault == "abort":
            reply["meta_info"]["finish_reason"] = {"type": "abort"}
            for value in (reply["output_ids"], reply["meta_info"]["output_token_logprobs"], reply["meta_info"].get("output_top_logprobs", [])):
                del value[2:]
        raw = orjson.dumps(reply)
        return web.Response(body=raw[: len(raw) // 2] if fault == "cut" else raw, content_type="application/json")

    def reply(self, body):
        if isinstance(body["input_ids"][0], list):
            names = ("input_ids", "logprob_start_len", "token_ids_logprob")
            return [self.reply({**body, **{n: body[n][i] for n in names}}) for i in range(len(body["input_ids"]))]
        ids, params, k = body["input_ids"], body["sampling_params"], body.get("top_logprobs_num", 0)
        out = self.responses_of(ids, params["max_new_tokens"])
        meta = {"finish_reason": {"type": "length"}, "weight_version": self.version}
        start = body.get("logprob_start_len", -1)
        if start >= 0:
            span = range(start, len(ids))
            meta["input_token_logprobs"] = [[None if p == start else logprob(p, ids[p]), ids[p], None] for p in span]
            rows = [None if p == start else [[lp, t, None] for lp, t in row(p, k)] for p in span]
            if k and self.flat and body.get("return_flat_raw_top_logprobs_b64"):
                values = np.array([[e[0] for e in r] for r in rows[1:]], np.float32).reshape(-1, k)
                tokens = np.array([[e[1] for e in r] for r in rows[1:]], np.int32).reshape(-1, k)
                meta |= {
                    "input_top_logprobs_val_flat_b64": base64.b64encode(values.tobytes()).decode(),
                    "input_top_logprobs_idx_flat_b64": base64.b64encode(tokens.tobytes()).decode(),
                    "input_top_logprobs_shape": list(values.shape),
                    "input_top_logprobs_null_prefix": 1,
                }
            elif k:
                meta["input_top_logprobs"] = rows
            if body.get("token_ids_logprob"):
                asked = body["token_ids_logprob"]
                meta["input_token_ids_logprobs"] = [None if p == start else [[logprob(p, t), t, None] for t in asked] for p in span]
        meta["output_token_logprobs"] = [[logprob(len(ids) + i, t), t, None] for i, t in enumerate(out)]
        if k:
            meta["output_top_logprobs"] = [[[lp, t, None] for lp, t in row(len(ids) + i, k)] for i in range(len(out))]
        return {"output_ids": out, "meta_info": meta}
