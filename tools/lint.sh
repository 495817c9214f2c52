#!/usr/bin/env bash
# Every check that does not run the code; the same for CI, for pre-commit and for you. `PYTHON` names an interpreter
# with the dev extra; the default is .venv's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-.venv/bin/python}"
check() {
    echo "== $*"
    "$python" -m "$@"
}
check ruff format --check --quiet .
check ruff check --quiet .
check mypy
echo "== lint-imports"
"$python" -c 'import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())'
echo "== tools/check_sizes.py"
"$python" tools/check_sizes.py
