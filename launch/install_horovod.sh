#!/usr/bin/env bash
# Builds and installs Horovod 0.28.1 for the torch of one Python, with Gloo, without MPI.
#
#     launch/install_horovod.sh [.venv/bin/python]
#
# Horovod's last release asks its compiler for C++14, torch's headers need C++17 or newer.
# Nothing is patched: the last -std on a command line wins, so a wrapper appends one. The
# wheel is kept in a cache, keyed by the versions that it is built for, since pip's own
# cache does not know torch's: the first run takes about ten minutes on two cores, the
# next ones seconds. Needs g++, make and cmake.
set -euo pipefail

python=${1:-python3}
version=0.28.1

for tool in g++ make cmake; do
    command -v "$tool" >/dev/null || {
        echo "install_horovod: $tool is not installed; apt-get install g++ make cmake" >&2
        exit 1
    }
done
key=$("$python" - <<'PYTHON'
import platform
import sys
try:
    import torch
except ImportError:
    sys.exit("install_horovod: this Python has no torch; install lc3 in it first")
print(f"torch-{torch.__version__}-python-{platform.python_version()}-{platform.machine()}")
PYTHON
)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/lc3/horovod-$version-$key

# What the sources import while they are built, and Horovod when it runs. distutils comes
# with setuptools from Python 3.12 on.
"$python" -m pip install --quiet --disable-pip-version-check \
    setuptools wheel packaging cloudpickle psutil pyyaml cffi numpy

if ! ls "$cache"/horovod-*.whl >/dev/null 2>&1; then
    echo "building Horovod $version for $key; this takes some minutes"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    printf '#!/bin/sh\nexec g++ "$@" -std=c++20 -O2 -g0\n' >"$work/c++"
    chmod +x "$work/c++"
    mkdir "$work/wheels"
    env CXX="$work/c++" CMAKE_POLICY_VERSION_MINIMUM=3.5 \
        HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 \
        HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1 HOROVOD_WITHOUT_NVTX=1 \
        "$python" -m pip wheel --no-deps --no-build-isolation --use-pep517 \
        --no-cache-dir --no-binary horovod --disable-pip-version-check \
        --wheel-dir "$work/wheels" "horovod==$version" >"$work/log" 2>&1 || {
        tail -n 40 "$work/log" >&2
        echo "install_horovod: the build failed; its last lines are above" >&2
        exit 1
    }
    mkdir -p "$cache"
    mv "$work"/wheels/horovod-*.whl "$cache"/
fi
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall \
    "$cache"/horovod-*.whl
"$python" -c 'import horovod.torch as hvd; print("Horovod", hvd.__name__, "is ready")'
