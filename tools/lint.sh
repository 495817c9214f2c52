#!/usr/bin/env bash
# Every check that does not run the code, all of them even if one fails; the same for CI, for pre-commit and for you.
# PYTHON names an interpreter with the dev extra; the default is .venv's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-.venv/bin/python}"
failed=()
check() {
    local name="$1"
    shift
    echo "== $name"
    "$python" "$@" || failed+=("$name")
}
check "ruff format" -m ruff format --check --quiet .
check "ruff check" -m ruff check --quiet --output-format=concise .
check "mypy" -m mypy
check "lint-imports" -c 'import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())'
check "sizes" tools/check_sizes.py
if [ "${#failed[@]}" -gt 0 ]; then
    printf 'lint: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
