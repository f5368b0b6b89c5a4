"""Workers in parallel: each thread owns a process. A process that dies is replaced, and its request counts as failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from luthier.run.forecast import available_memory

ROOM = 0.8  # share of the free memory that parallel runs may use
END = 60.0  # seconds that a worker gets to save its state and end
LOOK = 0.5  # seconds between two calls of `stop`


class Workers:
    """Processes that carry out requests, up to `count` at a time. With 0, this process carries them out one by one."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._threads = ThreadPoolExecutor(max(1, count))
        self._mine = threading.local()
        self._all: list[subprocess.Popen[str]] = []
        self._pending: dict[Future[dict[str, Any]], Any] = {}
        self._stopping = False

    def submit(self, tag: Any, request: dict[str, Any]) -> None:
        """Hand in a request. `next` returns its answer with this tag."""
        if self.count:
            self._pending[self._threads.submit(self._ask, request)] = tag
            return
        from luthier.run.worker import carried_out

        done: Future[dict[str, Any]] = Future()
        done.set_result(carried_out(request))
        self._pending[done] = tag

    @property
    def busy(self) -> int:
        """The number of requests whose answers were not taken yet."""
        return len(self._pending)

    def next(self, stop: Callable[[], bool] = lambda: False) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Wait for at least one answer, and yield (tag, answer) of all that are there.

        stop  called while nothing is there; if it returns True, KeyboardInterrupt is raised
        """
        done: set[Future[dict[str, Any]]] = set()
        while not done:
            done, _ = wait(self._pending, LOOK, return_when=FIRST_COMPLETED)
            if not done and stop():
                raise KeyboardInterrupt
        for future in done:
            yield self._pending.pop(future), future.result()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._stopping:
            return {"state": "stopped"}
        process = self._process()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except (BrokenPipeError, ValueError):
            line = ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = process.wait()
        self._mine.process = None
        if self._stopping:
            return {"state": "stopped"}
        reason = f"its process was ended by signal {-code}" if code < 0 else f"its process ended with code {code}"
        return {"state": "failed", "error": f"{reason}; perhaps out of memory" if code == -9 else reason}

    def _process(self) -> subprocess.Popen[str]:
        found: subprocess.Popen[str] | None = getattr(self._mine, "process", None)
        if found is None or found.poll() is not None:
            command = [sys.executable, "-m", "luthier.run.worker"]
            found = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._mine.process = found
            self._all.append(found)
        return found

    def stop(self) -> None:
        """Ask all workers to save and end."""
        self._stopping = True
        for process in self._all:
            if process.poll() is None:
                process.terminate()
        self._end()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        """Send no more requests: the processes end by themselves."""
        self._threads.shutdown(wait=True)
        for process in self._all:
            if process.stdin is not None:
                process.stdin.close()
        self._end()

    def _end(self) -> None:
        """Wait for all processes, and kill those that do not end."""
        for process in self._all:
            try:
                process.wait(END)
            except subprocess.TimeoutExpired:
                process.kill()


def side_by_side(peaks: Sequence[float], most: int) -> int:
    """The number of runs at the same time that cores and memory allow, from 1 to `most`.

    peaks  peak memory of earlier runs in bytes; if there are none, runs go one at a time
    """
    fitting = int(ROOM * available_memory() / max(peaks)) if peaks else 1
    return max(1, min(os.cpu_count() or 1, fitting, most))


@contextmanager
def workers(count: int) -> Iterator[Workers]:
    """Workers for a block of code. If the block raises an error, they are asked to save and end."""
    pool = Workers(count)
    try:
        yield pool
    except BaseException:
        pool.stop()
        raise
    pool.close()
