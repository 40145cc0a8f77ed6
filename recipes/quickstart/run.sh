#!/usr/bin/env bash
# The whole chain on the shipped data, on a machine that has Python >= 3.11 and nothing else:
#   bash recipes/quickstart/run.sh            4 to 5 minutes on 2 cores, packages at hand; again: seconds
#   bash recipes/quickstart/run.sh --short    the same commands with few training steps, as CI runs them
set -euo pipefail
cd "$(dirname "$0")/../.."
source recipes/environment.sh
cd recipes/quickstart

export CLIPCID_WORK=work
steps=1200 views=4
if [ "${1:-}" = --short ]; then
    export CLIPCID_WORK=work-short
    steps=150 views=2
fi
taught=$CLIPCID_WORK/distill/taught/student
cid=$CLIPCID_WORK/distill/cid/student
alone=$CLIPCID_WORK/distill/alone/student

say() { printf '\n$ clipcid %s\n' "$*" >&2; clipcid "$@"; }

# The teacher's embeddings, once: of images and captions, of some views of each image and of as many variants of its caption.
# Then one image of each set of near repeats, and clusters of what is kept: of images and captions together, so that the
# cluster loss can teach both towers.
say embed data/pairs --model teacher --views "$views" --view-kind mix --text-variants "$views"
say balance --keep 0.563
say cluster --num-clusters 256 --features joint

# The same student three times on the same images, for the same steps: with the default losses, with those of the CLIP-CID
# paper, and without a teacher. A tenth of the images is held out: the teacher was trained on them, no student is.
# Two cores train so small a model faster when none of them decodes beside it.
length=(--steps "$steps" --batch-size 64 --eval-every 500 --checkpoint-every 1000 --val-fraction 0.1 --workers 0)
say distill --teacher teacher --student student.json --name taught "${length[@]}"
say distill --teacher teacher --student student.json --preset cid --name cid "${length[@]}"
say distill --preset clip --student student.json --name alone "${length[@]}"

# What was held out: does a student know what only its teacher has seen?
say eval-zeroshot "$taught" --model "$cid" --model "$alone" --model teacher --predictions
held_out() { echo "$CLIPCID_WORK/eval/pairs-held-out_$1-student_zeroshot_retrieval.json"; }
say eval-zeroshot --compare "$(held_out alone)" "$(held_out taught)" --json > "$CLIPCID_WORK/taught-alone.json"

# Concepts that nobody was trained on: zero-shot classes and retrieval, then a linear probe on frozen features.
say eval-zeroshot "$taught" data/classification data/retrieval --model "$cid" --model "$alone" --model teacher
for model in teacher "$taught" "$cid" "$alone"; do
    say eval-linear "$model" data/classification
done

say export "$taught" --format open-clip --format onnx

python table.py "$CLIPCID_WORK"
