#!/usr/bin/env bash
# A short fixed-context diagnostic to try the machinery: four rollouts, 40 contexts of 128 tokens.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"
# shellcheck source=scripts/lib/diagnostics.sh
source "$TA_OPD_ROOT/scripts/lib/diagnostics.sh"

about "A short fixed-context diagnostic to try the machinery: four rollouts, 40 contexts of 128 tokens."
preset NUM_ROLLOUT 4
preset SAVE_INTERVAL 4
preset NUM_CONTEXTS 40
preset HELDOUT_SAMPLES 40
preset CONTEXT_TOKENS 128
diagnostic_run 8b_to_1p7b_short 817 0.62 "$@"
