#!/bin/sh
# Run the tests on every Python from 3.11 on that is found on the PATH or under pyenv, each in a venv of its own.
set -u
status=0
seen=" "
for python in $(ls "$HOME"/.pyenv/versions/3.*/bin/python3 2>/dev/null) python3 python3.11 python3.12 python3.13 python3.14 python3.15; do
    version=$("$python" -c 'import sys; v = sys.version_info; print("%d.%d" % v[:2] if v >= (3, 11) else "")' 2>/dev/null) || continue
    case "$seen" in *" $version "*) continue ;; esac
    [ -n "$version" ] || continue
    seen="$seen$version "
    venv=.venv-$version
    echo "== Python $version"
    if [ ! -f "$venv/.ready" ]; then
        "$python" -m venv "$venv" &&
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip "setuptools>=77" &&
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --only-binary gevent,pyzmq,greenlet -e ".[dev]" &&
        touch "$venv/.ready" || { echo "SKIPPED Python $version: gevent or pyzmq has no wheel for it"; continue; }
    fi
    "$venv/bin/python" -m pytest -q || status=1
done
exit $status
