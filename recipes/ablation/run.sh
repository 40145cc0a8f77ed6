#!/usr/bin/env bash
# Which losses and settings help a small student, and by how much? See README.md.
#   bash recipes/ablation/run.sh            hours on 2 cores; stop it when you like, it goes on where it was
#   bash recipes/ablation/run.sh --jobs 8   as many runs side by side
#   bash recipes/ablation/run.sh --quick    the same commands with 40 steps, to prove that it runs: minutes
# ABLATION_WORK names another work directory.
set -euo pipefail
cd "$(dirname "$0")/../.."
source recipes/environment.sh
cd recipes/ablation

# One thread a run and two runs side by side: so small a student cannot use two threads.
export OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0
if [ "${1:-}" = --quick ]; then
    work=${ABLATION_WORK:-work-quick}
    python ablation.py "$@" --work "$work" --log "$work.jsonl"
    python table.py "$work.jsonl"
else
    python ablation.py "$@" --work "${ABLATION_WORK:-work}"
    python table.py log.jsonl >table.md
    cat table.md
fi
