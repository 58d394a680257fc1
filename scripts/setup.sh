#!/usr/bin/env bash
# Sets up what is missing in a virtual environment and says what it does; does nothing, without network, when all is there.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
EXTRAS=ros,sim,test
APT_PACKAGES="libosmesa6 libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri libgles2 libglib2.0-0"
LIBRARIES="libOSMesa.so libEGL.so.1 libGL.so.1 libGLESv2.so.2 libglib-2.0.so.0"

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# What was installed, from which description of it, for which interpreter.
stamp() { { cat setup.py pyproject.toml scripts/setup.sh; "$VENV/bin/python" --version; pwd; } 2>/dev/null | sha256sum; }
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
say "installing flashvla_ros with [$EXTRAS] into $VENV (about 900 MB, a few minutes the first time)"
pip() { "$VENV/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
pip install --upgrade "pip>=24"  # the pip that Python 3.10 brings needs many minutes to choose versions
pip install --editable ".[$EXTRAS]"
stamp > "$VENV/setup-done"
say "done"
