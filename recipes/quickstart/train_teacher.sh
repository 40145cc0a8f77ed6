#!/usr/bin/env bash
# Train the quickstart's teacher: a small CLIP on the shipped pairs, without a teacher of its own.
#
#     bash recipes/quickstart/train_teacher.sh [WORK]
#
# Writes recipes/quickstart/teacher/ (open_clip folder, fp16 weights) and teacher.log beside it. Took 28 + 13 minutes on
# 2 shared cores with AMX; a run that was stopped goes on from its last checkpoint.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=${1:-$here/work/teacher}
common=(--teacher none --preset clip --precision bf16 --workers 1 --work "$work")

{
  # Drawings of a vendor never seen differ in colour and proportion: hence strong crops and colours first.
  clipcid distill "$here/data/pairs" --student "$here/teacher.json" --name teacher "${common[@]}" \
    --steps 6500 --batch-size 64 --lr 1e-3 --wd 0.2 --crop-scale 0.5 --color-jitter 0.4 --gray-probability 0.05
  # Then images nearly as they are, four times the negatives, and captions of which only the name is certain. On the names
  # of a trained vendor's 1,262 drawings R@1 was 0.34 after the first stage and 0.91 after this one.
  clipcid distill "$here/data/pairs" --student "$work/distill/teacher/student" --name teacher-fine "${common[@]}" \
    --steps 1300 --batch-size 256 --lr 1e-3 --wd 0.2 --crop-scale 0.8 --color-jitter 0.1 --caption-dropout 0.7
  clipcid export "$work/distill/teacher-fine/student" --format open-clip --precision fp16 --out "$here/teacher" --work "$work"
} 2>&1 | tee "$here/teacher.log"
