#!/usr/bin/env bash
# Is a student of fewer pairs, chosen by `balance`, no worse, where pairs repeat as the web's do? See README.md.
#   bash recipes/claim/run.sh            an hour or two on 2 cores; stop it when you like, it goes on where it was
#   bash recipes/claim/run.sh --quick    the same commands with few pairs and 40 steps, to prove that it runs: minutes
# CLAIM_WORK names another work directory.
set -euo pipefail
cd "$(dirname "$0")/../.."
source recipes/environment.sh
cd recipes/claim

export OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0
if [ "${1:-}" = --quick ]; then
    work=${CLAIM_WORK:-work-quick}
    python claim.py "$@" --work "$work" --log "$work.jsonl"
else
    python claim.py "$@" --work "${CLAIM_WORK:-work}"
    python claim.py --tables --work "${CLAIM_WORK:-work}" >table.md
fi
