#!/usr/bin/env bash
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../../slime_ta_opd/examples/on_policy_distillation/run-qwen3-4B-sampled-opd-sglang.sh" "$@"
