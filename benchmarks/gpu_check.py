"""Put what ``make gpu-check`` found into one file to keep: ``benchmarks/results/gpu_check.json``.

.venv/bin/python benchmarks/gpu_check.py TESTS.xml KERNELS.json SUMMARY.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from xml.etree import ElementTree

from environment import environment, write_result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path, help="pytest's --junitxml file")
    parser.add_argument("kernels", type=Path, help="the kernel benchmark's result")
    parser.add_argument("summary", type=Path, help="summary.json of the bfloat16 run")
    parser.add_argument("--out", default=None, help="directory of the result (default: benchmarks/results)")
    options = parser.parse_args()
    suite = next(ElementTree.parse(options.tests).getroot().iter("testsuite"))
    result = {
        **environment(),
        "tests": {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")},
        "bfloat16_run": json.loads(options.summary.read_text()),
        "kernels": json.loads(options.kernels.read_text()),
    }
    print(f"written: {write_result('gpu_check', result, options.out)}")


if __name__ == "__main__":
    main()
