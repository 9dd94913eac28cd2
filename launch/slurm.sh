#!/usr/bin/env bash
# Trains on GPUs of several nodes of a Slurm cluster, one process a GPU; a job that is stopped before the end goes on.
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

usage="usage: bash launch/slurm.sh [options] CONFIG.py [--any.field value ...]

Submits a batch job. It is told to save --grace seconds before its time is over or when it is preempted, and queues
itself again until the run is finished. The environment is .venv (or \$MM_JAX_VENV) with \`pip install -e . 'jax[cuda12]'\`
in it; it, the repository and the run must be on a disk that all nodes see.

  --nodes N          (1)
  --gpus N           of every node (8)
  --cpus N           of every GPU (8)
  --time T           limit of one start, as for sbatch (24:00:00)
  --grace S          seconds to save in (300)
  --partition NAME, --account NAME, --qos NAME, --constraint NAME
  --name NAME        of the job (default: of the config file)
  --run DIR          run directory (default: runs/<name>)
  --dry-run          print the batch script only

example: bash launch/slurm.sh --nodes 4 --gpus 8 --partition gpu configs/llava_1_5_7b.py --seed 1"

# shellcheck disable=SC2034 # some are read by name
nodes=1 gpus=8 cpus=8 time=24:00:00 grace=300 partition='' account='' qos='' constraint='' name='' run='' dry=''
config='' overrides=()
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=1 && shift && continue ;;
    -h | --help) echo "$usage" && exit ;;
  esac
  if [ -n "$config" ]; then # what follows it is for train
    overrides+=("$1") && shift && continue
  fi
  case $1 in
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
    --nodes | --gpus | --cpus | --time | --grace | --partition | --account | --qos | --constraint | --name | --run)
      [ $# -ge 2 ] || die "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    -*) die "unknown option $1; fields of the config come after it" ;;
    *) config=$1 ;;
  esac
  shift
done
[ -n "$config" ] || die "a config is needed, such as configs/llava_1_5_7b.py"
config=$(from_here "$config")
[ -f "$config" ] || [ -f "$root/$config" ] || die "there is no config $config"
for number in nodes gpus cpus grace; do
  [[ ${!number} =~ ^[1-9][0-9]*$ ]] || die "--$number is \"${!number}\"; a whole number from 1 is needed"
done
name=${name:-$(basename "$config" .py)}
run=${run:-runs/$name}

# Lines of the batch script for what was given.
chosen() {
  local option
  for option in partition account qos constraint; do
    [ -z "${!option}" ] || echo "#SBATCH --$option=${!option}"
  done
}

# One task a GPU, but no GPU bound to a task: JAX picks the one with the task's number from all of its node.
# The signal goes to the training, not to the script around it.
batch() {
  local command
  printf -v command ' %q' "$python" -m mm_jax train "$config" --run "$run" ${overrides[@]+"${overrides[@]}"} --unfinished "$UNFINISHED"
  cat <<END
#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gpus-per-node=$gpus
#SBATCH --cpus-per-task=$cpus
#SBATCH --time=$time
#SBATCH --signal=TERM@$grace
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=$(printf %q "$root")/runs/slurm-%j.out
$(chosen)
cd $(printf %q "$root") || exit
export GLIBC_TUNABLES=$GLIBC_TUNABLES
status=0
srun --cpus-per-task=$cpus --kill-on-bad-exit=0 --label$command || status=\$?
if [ "\$status" -eq $UNFINISHED ]; then
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$status"
END
}

if [ -n "$dry" ]; then
  batch
  exit
fi
[ -x "$python" ] || die "there is no environment $venv; make one: python3 -m venv $venv && $python -m pip install -e $root 'jax[cuda12]'"
command -v sbatch >/dev/null || die "there is no sbatch here; --dry-run prints the script"
mkdir -p "$root/runs"
batch | sbatch
