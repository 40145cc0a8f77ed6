#!/usr/bin/env bash
# Train the quickstart's teacher: a small CLIP on the shipped pairs, without a teacher of its own.
#
#     bash recipes/quickstart/train_teacher.sh [WORK]
#
# Writes recipes/quickstart/teacher/ (open_clip folder, fp16 weights) and teacher.log beside it. Wants about 15 minutes on
# 2 cores with AMX; a run that was stopped goes on from its last checkpoint.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=${1:-$here/work/teacher}

# Drawings of a vendor never seen differ in colour and proportion: hence the strong crops and colours.
clipcid distill "$here/data/pairs" --teacher none --student "$here/teacher.json" --preset clip --name teacher \
  --steps 6500 --batch-size 64 --lr 1e-3 --wd 0.2 --crop-scale 0.5 --color-jitter 0.4 --gray-probability 0.05 \
  --precision bf16 --workers 1 --work "$work" 2>&1 | tee -a "$here/teacher.log"
clipcid export "$work/distill/teacher/student" --format open-clip --precision fp16 --out "$here/teacher" --work "$work" \
  2>&1 | tee -a "$here/teacher.log"
