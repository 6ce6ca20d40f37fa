#!/bin/sh
# Makes the virtual environment $1 with tpx in it, for $2: `run` (what tpx needs) or `dev` (tests too).
# Where the interpreter already has every package (a GPU host, often without network), they are used.
set -eu
venv=$1 kind=$2 python=${PYTHON:-python3}
triton=3.6.0 # for the tests, where torch brings none: its build for CUDA demands one of its own
root=$(cd "$(dirname "$0")/.." && pwd)
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: tpx needs Python 3.11 or newer, and $python is $("$python" --version 2>&1)" >&2
    echo >&2
    echo "hint: make PYTHON=python3.12" >&2
    exit 3
}

has_all() { # do the distributions that pyproject.toml asks for, for this kind, fit already?
    "$1" - "$root/pyproject.toml" "$kind" <<'PY'
import re, sys, tomllib
from importlib.metadata import PackageNotFoundError, version
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
wanted = project["dependencies"] + (project["optional-dependencies"]["dev"] if sys.argv[2] == "dev" else [])
number = lambda text: [int(n) for n in re.findall(r"\d+", text)[:3]]
for line in wanted:
    name, relation, least = re.fullmatch(r"([\w.-]+)(?:(>=|==)(.+))?", line).groups()
    try:
        have = version(name)
    except PackageNotFoundError:
        sys.exit(1)
    if least and (number(have) < number(least) or relation == "==" and have != least):
        sys.exit(1)
PY
}

if [ ! -x "$venv/bin/python" ]; then
    if has_all "$python"; then
        "$python" -m venv --system-site-packages "$venv"
        # Where the interpreter is a virtual environment itself, that means its base's packages only.
        purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
        "$python" -c "$purelib" >"$("$venv/bin/python" -c "$purelib")/parent.pth"
        scripts=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
        for tool in ruff mypy; do # which `make check` runs by name
            if [ -x "$scripts/$tool" ]; then ln -s "$scripts/$tool" "$venv/bin/$tool"; fi
        done
    else
        "$python" -m venv "$venv"
    fi
fi
pip() { "$venv/bin/python" -m pip install -q "$@"; }
if has_all "$venv/bin/python"; then
    # Everything is here: try without asking a network for what builds tpx.
    pip --no-deps --no-build-isolation -e "$root" 2>/dev/null || pip --no-deps -e "$root"
elif [ "$kind" = dev ]; then
    pip -c "$root/constraints.txt" torch
    "$venv/bin/python" -c 'import importlib.metadata as m; m.version("triton")' 2>/dev/null ||
        pip "triton==$triton"
    pip -c "$root/constraints.txt" -e "$root[dev]"
    pip -c "$root/constraints.txt" --only-binary atheris -e "$root[fuzz]" ||
        echo "note: atheris does not install here; the tests that it guides are skipped" >&2
else
    pip -c "$root/constraints.txt" -e "$root"
fi
touch "$venv/.$kind"
if [ "$kind" = dev ]; then touch "$venv/.run"; fi
