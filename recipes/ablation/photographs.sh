#!/usr/bin/env bash
# Do the main recipes keep their order on photographs, with a teacher of another make? See README.md.
#   bash recipes/ablation/photographs.sh TRAIN TUNE TEST [--jobs N]    each a folder of one folder per class
# PHOTOGRAPHS_WORK names another work directory; log and tables are in it.
set -euo pipefail
train=$(realpath "$1") tune=$(realpath "$2") test=$(realpath "$3")
shift 3
cd "$(dirname "$0")/../.."
source recipes/environment.sh
cd recipes/ablation

export OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0 HF_HUB_OFFLINE=1
work=${PHOTOGRAPHS_WORK:-work-photographs}
mkdir -p "$work"
python ablation.py --photographs "$train" "$tune" "$test" "$@" --work "$work" --log "$work/photographs.jsonl"
python table.py "$work/photographs.jsonl" log.jsonl >"$work/photographs.md"
cat "$work/photographs.md"
