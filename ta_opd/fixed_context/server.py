"""A small client of SGLang's /generate for the diagnostic: standard library only, a thread pool, retries.

Training has its own asynchronous client; this one is for a machine that has nothing but a running server's address.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from ta_opd.errors import DataError, ServiceError
from ta_opd.token_bank.jsonio import dumps, loads

_RETRIED = (408, 429, 500, 502, 503, 504)


class GenerateClient:
    """Requests to one server. url: its base address or that of /generate. Raises ServiceError when it does not answer, DataError when it
    answers something else."""

    def __init__(self, url: str, *, timeout: float = 600.0, retries: int = 4, concurrency: int = 16, api_key: str | None = None):
        base = url.rstrip("/")
        self.base = base.removesuffix("/generate")
        self.timeout, self.retries, self.concurrency = timeout, retries, concurrency
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})

    def generate(self, payload: dict) -> dict:
        """The parsed reply of one request; it has a `meta_info`."""
        reply = self._post("/generate", payload)
        if not isinstance(reply, dict) or not isinstance(reply.get("meta_info"), dict):
            raise DataError(f"{self.base}/generate: expected a reply with meta_info, got {str(reply)[:200]!r}")
        return reply

    def model_path(self) -> str:
        """What the server says it serves."""
        request = urllib.request.Request(f"{self.base}/get_model_info", headers=self.headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return str(json.loads(response.read()).get("model_path"))
        except (OSError, ValueError) as error:
            raise ServiceError(f"{self.base}: no model information ({error}); is this the address of an SGLang server?") from error

    def map(self, function: Callable, items: Iterable) -> Iterator:
        """function(item) for every item, `concurrency` at a time, results in order."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            yield from pool.map(function, items)

    def _post(self, path: str, payload: dict):
        body, problem = dumps(payload), ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(0.5 * 2 ** (attempt - 1), 20.0))
            try:
                request = urllib.request.Request(self.base + path, data=body, headers=self.headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return loads(response.read())
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {error.read()[:300].decode(errors='replace')}"
                if error.code not in _RETRIED:
                    break
            except (OSError, TimeoutError) as error:
                problem = f"{type(error).__name__}: {error}"
            except ValueError as error:
                raise DataError(f"{self.base}{path}: the reply is not JSON ({error})") from error
        raise ServiceError(f"{self.base}{path}: no answer after {attempt + 1} requests; the last said: {problem}")
