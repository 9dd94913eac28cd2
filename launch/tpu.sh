# Sourced by the scripts beside it that ask for TPUs.
#
# shellcheck shell=bash

# read_topology NAME: of a name as `python -m mm_jax compile --topology` takes it, such as v5e:4x4, sets
#   generation   v4, v5e, v5p or v6e
#   shape        4x4
#   chips        16
#   hosts        4; each has 4 chips, or all of them
read_topology() {
  local size
  [[ $1 =~ ^(v4|v5e|v5p|v6e):([0-9]+(x[0-9]+){1,2})$ ]] ||
    die "--topology is \"$1\"; v5e:4x4, v5p:2x2x4, v6e:16x16 or the like is needed"
  generation=${BASH_REMATCH[1]} shape=${BASH_REMATCH[2]} chips=1
  for size in ${shape//x/ }; do chips=$((chips * size)); done
  case $generation:$shape in
    v4:*x*x* | v5p:*x*x*) ;;
    v4:* | v5p:*) die "--topology $1: $generation has three dimensions, such as $generation:2x2x4" ;;
    *:*x*x*) die "--topology $1: $generation has two dimensions, such as $generation:4x4" ;;
  esac
  [ "$chips" -le 4 ] || [ $((chips % 4)) -eq 0 ] || die "--topology $1: $chips chips are no whole number of hosts"
  # shellcheck disable=SC2034 # for the scripts that source this
  hosts=$(((chips + 3) / 4))
}
