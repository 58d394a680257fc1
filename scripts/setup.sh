#!/usr/bin/env bash
# Sets up what is missing in a virtual environment and says what it does; does nothing, without network, when all is there.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
EXTRAS=ros,sim,vla,serve,data,train,eval,experiment,test
TORCH=2.13.0
APT_PACKAGES="libosmesa6 libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri libgles2 libglib2.0-0"
LIBRARIES="libOSMesa.so libEGL.so.1 libGL.so.1 libGLESv2.so.2 libglib-2.0.so.0"

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# What was installed, from which description of it, for which interpreter.
stamp() { { cat setup.py pyproject.toml scripts/setup.sh quant/csrc/*; "$VENV/bin/python" --version; pwd; } 2>/dev/null | sha256sum; }
if [ -x "$VENV/bin/flashvla" ] && [ "$(cat "$VENV/setup-done" 2>/dev/null)" = "$(stamp)" ]; then
    exit 0
fi

[ "$(uname -sm)" = "Linux x86_64" ] || fail "this is $(uname -sm); ROS 2 from PyPI needs x86-64 Linux. On a robot with
its own ROS 2, build the package with colcon instead (see README.md)."
"$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' ||
    fail "$("$PYTHON" --version) is not supported: Python 3.10, 3.11 or 3.12 is. Name one: make demo PYTHON=python3.11"

missing=""
for library in $LIBRARIES; do
    /sbin/ldconfig -p | grep -q "$library" || missing="$missing $library"
done
if [ -n "$missing" ]; then
    say "system libraries are missing:$missing (software OpenGL for the simulator's cameras)"
    if [ "$(id -u)" = 0 ]; then
        say "installing them: apt-get install $APT_PACKAGES"
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq
        # Ubuntu 24.04 renamed one of them.
        apt-get install -y -qq $APT_PACKAGES >/dev/null ||
            apt-get install -y -qq ${APT_PACKAGES/libglib2.0-0/libglib2.0-0t64} >/dev/null
    else
        fail "install them, then run this again:
    sudo apt-get update && sudo apt-get install -y $APT_PACKAGES"
    fi
fi

if [ ! -x "$VENV/bin/python" ]; then
    say "making a virtual environment in $VENV"
    "$PYTHON" -m venv "$VENV" || fail "that needs the venv module: sudo apt-get install -y python3-venv, then again"
fi
say "installing flashvla_ros with [$EXTRAS] into $VENV (about 1.2 GB, a few minutes the first time)"
pip() { "$VENV/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
pip install --upgrade "pip>=24"  # the pip that Python 3.10 brings needs many minutes to choose versions
if ! "$VENV/bin/python" -c "import torch, sys; sys.exit(not torch.__version__.startswith('$TORCH'))" 2>/dev/null; then
    if [ -e /proc/driver/nvidia/version ]; then
        say "installing torch $TORCH with CUDA: there is an NVIDIA GPU"
        pip install "torch==$TORCH"
    else
        say "installing torch $TORCH for the CPU: there is no NVIDIA GPU, and PyPI's torch brings gigabytes of CUDA"
        # A wheel that pip is configured to find locally, else PyTorch's own index of CPU builds.
        pip install --no-deps --no-index "torch==$TORCH+cpu" 2>/dev/null ||
            pip install --no-deps --index-url https://download.pytorch.org/whl/cpu "torch==$TORCH+cpu" ||
            fail "the CPU build of torch $TORCH cannot be had from PyTorch's index; see the error above"
    fi
fi
# Naming torch again keeps it: torchvision goes with one version of torch and would bring the newest.
pip install "torch==$TORCH" --editable ".[$EXTRAS]"
# For the tests of the server. It asks for numpy below 2, which the part that is used does not need.
pip install --no-deps openpi-client==0.1.2
stamp > "$VENV/setup-done"
say "done"
