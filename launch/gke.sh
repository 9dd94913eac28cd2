#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster: writes a JobSet, which starts again where a slice is taken away.
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=tpu.sh
source "$root/launch/tpu.sh"

usage="usage: bash launch/gke.sh --name NAME --image IMAGE --topology NAME --bucket NAME [options] CONFIG.py [--any.field value ...]

Writes a JobSet and gives it to kubectl. The cluster needs JobSet 0.8 or newer, node pools of that topology, and its driver
for Cloud Storage; \`docker build -f launch/Dockerfile --build-arg DEVICE=tpu -t IMAGE .\` makes the image. data/, runs/
and checkpoints/ are folders of the bucket.

  --name NAME          of the JobSet
  --image IMAGE        that the cluster can pull
  --topology NAME      as for \`compile\`: v5e:4x4, v5p:2x2x4, v6e:16x16
  --slices N           so many slices of it (1)
  --bucket NAME        of Cloud Storage, with a hierarchical namespace
  --service-account NAME   that may use the bucket (default)
  --namespace NAME     (default)
  --spot               on spot nodes
  --queue NAME         a LocalQueue of Kueue, as clusters made by XPK have (multislice-queue there)
  --restarts N         after failures that are no preemption (3)
  --grace S            seconds to save in (300)
  --dry-run            print the manifest only

example: bash launch/gke.sh --name llava --image gcr.io/my-project/mm_jax --topology v5e:8x8 --bucket my-bucket configs/llava_1_5_7b.py"

name='' image='' topology='' slices=1 bucket='' account=default namespace=default spot='' queue='' restarts=3 grace=300
dry='' config='' overrides=()
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=1 && shift && continue ;;
    -h | --help) echo "$usage" && exit ;;
  esac
  if [ -n "$config" ]; then # what follows it is for train
    overrides+=("$1") && shift && continue
  fi
  case $1 in
    --spot) spot=1 ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
    --name | --image | --topology | --slices | --bucket | --service-account | --namespace | --queue | --restarts | --grace)
      [ $# -ge 2 ] || die "$1 needs a value"
      option=${1#--}
      printf -v "${option#service-}" %s "$2"
      shift
      ;;
    -*) die "unknown option $1; fields of the config come after it" ;;
    *) config=$1 ;;
  esac
  shift
done
for option in name image topology bucket config; do
  [ -n "${!option}" ] || die "${option/#config/a config} is needed; see --help"
done
# a pod is called <name>-slice-<slice>-<worker>-<5 characters> and may have 63 characters
[[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || die "--name is \"$name\"; up to 40 small letters, digits and - are needed"
for option in slices restarts grace; do
  [[ ${!option} =~ ^(0|[1-9][0-9]*)$ ]] || die "--$option is \"${!option}\"; a whole number is needed"
done
[ "$slices" -gt 0 ] || die "--slices is 0; at least 1 is needed"
[ -f "$root/$config" ] || die "there is no config $config in this repository"
read_topology "$topology"
case $generation in
  v4) accelerator=tpu-v4-podslice ;;
  v5e) accelerator=tpu-v5-lite-podslice ;;
  v5p) accelerator=tpu-v5p-slice ;;
  v6e) accelerator=tpu-v6e-slice ;;
esac

# word TEXT: as a string of YAML.
word() {
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

manifest() {
  local arguments='' argument
  for argument in -m mm_jax train "$config" ${overrides[@]+"${overrides[@]}"} --unfinished "$UNFINISHED"; do
    arguments+=", $(word "$argument")"
  done
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  namespace: $namespace
  labels: {app: mm-jax${queue:+, kueue.x-k8s.io/queue-name: $queue}}
  annotations:
    # every slice has a node pool of its own
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
      # saved because it was told to, or taken away: starts again however often that happens
      - {name: preempted, action: RestartJobSetAndIgnoreMaxRestarts, onJobFailureReasons: [PodFailurePolicy]}
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: train, operator: In, values: [$UNFINISHED]}
              - action: FailJob
                onPodConditions: [{type: DisruptionTarget, status: "True"}]
          template:
            metadata:
              labels: {app: mm-jax}
              annotations: {gke-gcsfuse/volumes: "true"}
            spec:
              restartPolicy: Never
              serviceAccountName: $account
              terminationGracePeriodSeconds: $grace
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $shape
${spot:+                cloud.google.com/gke-spot: \"true\"
}              containers:
                - name: train
                  image: $image
                  command: [python$arguments]
                  # which process this is, GKE says in variables that JAX reads; 8471 joins TPUs, 8080 slices
                  ports: [{containerPort: 8471}, {containerPort: 8080}, {containerPort: 8482}]
                  resources:
                    limits: {google.com/tpu: $((chips / hosts))}
                  volumeMounts:
                    - {name: bucket, mountPath: /app/data, subPath: data}
                    - {name: bucket, mountPath: /app/runs, subPath: runs}
                    - {name: bucket, mountPath: /app/checkpoints, subPath: checkpoints}
                    - {name: cache, mountPath: /cache}
              volumes:
                - name: bucket
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes: {bucketName: $bucket, mountOptions: "implicit-dirs,uid=1000,rename-dir-limit=1000000"}
                - name: cache
                  emptyDir: {}
END
}

if [ -n "$dry" ]; then
  manifest
  exit
fi
command -v kubectl >/dev/null || die "there is no kubectl here; --dry-run prints the manifest"
manifest | kubectl apply -f -
