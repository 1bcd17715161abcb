#!/bin/sh
# Makes .venv ready: system packages, Python, torch, everything pinned, this package. Instant when nothing changed.
#   PYTHON=python3.12 scripts/setup.sh     another interpreter        DEVICE=cpu|cuda     instead of looking for a GPU
set -eu
cd "$(dirname "$0")/.."
venv=.venv
say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

device=${DEVICE:-}
if [ -z "$device" ]; then
    device=cpu
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then device=cuda; fi
fi
lock=requirements/$device.txt
[ -f "$lock" ] || fail "DEVICE=$device: expected cpu or cuda"

stamp=$(cat requirements/torch.txt "$lock" pyproject.toml setup.py scripts/setup.sh | sha256sum | cut -c1-16)-$device
if [ -x $venv/bin/python ] && [ "$(cat $venv/.ready 2>/dev/null || true)" = "$stamp" ]; then exit 0; fi

# -- system packages --------------------------------------------------------------------------------------------------
by_apt() { # by_apt PACKAGE...: when we may and can
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 || return 1
    say "installing system packages: $*"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

install() { # install PACKAGE...: or say what is missing, and stop
    by_apt "$@" || fail "missing on this machine (Debian's names): $*. Install them (sudo apt-get install $*), then try again."
}

find_python() { # prints the first interpreter that is new enough
    for name in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$name"
            return
        fi
    done
}

python=$(find_python)
if [ -z "$python" ]; then
    [ -z "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is not a Python 3.11 or newer"
    install python3 python3-venv python3-dev
    python=$(find_python)
    [ -n "$python" ] || fail "Python 3.11 or newer is needed; found $(python3 --version 2>&1). Set PYTHON=/path/to/python3.11"
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

missing=
command -v gcc >/dev/null 2>&1 && command -v g++ >/dev/null 2>&1 || missing="$missing g++"
"$python" -c 'import venv, ensurepip' 2>/dev/null || missing="$missing python$version-venv"
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    missing="$missing python$version-dev"
"$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || missing="$missing libnuma1"
# shellcheck disable=SC2086
[ -z "$missing" ] || install $missing

# Tests alone want these. redis-tools has the whole server, as redis-check-rdb, and none of redis-server's services.
wanted=
command -v redis-server >/dev/null 2>&1 || command -v redis-check-rdb >/dev/null 2>&1 || wanted="$wanted redis-tools"
"$python" -c 'import ctypes; ctypes.CDLL("libibverbs.so.1")' 2>/dev/null || wanted="$wanted libibverbs1"
# shellcheck disable=SC2086
[ -z "$wanted" ] || by_apt $wanted || say "without$wanted the tests of Redis over TLS (redis-tools) and Mooncake (libibverbs1) skip"

# -- Python packages --------------------------------------------------------------------------------------------------
if ! $venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    say "creating $venv with Python $version"
    rm -rf $venv
    "$python" -m venv $venv
fi
rm -f $venv/.ready
# -qq: errors only; what we say is the progress.
pip() { $venv/bin/python -m pip --disable-pip-version-check -qq "$@"; }
say "1/3 torch (a minute; several GB where the index has the CUDA build)"
pip install -r requirements/torch.txt
case $device in
cpu)
    say "2/3 vLLM for CPUs and $(grep -c == "$lock") pinned packages (about a minute)"
    pip install --no-deps -r "$lock"
    ;;
cuda)
    say "2/3 vLLM for CUDA and the pinned extras (several minutes)"
    pip install -r "$lock"
    ;;
esac
say "3/3 lmcache, editable"
pip install --no-deps --no-build-isolation -e .
printf '%s\n' "$stamp" >$venv/.ready
say "ready ($device)"
