#!/usr/bin/env bash
# What does a student lose that keeps its teacher's text tower, and one that sees no captions either? See README.md.
#   bash recipes/image-only/run.sh            about 10 minutes on 2 cores; stop it when you like, it goes on where it was
#   bash recipes/image-only/run.sh --quick    the same commands with 20 steps, to prove that it runs: minutes
set -euo pipefail
cd "$(dirname "$0")/../.."
source recipes/environment.sh
cd recipes/image-only

# So small a student cannot use two threads.
export OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0
if [ "${1:-}" = --quick ]; then
    python image_only.py --work work-quick --steps 20
else
    python image_only.py --work work | tee log.txt
fi
