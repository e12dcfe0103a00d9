#!/bin/sh
# Usage: tools/setup.sh base|dev
# Create .venv and install the package into it, editable, at the tested versions:
# `base` is what a conversion needs, `dev` adds torch, the oracles and the linters.
set -eu
cd "$(dirname "$0")/.."

usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    # 3.11 first: the versions in constraints.txt were tested with it.
    for python in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3 python}; do
        if usable "$python"; then
            echo "$python"
            return
        fi
    done
    echo "error: no Python >= 3.11 with venv and ensurepip${PYTHON:+: $PYTHON}; install one" >&2
    echo "(Debian, Ubuntu: apt install python3-venv) or name one: make PYTHON=/path/to/python" >&2
    exit 1
}

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "creating .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi
case $1 in
    base) what=. ;;
    dev) what='.[dev]' ;;
    *) echo "usage: tools/setup.sh base|dev" >&2; exit 2 ;;
esac
echo "installing $what into .venv"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e "$what"
touch .venv/installed-base ".venv/installed-$1"
