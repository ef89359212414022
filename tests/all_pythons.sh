#!/bin/sh
# Run all tests but the slow ones (what `make check` runs) on every Python from 3.11 on that is on the PATH or under pyenv, each in a venv of its own.
# A Python for which gevent or pyzmq has no wheel is named and skipped; anything else that goes wrong is a failure.
set -u
[ $# -gt 0 ] || set -- -q -n "$(expr "$(getconf _NPROCESSORS_ONLN)" + 1)" --maxprocesses 8 --dist worksteal
pip="-m pip install --quiet --disable-pip-version-check"
ran="" skipped="" failed=""

candidates() {
    ls "$HOME"/.pyenv/versions/3.*/bin/python3 2>/dev/null
    (IFS=:; for folder in $PATH; do ls "$folder"/python3 "$folder"/python3.[0-9] "$folder"/python3.[0-9][0-9] 2>/dev/null; done)
}

# prepare PYTHON VENV: 0 ready, 1 failed, 2 no wheels
prepare() {
    [ -f "$2/.ready" ] && return 0
    "$1" -m venv "$2" && "$2/bin/python" $pip --upgrade pip "setuptools>=77" || return 1
    if ! log=$("$2/bin/python" $pip --only-binary :all: gevent pyzmq 2>&1); then
        echo "$log" | tail -n 3
        echo "$log" | grep -q "No matching distribution" && return 2
        return 1
    fi
    "$2/bin/python" $pip --editable ".[dev]" && touch "$2/.ready"
}

for python in $(candidates); do
    version=$("$python" -c 'import sys, ensurepip; print("%d.%d" % sys.version_info[:2] if sys.version_info >= (3, 11) else "")' 2>/dev/null)
    [ -n "$version" ] || continue
    case " $ran $skipped $failed " in *" $version "*) continue ;; esac
    echo "== Python $version ($python)"
    prepare "$python" ".venv-$version"
    case $? in
        0) if ".venv-$version/bin/python" -m pytest "$@"; then ran="$ran $version"; else failed="$failed $version"; fi ;;
        2) echo "SKIPPED Python $version: gevent or pyzmq has no wheel for it"; skipped="$skipped $version" ;;
        *) echo "FAILED to set up .venv-$version"; failed="$failed $version" ;;
    esac
done

echo "== passed:${ran:- none}; failed:${failed:- none}; no wheels:${skipped:- none}"
[ -z "$failed" ] && [ -n "$ran" ]
