''':'
# The whole MSTaR job. This file is valid in bash and in Python, as torchrun runs its target with Python:
#
#   bash examples/pretrain_mstar.sh [--config FILE ...] [--dotted.name VALUE ...]
#   torchrun --nproc-per-node 2 examples/pretrain_mstar.sh [the same arguments]
#
# Without --config it takes configs/digits.yaml beside it. The first line is a no-op for bash and opens a string for
# Python; the string ends after exec, where bash no longer reads. So no backslash and no triple quote in between.
#
# Environment (bash only): NPROC, processes on this node (all GPUs, or else 2 where there are 2 cores); TORCHRUN, a
# torchrun to use in place of mstar_mega.launch. Both take options from PET_* too: PET_NNODES, PET_NODE_RANK,
# PET_MASTER_ADDR and PET_MASTER_PORT make it one node of many.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
torchrun=${TORCHRUN:-}
if [ -z "$torchrun" ]; then
    # A stray torchrun on PATH must not win over the environment that `make setup` made, an activated one must.
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$here/../.venv/bin/torchrun" ]; then
        torchrun=$here/../.venv/bin/torchrun
    elif command -v torchrun > /dev/null; then
        torchrun=torchrun
    elif [ -x "$here/../.venv/bin/torchrun" ]; then
        torchrun=$here/../.venv/bin/torchrun
    else
        echo "pretrain_mstar.sh: no torchrun on PATH or in .venv: run 'make setup' first" >&2
        exit 2
    fi
fi
options=()
if [ -z "${PET_NPROC_PER_NODE:-}" ]; then
    if [ -z "${NPROC:-}" ]; then
        if nvidia-smi -L 2> /dev/null | grep -q GPU; then
            NPROC=gpu
        else
            NPROC=$(getconf _NPROCESSORS_ONLN)
            NPROC=$((NPROC < 2 ? NPROC : 2))
        fi
    fi
    options+=(--nproc-per-node "$NPROC")
fi
# On one node a free port is chosen, so that two jobs can share the machine.
if [ -z "${PET_NNODES:-}${PET_RDZV_ENDPOINT:-}${PET_RDZV_BACKEND:-}${PET_MASTER_ADDR:-}" ]; then
    options+=(--standalone)
fi
# Several processes share the CPU: one thread each, unless told otherwise. A single process may use all cores.
if [ "${PET_NPROC_PER_NODE:-${NPROC:-}}" != 1 ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    export MKL_NUM_THREADS=${MKL_NUM_THREADS:-$OMP_NUM_THREADS}
fi
# The package's own launcher is torchrun that passes signals on and ends with the job's exit code (75: saved, to be
# continued); it lies beside its Python.
if [ -z "${TORCHRUN:-}" ]; then
    python=$(dirname "$(command -v "$torchrun")")/python
    if [ -x "$python" ] && "$python" -c "import mstar_mega" 2> /dev/null; then
        exec "$python" -m mstar_mega.launch ${options[@]+"${options[@]}"} "$here/pretrain_mstar.sh" "$@"
    fi
fi
exec "$torchrun" ${options[@]+"${options[@]}"} "$here/pretrain_mstar.sh" "$@"
'''

import sys
from pathlib import Path

from mstar_mega.cli import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not any(argument.partition("=")[0] == "--config" for argument in arguments):
        arguments = ["--config", str(Path(__file__).with_name("configs") / "digits.yaml"), *arguments]
    sys.exit(main(["evolve", *arguments]))
