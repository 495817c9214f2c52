#!/usr/bin/env bash
# Set up .venv and run the whole test suite. Arguments go to pytest: `bash tests/run.sh -m "not slow"`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup_env.sh --dev .venv
# Two processes on two cores: threads that spin while they wait would slow each other down.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
exec .venv/bin/python -m pytest "$@" </dev/null
