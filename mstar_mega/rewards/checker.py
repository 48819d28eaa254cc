"""Answer checking that cannot hang the job: algebra runs in a worker process that is killed at its time limit.

Plain comparison (:func:`mstar_mega.rewards.answers.plain_verdict`) decides nearly every answer in this process. Only
short expressions that it cannot decide reach math-verify, in a worker started at the first need.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from mstar_mega.rewards.answers import WRONG, How, Verdict, plain_verdict
from mstar_mega.rewards.equality import Algebra, Pair

__all__ = ["AnswerChecker", "Verdict"]

_PACKAGE = str(Path(__file__).parents[2])
_START_SECONDS = 120.0
_MEMO_SIZE = 4096
_KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "SYSTEMROOT")


class AnswerChecker:
    """Compare answers with gold answers; a context manager, and not to be shared between threads.

    ``timeout_seconds`` limits the worker's processor time for one comparison, so that a busy machine does not change a
    verdict; ``wall_seconds`` is the backstop for a worker that makes no progress (stopped, or swapped out). At either
    limit the worker is killed and the answer counts as wrong (``timeout``). A worker that dies otherwise is replaced
    and asked once more, then the answer counts as wrong (``error``).

    ``counts`` holds the number of verdicts by their ``how``.
    """

    def __init__(self, timeout_seconds: float = 2.0, wall_seconds: float = 60.0) -> None:
        if not (timeout_seconds > 0 and wall_seconds > 0):
            raise ValueError(f"timeout_seconds is {timeout_seconds}, wall_seconds {wall_seconds}; both must be above 0")
        self.timeout_seconds = timeout_seconds
        self.wall_seconds = wall_seconds
        self.counts: Counter[How] = Counter()
        self._worker: subprocess.Popen[bytes] | None = None
        self._memo: dict[Pair, Verdict] = {}

    def __enter__(self) -> AnswerChecker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def check(self, answer: str | None, gold: str, choices: Sequence[str] = ()) -> Verdict:
        """Verdict on one answer; None (no answer block) is wrong.

        Raises RuntimeError when the worker cannot be started at all (math-verify not installed).
        """
        found = WRONG if answer is None else plain_verdict(answer, gold, choices)
        verdict = self._all_equal(found) if isinstance(found, Algebra) else found
        self.counts[verdict.how] += 1
        return verdict

    def close(self) -> None:
        """Stop the worker, if there is one. The checker stays usable: the next need starts another."""
        if self._worker is None:
            return
        worker, self._worker = self._worker, None
        worker.kill()
        worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            assert pipe is not None
            pipe.close()

    def _all_equal(self, question: Algebra) -> Verdict:
        verdicts = (self._symbolic(pair) for pair in question.pairs)
        return next((verdict for verdict in verdicts if not verdict.correct), Verdict(True, "symbolic"))

    def _symbolic(self, pair: Pair) -> Verdict:
        known = self._memo.get(pair)
        if known is not None:
            return known
        outcome = self._ask(pair)
        if outcome == "error":  # perhaps killed from outside: the verdict must not depend on that
            outcome = self._ask(pair)
        verdict = outcome if isinstance(outcome, Verdict) else Verdict(False, outcome)
        if len(self._memo) >= _MEMO_SIZE:
            self._memo.clear()
        self._memo[pair] = verdict
        return verdict

    def _ask(self, pair: Pair) -> Verdict | How:
        """One comparison by the worker; after anything but a verdict the worker is gone."""
        worker = self._worker or self._start()
        request = json.dumps(asdict(pair) | {"seconds": self.timeout_seconds})
        assert worker.stdin is not None
        try:
            worker.stdin.write(request.encode() + b"\n")  # below the size that a pipe takes in one piece
        except OSError:
            self.close()
            return "error"
        reply, ended = _read_line(worker, self.wall_seconds)
        if reply is not None:
            return Verdict(True, "symbolic") if reply["equal"] else WRONG
        if ended:
            code = worker.wait()
            self.close()
            return "timeout" if code == -signal.SIGPROF else "error"
        self.close()
        return "timeout"

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
        environment |= {
            "PYTHONPATH": os.pathsep.join([*(os.path.abspath(entry) for entry in sys.path if entry), _PACKAGE]),
            "PYTHONSAFEPATH": "1",
            "PYTHONHASHSEED": "0",  # sympy orders some of its work by hash
            "OMP_NUM_THREADS": "1",
        }
        self._worker = subprocess.Popen(
            [sys.executable, "-c", "from mstar_mega.rewards.algebra import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,  # nothing left to flush, and to fail, when the pipe of a dead worker is closed
            env=environment,
            cwd=os.path.sep,  # Python looks in the working directory first, where anybody's files may lie
            start_new_session=True,  # an interrupt from the terminal is for the job, which then closes the pipe
        )
        reply, _ = _read_line(self._worker, _START_SECONDS)
        if reply is None or not reply["ready"]:
            self.close()
            reason = reply["reason"] if reply else f"no sign of life within {_START_SECONDS:.0f} s"
            raise RuntimeError(f"the answer checker's worker did not start: {reason}; is math-verify installed?")
        return self._worker


def _read_line(worker: subprocess.Popen[bytes], seconds: float) -> tuple[dict[str, Any] | None, bool]:
    """(reply, False), or (None, True) when the worker has ended, or (None, False) when the time is over."""
    assert worker.stdout is not None
    descriptor = worker.stdout.fileno()
    poller = select.poll()
    poller.register(descriptor, select.POLLIN | select.POLLHUP)
    deadline = time.monotonic() + seconds
    line = b""
    while not line.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not poller.poll(left * 1000):
            return None, False
        piece = os.read(descriptor, 65536)
        if not piece:
            return None, True
        line += piece
    reply: dict[str, Any] = json.loads(line)
    return reply, False
