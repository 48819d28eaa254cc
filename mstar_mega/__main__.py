"""``python -m mstar_mega``: the ``mstar`` command."""

from __future__ import annotations

import sys

from mstar_mega.cli import main

if __name__ == "__main__":
    sys.exit(main())
