# Sourced by the scripts beside it: a virtual environment with mm_jax in it, made where it is missing or out of date.
#
#   PYTHON        the Python to make it with (3.11 or newer; default: the newest found)
#   MM_JAX_VENV   where it is (default: .venv in the root of the repository)
#
# shellcheck shell=bash
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${MM_JAX_VENV:-$root/.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
python=$venv/bin/python

# XLA asks for its scratch memory anew in every step; with huge pages a step on the CPU is about 1.6 times as fast.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

# shellcheck disable=SC2034 # for the scripts that start a training again
UNFINISHED=75 # exit code of a training that was told to stop

die() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# The commands run in the root of the repository. from_here PATH: what the caller means by it, seen from there;
# from_root PATH: one of the repository, as the caller can use it.
from_here() {
  case $1 in /*) echo "$1" ;; *) [ "$PWD" = "$root" ] && echo "$1" || echo "$PWD/$1" ;; esac
}
from_root() {
  [ "$PWD" = "$root" ] && echo "$1" || echo "$root/$1"
}

# setup_environment EXTRAS: afterwards $python can import mm_jax and what the extras name.
setup_environment() {
  local lock=$venv.lock stamp=$venv/installed-${1//,/-} base wanted
  if [ -e "$lock" ]; then
    if kill -0 "$(cat "$lock/pid" 2>/dev/null)" 2>/dev/null; then
      die "process $(cat "$lock/pid") is installing into $venv; try again when it is done"
    fi
    rm -rf "$venv" "$lock" # that installation was killed or failed: what it left is not to be trusted
  fi
  base=$(find_python)
  wanted=$(fingerprint "$base")
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && is_recent "$python"; then
    return
  fi
  if [ -n "${MM_JAX_VENV:-}" ] && [ -n "$(ls -A "$venv" 2>/dev/null)" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
    die "MM_JAX_VENV=$venv is neither empty nor a virtual environment"
  fi
  mkdir -p "${venv%/*}"
  mkdir "$lock"
  echo $$ >"$lock/pid"
  echo "installing mm_jax[$1] into $venv (a minute or two)" >&2
  install_packages "$1" "$base"
  echo "$wanted" >"$stamp"
  rm -rf "$lock"
}

# is_recent PYTHON: it runs and is 3.11 or newer.
is_recent() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# The Python to make the environment with: $PYTHON, that of the environment as it is, or the newest found.
find_python() {
  local name
  if [ -n "${PYTHON:-}" ] && ! is_recent "$PYTHON"; then
    die "PYTHON=$PYTHON is not a Python 3.11 or newer"
  fi
  for name in ${PYTHON:+"$PYTHON"} "$python" python3.13 python3.12 python3.11 python3 python; do
    if is_recent "$name"; then
      "$name" -c 'import sys; print(sys._base_executable)'
      return
    fi
  done
  die "no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python bash $0"
}

# fingerprint PYTHON: its version, what is to be installed, and from where.
fingerprint() {
  "$1" - "$root" <<'END'
import hashlib, pathlib, platform, sys
packages = pathlib.Path(sys.argv[1], "setup.py").read_bytes()
print(platform.python_version(), hashlib.sha256(packages).hexdigest(), sys.argv[1])
END
}

# install_packages EXTRAS PYTHON: into the environment, made anew unless it is one of this version.
install_packages() {
  local uv version='import platform, sys; print(sys.prefix != sys.base_prefix, platform.python_version())'
  uv=$(command -v uv || true)
  if [ "$("$python" -c "$version" 2>/dev/null)" != "True $("$2" -c "$version" | cut -d ' ' -f 2)" ]; then
    rm -rf "$venv"
    "$2" -m venv ${uv:+--without-pip} "$venv"
  fi
  if [ -n "$uv" ]; then
    "$uv" pip install --quiet --python "$python" -e "${root}[$1]"
  else
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null
    "$python" -m pip install -qq --disable-pip-version-check -e "${root}[$1]"
  fi
}
