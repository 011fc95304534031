#!/usr/bin/env bash
# Makes .venv with pinned packages:  scripts/setup.sh [cpu|gpu] [--eval]
#   cpu | gpu   default: gpu where nvidia-smi lists a device, else cpu
#   --eval      also the packages of the downstream evaluation
# Environment: PYTHON (interpreter to build with), VENV (default .venv in the repository), TORCH_INDEX_URL (a package index
# with CPU builds of torch, where pip's own configuration knows none).
# A second call with unchanged requirements returns at once. Nothing counts as installed before everything is.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
req=$root/requirements
profile="" with_eval=""

die() { printf 'setup: %s\n' "$*" >&2; exit 1; }
say() { printf 'setup: %s\n' "$*" >&2; }

for arg in "$@"; do
  case $arg in
    cpu | gpu) profile=$arg ;;
    --eval) with_eval="eval" ;;
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) die "unknown argument '$arg'; expected: setup.sh [cpu|gpu] [--eval]" ;;
  esac
done
if [ -z "$profile" ]; then
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then profile=gpu; else profile=cpu; fi
fi

stamp=$venv/.ta_opd_stamp
wanted=$({ echo "$profile $with_eval $root"; cat "$req"/*.txt "${BASH_SOURCE[0]}"; } | sha256sum | cut -d' ' -f1)
ready() { [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && [ -x "$venv/bin/python" ]; }
ready && exit 0

python_ok() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
pick_python() {
  if [ -n "${PYTHON:-}" ]; then
    python_ok "$PYTHON" || die "PYTHON=$PYTHON is not Python 3.11 or newer (got: $("$PYTHON" --version 2>&1 || true))"
    echo "$PYTHON"; return
  fi
  local candidate
  for candidate in python3.11 python3.12 python3 python; do
    if python_ok "$candidate"; then echo "$candidate"; return; fi
  done
  die "no Python 3.11 or newer found (python3 is: $(python3 --version 2>&1 || echo absent)); install one or set PYTHON=/path/to/python3.11"
}

mkdir -p "$(dirname "$venv")"
if command -v flock >/dev/null; then
  exec 9<"$req"
  flock -w 1200 9 || die "another setup here has not finished within 20 minutes"
  ready && exit 0
fi
rm -f "$stamp"

need_gb=5; [ "$profile" = gpu ] && need_gb=25
free_kb=$(df -Pk "$(dirname "$venv")" | awk 'NR==2 {print $4}')
if [ ! -d "$venv/lib" ] && [ "$free_kb" -lt $((need_gb * 1024 * 1024)) ]; then
  die "$need_gb GB of free disk needed for the $profile set, got $((free_kb / 1024 / 1024)) GB on $(dirname "$venv"); free some or set VENV to another disk"
fi

log=$(mktemp "${TMPDIR:-/tmp}/ta-opd-setup.XXXXXX") || die "cannot write a temporary file in ${TMPDIR:-/tmp}"
child=""
cleanup() { [ -n "$child" ] && kill "$child" 2>/dev/null; rm -f "$log"; }
trap cleanup EXIT
trap 'trap - EXIT; cleanup; exit 130' INT TERM

# stage NUMBER TEXT COMMAND...: runs quietly, shows the seconds; returns the command's status
stage() {
  local number=$1 text=$2 began=$SECONDS status=0
  shift 2
  "$@" >"$log" 2>&1 9<&- &
  child=$!
  while kill -0 "$child" 2>/dev/null; do
    [ -t 2 ] && printf '\rsetup: [%s] %s ... %d s ' "$number" "$text" $((SECONDS - began)) >&2
    sleep 0.5
  done
  wait "$child" || status=$?
  child=""
  [ -t 2 ] && printf '\r' >&2
  [ "$status" -eq 0 ] && say "[$number] $text: $((SECONDS - began)) s        "
  return "$status"
}
reason() {
  grep -iE 'no space left|^ERROR|error:' "$log" | grep -v 'dependency resolver' | tail -n 1 | cut -c1-300 || true
}
must() {
  stage "$@" && return
  local why
  why=$(reason)
  [ -n "$why" ] || why=$(tail -n 1 "$log" | cut -c1-300)
  die "'$2' failed: $why (nothing is marked as installed; run scripts/setup.sh again once this is fixed)"
}

python=$(pick_python)
if ! "$venv/bin/python" -c 'import pip' >/dev/null 2>&1 || ! python_ok "$venv/bin/python"; then
  rm -rf "$venv"
  must 1/5 "create $(basename "$venv") with $("$python" --version 2>&1)" "$python" -m venv "$venv"
fi
py=$venv/bin/python
pip=("$py" -m pip --disable-pip-version-check --no-input install --progress-bar off)

if [ "$profile" = cpu ]; then
  torch=$(grep '^torch==' "$req/torch.txt")
  if ! "$py" -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '${torch#torch==}')" 2>/dev/null; then
    # A CPU build where pip's configuration or TORCH_INDEX_URL offers one, else the platform's own (on Linux a larger CUDA build).
    index=()
    [ -z "${TORCH_INDEX_URL:-}" ] || index=(--extra-index-url "$TORCH_INDEX_URL")
    if ! stage 2/5 "$torch (CPU build)" "${pip[@]}" "${index[@]}" "$torch+cpu"; then
      say "no CPU build of $torch found: taking the platform's default; set TORCH_INDEX_URL to an index of CPU builds to save a few GB"
      must 2/5 "$torch" "${pip[@]}" "$torch"
    fi
  fi
  must 3/5 "packages" "${pip[@]}" -r "$req/cpu.txt" -r "$req/dev.txt"
  must 4/5 "SGLang" "${pip[@]}" --no-deps -r "$req/cpu-no-deps.txt"
else
  must 3/5 "packages (several GB)" "${pip[@]}" -r "$req/gpu.txt" -r "$req/dev.txt"
fi
[ -z "$with_eval" ] || must 4/5 "evaluation packages" "${pip[@]}" -r "$req/eval.txt"

site=$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n%s\n' "$root" "$root/slime_ta_opd" >"$site/ta_opd_dev.pth"
rm -f "$site/ta_opd_hooks.pth"
if [ "$profile" = cpu ]; then  # transformers imports torchvision, whose wheel expects CUDA: mended when it is imported, in every process
  printf 'import importlib.util as u; exec("try:\\n s=u.spec_from_file_location(\\"_cpu_support_hooks\\", %s)\\n m=u.module_from_spec(s)\\n s.loader.exec_module(m)\\n m.install_torchvision_schema()\\nexcept Exception:\\n pass")\n' \
    "'$root/slime_ta_opd/slime/backends/sglang_utils/cpu_support/hooks.py'" >"$site/ta_opd_hooks.pth"
fi
must 5/5 "check" "$py" -c 'import importlib.util as u, megatron.core, ray, ta_opd, slime, torch, transformers; assert u.find_spec("sglang")'
if ! { printf '%s\n' "$wanted" >"$stamp.new" && mv "$stamp.new" "$stamp"; }; then die "no space left to finish $venv"; fi
say "$profile set ready in $venv"
