#!/usr/bin/env bash
# Makes an environment and runs the tests in it, one process a core.
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

usage="usage: bash launch/test.sh [--slow] [--dry-run] [any argument of pytest ...]

  --slow      also the tests that take longer than a minute
  --dry-run   print the command only

example: bash launch/test.sh tests/data -k boxes"

arguments=() dry=''
for argument; do
  case $argument in
    -h | --help) echo "$usage" && exit ;;
    --dry-run) dry=1 ;;
    *) arguments+=("$argument") ;;
  esac
done

command=(-m pytest -n "$(getconf _NPROCESSORS_ONLN)" ${arguments[@]+"${arguments[@]}"})
if [ -n "$dry" ]; then
  echo "python ${command[*]}"
  exit
fi

setup_environment test
cd "$root"
# What XLA compiled is kept between runs of the tests, apart from the programs of the user's own runs.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/mm_jax/jax-tests}
exec "$python" "${command[@]}"
