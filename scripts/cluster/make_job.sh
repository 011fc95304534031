#!/usr/bin/env bash
# Writes a Slurm batch script or a KubeRay RayJob that runs one launcher with the variables set now.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"

about "Writes a Slurm batch script or a KubeRay RayJob that runs LAUNCHER. Every variable of LAUNCHER that is set now goes into the job."
group "The job"
var JOB_KIND choice:slurm,kuberay slurm "what to write"
var LAUNCHER str scripts/train/run_teachability_opd_method_suite.sh "launcher to run, relative to the project"
var JOB_FILE str? "" "file to write; empty: standard output"
var JOB_NAME name ta-opd "name of the job"
var NUM_NODES int:1 1 "nodes"
var GPUS_PER_NODE int:0 8 "GPUs a node; 0: CPU nodes"
var CPUS_PER_NODE int:1 64 "CPUs a node"
var MEMORY_PER_NODE str 512G "memory a node, such as 512G"
group "Slurm"
var TIME_LIMIT str 24:00:00 "longest run time"
var PARTITION str? "" "partition; empty: the default one"
var ACCOUNT str? "" "account; empty: the default one"
group "Kubernetes"
var NAMESPACE str default "namespace"
var IMAGE str ta-opd:gpu "container image with this project and its environment"
var PROJECT_DIR str /workspace/ta-opd "directory of the project in that image or on the shared volume"
var SHARED_VOLUME_CLAIM str ta-opd-data "persistent volume claim with models, prompts and outputs"
var SHARED_MOUNT str /data "where it is mounted"
launcher_init "$@"
if [[ ! -f $TA_OPD_ROOT/$LAUNCHER ]]; then bad LAUNCHER "a script of this project, such as scripts/train/run_opd.sh"; fi
if [[ ! $MEMORY_PER_NODE =~ ^[0-9]+[MGT]$ ]]; then bad MEMORY_PER_NODE "a size such as 512G"; fi
if [[ ! $TIME_LIMIT =~ ^([0-9]+-)?[0-9]{1,3}(:[0-5][0-9]){1,2}$ ]]; then bad TIME_LIMIT "hours:minutes:seconds, such as 24:00:00"; fi
if [[ $JOB_KIND == kuberay && ! $JOB_NAME =~ ^[a-z]([a-z0-9-]{0,45}[a-z0-9])?$ ]]; then
  bad JOB_NAME "at most 47 lower-case letters, digits and dashes, as Kubernetes wants it"
fi
for name in PARTITION ACCOUNT; do
  if [[ ${!name} =~ [[:space:]] ]]; then bad "$name" "a name without blanks"; fi
done
if [[ $JOB_KIND == kuberay ]]; then
  if [[ ! $NAMESPACE =~ ^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$ ]]; then bad NAMESPACE "at most 63 lower-case letters, digits and dashes"; fi
  for name in PROJECT_DIR SHARED_MOUNT; do
    if [[ ${!name} != /* ]]; then bad "$name" "an absolute path in the container"; fi
  done
fi
stop_on_errors
job_python=${PY-} # of the job; this host's choice stays here
PY=""
use_python
exec env PY="$job_python" "$PY" "$TA_OPD_ROOT/tools/make_cluster_job.py" --kind "$JOB_KIND" --launcher "$LAUNCHER" --output "$JOB_FILE" --job-name "$JOB_NAME" \
  --nodes "$NUM_NODES" --gpus "$GPUS_PER_NODE" --cpus "$CPUS_PER_NODE" --memory "$MEMORY_PER_NODE" --time "$TIME_LIMIT" \
  --partition "$PARTITION" --account "$ACCOUNT" --namespace "$NAMESPACE" --image "$IMAGE" --project-dir "$PROJECT_DIR" \
  --claim "$SHARED_VOLUME_CLAIM" --mount "$SHARED_MOUNT"
