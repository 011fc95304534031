"""One event loop in one background thread of this process: sessions and their connections live as long as the process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def service_loop() -> asyncio.AbstractEventLoop:
    global _loop
    with _lock:
        if _loop is None or _loop.is_closed():
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="services", daemon=True).start()
        return _loop


def run(coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
    """Runs `coroutine` on the service loop and waits for it; an interrupt of the caller cancels it."""
    future = asyncio.run_coroutine_threadsafe(coroutine, service_loop())
    try:
        return future.result(timeout)
    except BaseException:
        future.cancel()
        raise


def submit(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """Starts `coroutine` on the service loop; the caller goes on and asks the future later."""
    return asyncio.run_coroutine_threadsafe(coroutine, service_loop())
