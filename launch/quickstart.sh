#!/usr/bin/env bash
# Makes an environment, trains every stage of a config, scores the result on held-out data and writes a report.
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

usage="usage: bash launch/quickstart.sh [--config FILE] [--run DIR] [--dry-run] [--any.field value ...]

Installs what is needed, then runs the whole recipe and goes on where an earlier start was stopped.

  --config FILE   config of the run (default: configs/quickstart.py)
  --run DIR       run directory (default: runs/<name of the config file>)
  --dry-run       print the commands only
  --any.field     further arguments go to \`python -m mm_jax train\`

example: bash launch/quickstart.sh --run runs/seed1 --seed 1"

config=configs/quickstart.py run='' dry='' overrides=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) echo "$usage" && exit ;;
    --dry-run) dry=1 ;;
    --config=* | --run=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
    --config | --run)
      [ $# -ge 2 ] || die "$1 needs a value"
      if [ "$1" = --run ]; then run=$(from_here "$2"); else config=$(from_here "$2"); fi
      shift
      ;;
    *) overrides+=("$1") ;;
  esac
  shift
done
name=${config##*/}
run=${run:-$(from_root "runs/${name%.py}")}
shown=${python#"$PWD/"}
cd "$root"
[ -f "$config" ] || die "there is no config $config"

train=(train "$config" --run "$run" ${overrides[@]+"${overrides[@]}"})
evaluate=(evaluate "$run" --split test)
report=(report "$run")
if [ -n "$dry" ]; then
  for command in "${train[*]}" "${evaluate[*]}" "${report[*]}"; do echo "python -m mm_jax $command"; done
  exit
fi

setup_environment quickstart,tensorboard

# Ctrl-C is for `train`, which saves and says so: an unfinished run is not scored.
trap : INT
said=$("$python" -m mm_jax "${train[@]}") || { status=$? && printf %s "$said" && exit "$status"; }
trap - INT
if [[ $said == *"stopped and saved"* ]]; then
  printf 'stopped and saved; go on with:'
  printf ' %q' bash launch/quickstart.sh --config "$config" --run "$run" ${overrides[@]+"${overrides[@]}"}
  echo
  exit
fi
echo "$said"

"$python" -m mm_jax "${evaluate[@]}"
"$python" -m mm_jax "${report[@]}" >/dev/null

echo
echo "page of questions and answers: $run/report.html"
echo "loss curves:                   $run/loss.png"
echo "scores:                        $run/scores.md"
echo "seconds in all:                $SECONDS"
echo
echo "talk with it: $shown -m mm_jax chat $run --image my.png"
