"""What strangers wrote, chat templates, vocabularies and regexes, run in a child process of bounded time and memory.

The child (`lfjax.bounded_child`) is a new Python that holds nothing of this process: no fork, so that JAX's threads do
not matter, and no code in it between fork and exec. Whatever happens in it, a request ends in an answer or a `Breach`.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from typing import Any

PROGRAM = pathlib.Path(__file__).with_name("bounded_child.py")
MEMORY, SECONDS = 1 << 30, 2.0  # bytes of a child's address space, and processor time for one request


class Breach(Exception):
    """A request that asked for more than it may have, or ended its process; the text goes on after what asked."""


class Child:
    """A child process, started at the first request, and again after one that ended it; `ask` from any thread."""

    def __init__(self, *, memory: int = MEMORY):
        self._memory = memory
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that started it: after a fork its pipes belong to the other one
        atexit.register(self.close)

    def ask(self, request: dict[str, Any], *, seconds: float = SECONDS) -> dict[str, Any]:
        """The child's answer.

        Args:
          seconds: of processor time, for this request.
        Raises:
          Breach: no answer, or the request failed there.
        """
        line = json.dumps({"seconds": seconds, **request}, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(line)
                process.stdin.flush()
                found = process.stdout.readline()
            except BrokenPipeError:
                found = b""
            if not found.endswith(b"\n"):
                raise Breach(self._death(process, seconds))
        answer = json.loads(found.decode("utf-8", "surrogatepass"))
        if failure := answer.get("failure"):
            raise Breach(f"asks for more than {self._memory >> 20} MB" if failure == "memory" else f"fails: {failure}")
        return answer

    def close(self) -> None:
        """Ends the child; another request starts a new one."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in filter(None, (process.stdin, process.stdout)):
            with contextlib.suppress(OSError):  # what it has not read
                pipe.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self.close()
            self._owner = os.getpid()
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(PROGRAM), str(self._memory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"},
            )
        return self._process

    def _death(self, process: subprocess.Popen[bytes], seconds: float) -> str:
        code = process.wait()
        self.close()
        if code == -signal.SIGPROF:
            return f"takes more than {seconds:g} s"
        return f"ends its process ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"
