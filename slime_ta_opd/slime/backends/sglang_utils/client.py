"""The one client of SGLang servers: pooled, bounded, balanced over replicas; a failed request goes to another replica.

Replies become arrays at once (wire.py) and the raw bytes are dropped; large ones are parsed in a thread, off the event loop.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import aiohttp
import numpy as np
import orjson

from slime.backends.sglang_utils import loop, wire
from slime.backends.sglang_utils.controls import Controls
from slime.backends.sglang_utils.replicas import Replica, Replicas
from slime.backends.sglang_utils.secret import Secret
from ta_opd.errors import ConfigError, DataError, ServiceError

logger = logging.getLogger(__name__)
T = TypeVar("T")
_PARSE_IN_THREAD = 64 * 1024
_RETRIED_STATUS = (408, 429)


class StaleWeights(ServiceError):
    """A reply came from other weights than the ones in force."""


def base_url(url: str) -> str:
    """http://host:port of a server given with or without scheme and /generate."""
    url = url.strip().rstrip("/")
    url = url.removesuffix("/generate")
    return url if "://" in url else f"http://{url}"


class SGLangClient(Controls):
    """Talks to the replicas of one model.

    urls: their addresses. max_concurrency: requests in flight for one replica. timeout: seconds one request may take.
    retries: times a request is sent again after a bad answer. wait_timeout: seconds to go on trying while no replica can be
    reached at all. vocab_size: ids at or beyond it are refused here, since one such id ends a server. weight_version: when
    set, samples from other weights are refused. name: the word for this model in messages. router: address of a router in front
    of `urls`; requests go through it, and to the servers themselves where it fails. Controls always go to the servers.
    """

    def __init__(
        self,
        urls: Sequence[str] | str,
        *,
        max_concurrency: int = 256,
        timeout: float = 600.0,
        retries: int = 5,
        api_key: str | None = None,
        wait_timeout: float = 30.0,
        vocab_size: int | None = None,
        name: str = "server",
        router: str | None = None,
    ):
        urls = [urls] if isinstance(urls, str) else list(urls)
        if not urls:
            raise ConfigError(f"{name}: expected at least one server URL, got none")
        self.urls = [base_url(u) for u in urls]
        self.router = base_url(router) if router else None
        self.replicas = Replicas([*([self.router] if self.router else []), *self.urls])
        self.max_concurrency, self.timeout, self.retries = max_concurrency, timeout, retries
        self.api_key = Secret(api_key) if api_key else None
        self.wait_timeout, self.vocab_size, self.name = wait_timeout, vocab_size, name
        self.gone: str | None = None  # why nobody will answer any more; set by whoever watches the servers
        self._weight_version: str | None = None
        self._session: aiohttp.ClientSession | None = None
        self._session_loop: asyncio.AbstractEventLoop | None = None
        self._gate: asyncio.Semaphore | None = None
        self._announced = 0.0
        self._aborts = 0  # calls of `abort_all`

    @classmethod
    def for_run(cls, args, urls: Sequence[str], role: str, name: str | None = None, router: str | None = None) -> SGLangClient:
        """The client of a run's student or teacher, set up from its flags."""
        student = role == "student"
        return cls(
            urls,
            max_concurrency=args.sglang_server_concurrency if student else args.teacher_concurrency,
            timeout=args.request_timeout,
            retries=args.request_retries,
            api_key=args.sglang_api_key,
            wait_timeout=20.0 if student else args.teacher_timeout,
            vocab_size=(getattr(args, "student_config", None) or {}).get("vocab_size"),
            name=name or role,
            router=router,
        )

    @property
    def weight_version(self) -> str | None:
        """The version that samples must come from; None accepts any. Setting it gives every replica a new chance."""
        return self._weight_version

    @weight_version.setter
    def weight_version(self, version: str | None) -> None:
        self._weight_version = version
        self.replicas.forget_prompts()
        for replica in self.replicas.all:
            replica.stale = False

    def move(self, old: str, new: str) -> None:
        """The replica at `old` has been started again at `new`: requests that wait for it go there."""
        self.urls = [new if url == old else url for url in self.urls]
        for replica in self.replicas.all:
            if replica.url == old:
                replica.url = new

    def back(self, url: str) -> None:
        """The replica at `url` answers again: no need to wait until it would be tried."""
        for replica in self.replicas.all:
            if replica.url == url:
                replica.answered()

    # ------------------------------------------------------------------ model calls

    async def generate(
        self,
        input_ids: Sequence[int],
        sampling_params: dict[str, Any],
        top_k: int = 0,
        *,
        log_probs: bool = True,
        prefer: str | None = None,
        key: int | None = None,
    ) -> wire.GenerateReply:
        """Samples one response. finish_reason "abort" means that the server was told to stop and returned what it had.

        key: the same for requests of one prompt, which then go to one replica where the load allows.

        DataError for ids outside the vocabulary (before sending) or a request the server refuses; ServiceError when no
        replica answers properly.
        """
        self._check_ids(input_ids)
        payload = wire.generate_payload(input_ids, sampling_params, top_k, log_probs)
        parse = functools.partial(self._parse_generate, top_k=top_k, log_probs=log_probs)
        return await self._request("/generate", payload, parse, prefer=prefer, key=key, withdrawn=functools.partial(wire.not_sampled, top_k))

    async def score(
        self,
        input_ids: Sequence[int],
        response_length: int,
        top_k: int = 0,
        token_ids: Sequence[int] | None = None,
        *,
        whole: bool = False,
        prefer: str | None = None,
    ) -> wire.ScoreReply:
        """Log-probs of the last `response_length` ids at temperature 1, the top-K there, and those of `token_ids`."""
        self._check_ids(input_ids)
        payload = wire.score_payload(input_ids, response_length, top_k, token_ids, whole)
        parse = functools.partial(wire.parse_score, response_length=response_length, top_k=top_k, token_ids=token_ids)
        return await self._request("/generate", payload, parse, prefer=prefer)

    async def abort_all(self) -> None:
        """Ends every running request, and every `generate` that waits here for its turn or for another replica: each returns what it has,
        with finish_reason "abort"."""
        self._aborts += 1
        await super().abort_all()

    async def score_windows(
        self, input_ids: Sequence[int], windows: Sequence[tuple[int, int, Sequence[int]]], *, prefer: str | None = None
    ) -> list[np.ndarray]:
        """For each (begin, end, ids) over positions of `input_ids`: float32 [end - begin, len(ids)] log-probs at `ids`."""
        self._check_ids(input_ids)
        payload = wire.windows_payload(input_ids, windows)
        return await self._request("/generate", payload, functools.partial(wire.parse_windows, windows=windows), prefer=prefer)

    def run(self, coroutine):
        """Runs a coroutine of this client from plain code and returns its result."""
        return loop.run(coroutine)

    # ------------------------------------------------------------------ transport

    async def call(self, url: str, path: str, body: dict | None = None, *, timeout: float | None = None) -> Any:
        """One request to one replica, not repeated: the JSON of the reply (None when empty). Body None: GET."""
        session = self._ensure_session()
        limit = aiohttp.ClientTimeout(total=timeout or self.timeout)
        method = "GET" if body is None else "POST"
        data = None if body is None else orjson.dumps(body)
        try:
            async with session.request(method, url + path, data=data, timeout=limit) as reply:
                raw = await reply.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ServiceError(f"{self.name} at {url}{path}: {_describe(error)}") from error
        if reply.status >= 400:
            raise ServiceError(f"{self.name} at {url}{path}: HTTP {reply.status}: {_message(raw)}")
        try:
            return orjson.loads(raw) if raw else None
        except orjson.JSONDecodeError:
            return raw.decode("utf-8", "replace")

    async def _request(
        self, path: str, payload: dict, parse: Callable[[bytes], T], prefer: str | None = None, key: int | None = None,
        withdrawn: Callable[[], T] | None = None,
    ) -> T:  # fmt: skip
        """Sends until a proper reply is parsed. See the class for what bounds it. withdrawn: the answer of a request that is not sent
        (again) because of `abort_all`."""
        aborts = self._aborts
        async with self._ensure_gate():
            away, bad_answers, last, problem = None, 0, None, "no replica is reachable"
            while True:
                if withdrawn is not None and self._aborts != aborts:
                    return withdrawn()
                replica = self.replicas.pick(avoid=last, prefer=prefer or self.router, key=key)
                if replica is None:
                    if all(r.stale for r in self.replicas.all):
                        raise StaleWeights(f"{self.name}: every replica serves former weights; sync them first ({problem})")
                    if self.gone:
                        raise ServiceError(f"{self.name}: {self.gone}; last problem: {problem}")
                    away = away or time.monotonic()
                    waited = time.monotonic() - away
                    if waited > self.wait_timeout:
                        raise ServiceError(
                            f"{self.name} at {', '.join(self.urls)}: no proper answer for {waited:.0f} s; last problem: {problem}"
                        )
                    self._announce(problem)
                    await asyncio.sleep(min(self.replicas.next_try(), 2.0))
                    continue
                try:
                    result = await self._send(replica, path, payload, parse)
                except (DataError, ConfigError) as error:
                    if not isinstance(error, _BadAnswer):
                        raise
                    problem, bad_answers, away = f"{replica.url}: {error}", bad_answers + 1, None  # it was reached
                    if bad_answers > self.retries:
                        raise DataError(f"{self.name}: no proper answer in {bad_answers} tries; last problem: {problem}") from error
                except StaleWeights as error:
                    problem, replica.stale = str(error), True
                except (aiohttp.ClientError, TimeoutError, OSError) as error:
                    problem = f"{replica.url}: {_describe(error)}"
                else:
                    replica.answered()
                    return result
                logger.info("%s: %s; sending again", self.name, problem)
                replica.failed()
                last = replica

    async def _send(self, replica: Replica, path: str, payload: dict, parse: Callable[[bytes], T]) -> T:
        rid = uuid.uuid4().hex
        single = not payload["input_ids"] or not isinstance(payload["input_ids"][0], list)
        body = orjson.dumps({**payload, "rid": rid} if single else payload, option=orjson.OPT_SERIALIZE_NUMPY)
        replica.in_flight += 1
        try:
            try:
                async with self._ensure_session().post(replica.url + path, data=body) as reply:
                    raw = await reply.read()
            except (TimeoutError, asyncio.CancelledError):
                if single:  # nobody waits for it any more: free the server's slot
                    for url in self.urls if replica.url == self.router else [replica.url]:
                        self._abort_later(url, rid)
                raise
        finally:
            replica.in_flight -= 1
        if reply.status in _RETRIED_STATUS or reply.status >= 500:
            raise _BadAnswer(f"HTTP {reply.status}: {_message(raw)}")
        if reply.status in (401, 403):
            raise ConfigError(f"{self.name} at {replica.url} refuses the API key (HTTP {reply.status}); see --sglang-api-key")
        if reply.status >= 400:
            raise DataError(f"{self.name} at {replica.url} refuses the request: {_message(raw)}")
        try:
            if len(raw) > _PARSE_IN_THREAD:
                result, parse_seconds = await asyncio.to_thread(_timed, parse, raw)
            else:
                result, parse_seconds = _timed(parse, raw)
        except DataError as error:
            raise _BadAnswer(str(error)) from error
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise _BadAnswer(f"malformed reply ({type(error).__name__}: {error})") from error
        if hasattr(result, "url"):
            result.url, result.parse_seconds = replica.url, parse_seconds
        if self.weight_version is not None and isinstance(result, wire.GenerateReply):
            if result.weight_version != self.weight_version:
                raise StaleWeights(
                    f"{self.name} at {replica.url} sampled with weight version {result.weight_version!r}, "
                    f"expected {self.weight_version!r}"
                )
        return result

    def _parse_generate(self, raw: bytes, top_k: int, log_probs: bool) -> wire.GenerateReply:
        reply = wire.parse_generate(raw, top_k, log_probs)
        if reply.output_ids:
            low, high = min(reply.output_ids), max(reply.output_ids)
            if low < 0 or (self.vocab_size is not None and high >= self.vocab_size):
                raise DataError(f"generate: expected ids in [0, {self.vocab_size}), got {low if low < 0 else high}")
        return reply

    def _check_ids(self, input_ids: Sequence[int]) -> None:
        if not len(input_ids):
            raise DataError(f"{self.name}: expected at least one input id, got none")
        ids = np.asarray(input_ids)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (self.vocab_size is not None and high >= self.vocab_size):
            bad = low if low < 0 else high
            raise DataError(f"{self.name}: token id {bad} is outside the vocabulary [0, {self.vocab_size}); nothing was sent")

    def _announce(self, problem: str) -> None:
        now = time.monotonic()
        if now - self._announced > 30:
            self._announced = now
            logger.warning(
                "%s at %s is away (%s); trying again for up to %.0f s", self.name, ", ".join(self.urls), problem, self.wait_timeout
            )

    def _abort_later(self, url: str, rid: str) -> None:
        async def abort():
            try:
                await self.call(url, "/abort_request", {"rid": rid}, timeout=5)
            except ServiceError:
                pass

        task = asyncio.get_running_loop().create_task(abort())
        _background.add(task)
        task.add_done_callback(_background.discard)

    def _ensure_session(self) -> aiohttp.ClientSession:
        here = asyncio.get_running_loop()
        if self._session is None or self._session.closed or self._session_loop is not here:
            headers = {"Content-Type": "application/json"}
            if self.api_key:
                headers["Authorization"] = f"Bearer {str(self.api_key)}"
            # The server closes idle connections after 5 s; closing first avoids sending into a closing one.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4)
            self._session = aiohttp.ClientSession(
                connector=connector, headers=headers, timeout=aiohttp.ClientTimeout(total=self.timeout), read_bufsize=2**20
            )
            self._session_loop, self._gate = here, None
        return self._session

    def _ensure_gate(self) -> asyncio.Semaphore:
        self._ensure_session()
        if self._gate is None:
            self._gate = asyncio.Semaphore(max(1, self.max_concurrency) * len(self.urls))
        return self._gate

    async def aclose(self) -> None:
        if self._session is not None and not self._session.closed:
            await self._session.close()
        self._session = None

    def close(self) -> None:
        """Closes the connections; from plain code."""
        if self._session is not None and self._session_loop is loop.service_loop():
            loop.run(self.aclose())


class _BadAnswer(DataError):
    """A reply that is worth asking another replica for."""


_background: set[asyncio.Task] = set()


def _timed(parse: Callable[[bytes], T], raw: bytes) -> tuple[T, float]:
    """The parsed reply and the processor seconds it took."""
    began = time.thread_time()
    return parse(raw), time.thread_time() - began


def _describe(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time (--request-timeout)"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _message(raw: bytes) -> str:
    try:
        reply = orjson.loads(raw)
        inner = reply.get("error", reply)
        return str(inner.get("message", inner) if isinstance(inner, dict) else inner)[:500]
    except (orjson.JSONDecodeError, AttributeError):
        return raw[:300].decode("utf-8", "replace")
