#!/usr/bin/env bash
# A torch_dist checkpoint of a run to a Hugging Face directory.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"
# shellcheck source=scripts/lib/convert.sh
source "$TA_OPD_ROOT/scripts/lib/convert.sh"

about "A torch_dist checkpoint of a run to a Hugging Face directory."
to_hf "$@"
