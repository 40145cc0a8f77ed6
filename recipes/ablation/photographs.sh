#!/usr/bin/env bash
# Do the main recipes keep their order on photographs, with a teacher of another make? See README.md.
#   bash recipes/ablation/photographs.sh TRAIN TUNE TEST [--jobs N]    each a folder of one folder per class
# PHOTOGRAPHS_WORK names another work directory.
set -euo pipefail
train=$(realpath "$1") tune=$(realpath "$2") test=$(realpath "$3")
shift 3
cd "$(dirname "$0")/../.."
source recipes/environment.sh
cd recipes/ablation

export OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0 HF_HUB_OFFLINE=1
python ablation.py --photographs "$train" "$tune" "$test" "$@" --work "${PHOTOGRAPHS_WORK:-work-photographs}" \
    --log photographs.jsonl
python table.py photographs.jsonl log.jsonl >photographs.md
cat photographs.md
