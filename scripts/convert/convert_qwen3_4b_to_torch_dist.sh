#!/usr/bin/env bash
# Qwen3-4B (or any other dense Qwen model) from Hugging Face to torch_dist.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"
# shellcheck source=scripts/lib/convert.sh
source "$TA_OPD_ROOT/scripts/lib/convert.sh"

about "Qwen3-4B (or any other dense Qwen model) from Hugging Face to torch_dist."
# shellcheck disable=SC2034 # read by to_torch_dist
NAME=qwen3_4b
to_torch_dist "$@"
