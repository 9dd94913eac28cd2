#!/usr/bin/env bash
# Trains on TPU VMs: asks for them, copies this repository there, installs, runs, and goes on after a preemption.
# What stands between ' is for the workers to expand.
# shellcheck source-path=SCRIPTDIR source=env.sh disable=SC2016
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=tpu.sh
source "$root/launch/tpu.sh"

usage="usage: bash launch/tpu_vm.sh COMMAND --name NAME --zone ZONE [options] [-- CONFIG.py --any.field value ...]

Commands:
  create     ask for the TPUs (a queued resource) and wait until they are there
  copy       this repository to all workers, but for .git, data, runs and checkpoints
  install    Python and the packages on all workers; with --bucket also the bucket
  run        start \`python -m mm_jax train\` on all workers, and follow it
  train      all of these; when the TPUs are taken away, ask again and go on, until the run is finished
  follow     what worker 0 says, from the beginning; Ctrl-C leaves the training alone
  stop       let the training save and end
  status     state of the queued resource
  delete     give the TPUs back

  --name NAME        of the queued resource, and of its nodes
  --zone ZONE        such as us-central2-b
  --topology NAME    as for \`compile\`: v5e:4x4, v5p:2x2x4, v6e:16x16 (for create and train)
  --slices N         so many slices of it (1)
  --spot | --reserved
  --project ID       (default: that of gcloud)
  --runtime NAME     software of the VMs (default: by the generation)
  --bucket NAME      data/, runs/ and checkpoints/ on the workers are folders of this Cloud Storage bucket; more than
                     one worker needs it (with a hierarchical namespace, so that checkpoints are renamed at once)
  --dry-run          print the commands only

example: bash launch/tpu_vm.sh train --name pod --zone us-central1-a --topology v5e:8x8 --spot --bucket my-bucket -- configs/llava_1_5_7b.py --stages.instruct.steps 1000"

POLL=${MM_JAX_POLL:-20}       # seconds between two looks at a state
PATIENCE=${MM_JAX_PATIENCE:-15} # looks after which TPUs whose training ended are taken to stay

command='' name='' zone='' topology='' slices=1 project='' runtime='' bucket='' dry='' training=() capacity=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) echo "$usage" && exit ;;
    --) shift && training=("$@") && break ;;
    --dry-run) dry=1 ;;
    --spot | --reserved) capacity+=("$1") ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
    --name | --zone | --topology | --slices | --project | --runtime | --bucket)
      [ $# -ge 2 ] || die "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    -*) die "unknown option $1; what comes after -- goes to train" ;;
    *)
      [ -z "$command" ] || die "unexpected \"$1\"; the config and its fields come after --"
      command=$1
      ;;
  esac
  shift
done

case $command in
  create | copy | install | run | train | follow | stop | status | delete) ;;
  '') die "a command is needed; see --help" ;;
  *) die "unknown command \"$command\"; see --help" ;;
esac
[[ $name =~ ^[a-z][a-z0-9-]*$ ]] || die "--name is \"$name\"; small letters, digits and - are needed"
[ -n "$zone" ] || die "--zone is needed"
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices is \"$slices\"; a whole number from 1 is needed"
case $command in create | train)
  [ -n "$topology" ] || die "--topology is needed, such as v5e:4x4"
  read_topology "$topology"
  # gcloud counts cores of v4 and v5p, two a chip
  case $generation in
    v4) type=v4-$((2 * chips)) base=tpu-ubuntu2204-base ;;
    v5e) type=v5litepod-$chips base=v2-alpha-tpuv5-lite ;;
    v5p) type=v5p-$((2 * chips)) base=v2-alpha-tpuv5 ;;
    v6e) type=v6e-$chips base=v2-alpha-tpuv6e ;;
  esac
  [ $((hosts * slices)) -eq 1 ] || [ -n "$bucket" ] || die "$hosts x $slices workers need a place for the run that all see: --bucket"
  ;;
esac
case $command in run | train)
  [ ${#training[@]} -gt 0 ] || die "after -- a config is needed, such as configs/llava_1_5_7b.py"
  [ -f "$root/${training[0]}" ] || die "there is no config ${training[0]} in this repository"
  ;;
esac

where=(--zone="$zone" ${project:+--project="$project"})
nodes=("$name")
if [ "$slices" -gt 1 ]; then
  nodes=()
  for ((k = 0; k < slices; k++)); do nodes+=("$name-$k"); done
fi

# call COMMAND ...: runs it, or with --dry-run prints it.
call() {
  if [ -n "$dry" ]; then
    printf '%q ' "$@" | sed 's/ $//'
    echo
  else
    "$@"
  fi
}

queue() { call gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }

# on WORKERS NODE COMMAND: in the home directory of the workers.
on() { call gcloud compute tpus tpu-vm ssh "$2" "${where[@]}" --worker="$1" --command="$3"; }

# everywhere FUNCTION ...: calls FUNCTION NODE ... for every slice at once; fails where one of them does.
everywhere() {
  local node started=() failed=0
  for node in "${nodes[@]}"; do
    if [ -n "$dry" ]; then
      "$1" "$node" "${@:2}"
    else
      "$1" "$node" "${@:2}" &
      started+=($!)
    fi
  done
  for node in ${started[@]+"${started[@]}"}; do wait "$node" || failed=1; done
  return "$failed"
}
all_workers() { on all "$1" "$2"; }

# The state of the queued resource; nothing where there is none. Fails where gcloud cannot tell.
state() {
  local said
  if said=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>&1); then
    echo "${said##*$'\n'}"
  elif [[ $said != *NOT_FOUND* && $said != *"not found"* ]]; then
    echo "$said" >&2
    return 1
  fi
}

create() {
  local node=(--node-id="$name")
  [ "$slices" -eq 1 ] || node=(--node-count="$slices" --node-prefix="$name")
  queue create "${node[@]}" --accelerator-type="$type" --runtime-version="${runtime:-$base}" ${capacity[@]+"${capacity[@]}"}
}

# Until the TPUs are there; fails when they will not come.
wait_for_tpus() {
  local now before=''
  if [ -n "$dry" ]; then
    queue describe --format='value(state.state)'
    return
  fi
  while now=$(state); do
    [ "$now" = "$before" ] || echo "$name: ${now:-gone}" >&2
    before=$now
    case $now in
      ACTIVE) return ;;
      '' | FAILED | SUSPENDING | SUSPENDED | DELETING) return 1 ;;
    esac
    sleep "$POLL"
  done
}

copy() {
  local archive
  if [ -n "$dry" ]; then archive=${TMPDIR:-/tmp}/mm_jax.tar.gz; else archive=$(mktemp -d)/mm_jax.tar.gz; fi
  call tar -C "$root" -czf "$archive" --exclude=__pycache__ mm_jax configs launch setup.py pyproject.toml README.md LICENSE
  everywhere send "$archive"
  everywhere all_workers 'mkdir -p mm_jax && tar -C mm_jax -xzf mm_jax.tar.gz'
  [ -n "$dry" ] || rm -rf "${archive%/*}"
}
send() { call gcloud compute tpus tpu-vm scp "$2" "$1:mm_jax.tar.gz" "${where[@]}" --worker=all; }

# The VMs come with an older Python; uv brings one.
install() {
  local steps=(
    'set -e; cd mm_jax'
    '[ -x "$HOME/.local/bin/uv" ] || curl -LsSf https://astral.sh/uv/install.sh | sh'
    '[ -d .venv ] || "$HOME/.local/bin/uv" venv --quiet --python 3.12 .venv'
    '"$HOME/.local/bin/uv" pip install --quiet --python .venv/bin/python -e ".[tpu,tensorboard]"'
  )
  if [ -n "$bucket" ]; then
    steps+=("$(mount_bucket)")
  fi
  everywhere all_workers "$(printf '%s; ' "${steps[@]}")"
}
mount_bucket() {
  cat <<END
if ! command -v gcsfuse >/dev/null; then
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
  echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -qq update; sudo apt-get -qq install -y gcsfuse
fi
mkdir -p "\$HOME/bucket"
mountpoint -q "\$HOME/bucket" || gcsfuse --implicit-dirs --rename-dir-limit=1000000 $bucket "\$HOME/bucket"
for folder in data runs checkpoints; do mkdir -p "\$HOME/bucket/\$folder"; ln -sfn "\$HOME/bucket/\$folder" "\$folder"; done
END
}

# Starts on all workers, apart from this connection; where it runs already it is left alone.
start() {
  local arguments steps
  printf -v arguments ' %q' "${training[@]}" --unfinished "$UNFINISHED"
  steps=(
    'cd mm_jax'
    'if kill -0 "$(cat pid 2>/dev/null)" 2>/dev/null; then exit; fi'
    'rm -f pid code'
    "setsid nohup bash -c '.venv/bin/python -m mm_jax train$(quoted "$arguments") & echo \$! >pid; wait \$!; echo \$? >code' >log 2>&1 </dev/null &"
    'for ((k = 0; k < 100; k++)); do [ -s pid ] && exit; sleep 0.1; done'
    'cat log >&2; exit 1'
  )
  everywhere all_workers "$(printf '%s\n' "${steps[@]}")"
}
quoted() { printf %s "${1//\'/\'\\\'\'}"; } # for a place between '

follow() {
  on 0 "${nodes[0]}" 'cd mm_jax; tail -n +1 -f --pid="$(cat pid)" log; for ((k = 0; k < 100; k++)); do [ -s code ] && exit "$(cat code)"; sleep 0.1; done; exit 1'
}

running() { on 0 "${nodes[0]}" 'kill -0 "$(cat mm_jax/pid)"' 2>/dev/null; }

# Whether the TPUs have gone or go away now that the training has ended.
gone() {
  local look now
  for ((look = 0; look < PATIENCE; look++)); do
    now=$(state) || return 1
    [ "$now" = ACTIVE ] || return 0
    sleep "$POLL"
  done
  return 1
}

train() {
  local now='' status
  while :; do
    if [ -z "$dry" ]; then now=$(state) || die "cannot ask for the state of $name"; fi
    case $now in
      '') create ;;
      FAILED | SUSPENDED)
        queue delete --force --quiet
        continue
        ;;
      SUSPENDING | DELETING)
        sleep "$POLL"
        continue
        ;;
    esac
    wait_for_tpus || continue
    if [ -n "$dry" ] || ! running; then
      if ! { copy && install && start; }; then
        gone || die "$name is there, but cannot be set up"
        continue
      fi
    fi
    status=0
    follow || status=$?
    [ "$status" -ne 0 ] || return 0
    gone || break
    echo "$name was taken away; asking again" >&2
  done
  if [ "$status" -eq "$UNFINISHED" ]; then
    echo "stopped and saved; the same command goes on" >&2
  fi
  return "$status"
}

case $command in
  create) create && { wait_for_tpus || die "the TPUs of $name did not come"; } ;;
  run) start && follow ;;
  stop) everywhere all_workers 'kill -TERM "$(cat mm_jax/pid)"' ;;
  status) queue describe --format='value(state.state)' ;;
  delete) queue delete --force --quiet ;;
  *) "$command" ;;
esac
