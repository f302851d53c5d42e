#!/bin/sh
# Makes $VENV with the package, its extras $EXTRAS and dependency groups, at the versions of constraints.txt.
# usage: [EXTRAS=train,audio] tools/install.sh [GROUP ...]   (default: the extra train and the group dev)
# Needs Python 3.11 or newer. uv is taken from PATH, or else installed by pip into a folder of its own.
set -eu
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
EXTRAS=${EXTRAS:-train}
CACHE=.cache/uv

fail() { echo "install: $*" >&2; exit 1; }

command -v "$PYTHON" >/dev/null 2>&1 || fail "$PYTHON was not found; name a Python 3.11 or newer with PYTHON=/path/to/python"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$("$PYTHON" --version) is too old; name a Python 3.11 or newer with PYTHON=/path/to/python"

if command -v uv >/dev/null 2>&1; then
  UV=uv
elif [ -x "$CACHE/bin/uv" ]; then
  UV="$CACHE/bin/uv"
else
  echo "install: fetching uv"
  mkdir -p "$CACHE"
  # --target needs neither a virtual environment nor the right to write beside the system's Python.
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --target "$CACHE" --upgrade uv ||
    fail "uv could not be installed with pip; see above, or install uv yourself and try again"
  UV="$CACHE/bin/uv"
fi

groups=
for group in "${@:-dev}"; do groups="$groups --group $group"; done

"$UV" venv --quiet --allow-existing --python "$PYTHON" "$VENV"
# shellcheck disable=SC2086  # one word per group is meant
echo "install: torch and the rest into $VENV (a few GB on the first time)"
"$UV" pip install --quiet -p "$VENV" -c constraints.txt -e ".[$EXTRAS]" $groups
echo "install: done"
