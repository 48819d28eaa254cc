"""``python -m mstar_mega.launch``: torchrun, with its options, but quiet about a user's mistake.

torchrun answers every failure of a rank with a traceback of its own and exit code 1. Here a job that ended because of
something the user can mend (exit code 2, which the job has told in one line) or that was interrupted ends with that
code and says nothing more; every other failure is torchrun's to report.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

EXPECTED = (2, 130, 141)
"""Exit codes of ``mstar`` that need no explanation (``cli.py``)."""


class _Held(logging.Filter):
    """Keeps what torchrun logs about the end of ranks until it is known whether anybody needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep a record, and let nothing pass."""
        self.records.append(record)
        return False


def main(argv: Sequence[str] | None = None) -> int:
    """Start the ranks as torchrun does; returns the job's exit code. Raises as torchrun where a rank broke down."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logger = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    held = _Held()
    logger.addFilter(held)
    try:
        run(parse_args(sys.argv[1:] if argv is None else list(argv)))
        return 0
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        if code in EXPECTED:
            held.records.clear()
            return code
        raise
    finally:
        logger.removeFilter(held)
        for record in held.records:
            logger.handle(record)


if __name__ == "__main__":
    sys.exit(main())
