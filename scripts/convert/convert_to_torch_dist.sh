#!/usr/bin/env bash
# Any Qwen3 or Qwen2.5 model from Hugging Face to torch_dist.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"
# shellcheck source=scripts/lib/convert.sh
source "$TA_OPD_ROOT/scripts/lib/convert.sh"

about "Any Qwen3 or Qwen2.5 model from Hugging Face to torch_dist."
# shellcheck disable=SC2034 # read by to_torch_dist
NAME=student
to_torch_dist "$@"
