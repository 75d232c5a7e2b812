#!/usr/bin/env bash
# Makes .venv in this clone: the tested torch, then dtron (editable) with its tools, all pinned by constraints.txt.
# With a version of torch as its argument, as in `scripts/setup.sh 2.11.0`, makes .venv-torch-2.11.0 with that one.
#
# Without an NVIDIA driver the CPU build of torch is installed where one is available. With a driver, .venv uses the
# torch 2.11 to 2.13 that the machine's own python3 has (a container's, for example). A finished environment makes the
# next call instant; one that is incomplete, was moved or is older than the pins is made again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH=2.13.0
torch=${1:-$TORCH}
venv=.venv${1:+-torch-$1}

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

has_nvidia_driver() { [ -e /dev/nvidia0 ] || [ -e /proc/driver/nvidia ] || nvidia-smi -L >/dev/null 2>&1; }

find_python() { # the first Python >= 3.10 among the names given
    local name
    for name in "$@"; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then echo "$name"; return; fi
    done
    die "no Python 3.10 or newer among: $*. Install one (with its venv module) and run this again."
}

cuda_torch() { # prints the version of $1's own torch if it is a CUDA build that dtron is tested with
    "$1" - 2>/dev/null <<'PY'
import re
import torch
if torch.version.cuda is None or not re.fullmatch(r"2\.1[123]\.\d+(\+.*)?", torch.__version__):
    raise SystemExit(1)
print(torch.__version__)
PY
}

make_venv() { # $1: the Python; the rest: options of venv
    local python=$1
    shift
    rm -rf "$venv"
    "$python" -m venv "$@" "$venv" || die "'$python -m venv' failed. On Debian and Ubuntu: apt-get install python3-venv"
}

pip() { "$venv/bin/python" -m pip -qq --disable-pip-version-check "$@"; }

install_torch() { # without its dependencies: they come with dtron's, under the same pins
    if [ "$kind" = cpu ] && [ "$(uname -s)" = Linux ]; then # elsewhere the plain build is the CPU build
        say "torch $torch, CPU build"
        if pip install --no-deps --retries 2 "torch==$torch+cpu" 2>/dev/null; then return; fi
        say "the configured package indexes have none; trying download.pytorch.org"
        if pip install --no-deps --retries 0 --timeout 15 \
            --index-url https://download.pytorch.org/whl/cpu "torch==$torch+cpu" 2>/dev/null; then return; fi
        say "the CPU build of torch $torch was not found: installing the default build, which may bring CUDA packages"
    else
        say "torch $torch"
    fi
    pip install --no-deps "torch==$torch"
}

kind=cpu
if has_nvidia_driver; then kind=cuda; fi
pins=$({ pwd; cat pyproject.toml constraints.txt scripts/setup.sh; } | cksum)
# A CUDA build also works on a machine without a driver (a cluster's login node); a CPU build finds no GPU.
for made_for in cuda "$kind"; do
    if [ "$(cat "$venv/.stamp" 2>/dev/null)" = "$pins $made_for" ]; then exit 0; fi
done

start=$SECONDS
own=
if [ "$kind" = cuda ]; then # the machine's python3 comes first: it may have a torch of its own
    python=$(find_python python3 python3.11 python3.12 python3.13 python3.10)
    if [ $# -eq 0 ]; then
        make_venv "$python" --system-site-packages
        own=$(cuda_torch "$venv/bin/python" || true)
    fi
else
    python=$(find_python python3.11 python3.12 python3.13 python3 python3.10)
fi
if [ -n "$own" ]; then
    say "$("$python" --version), with the torch $own it has"
    torch=${own%%+*}
else
    say "$("$python" --version) in $venv"
    make_venv "$python"
    install_torch
fi
say "dtron and its tools"
{ grep -v '^torch==' constraints.txt; echo "torch==$torch"; } >"$venv/constraints.txt" # the tested pins, this torch
pip install -c "$venv/constraints.txt" -e '.[dev]'
echo "$pins $kind" >"$venv/.stamp"
say "done in $((SECONDS - start)) s"
