#!/usr/bin/env bash
# A teacher nobody here trained, distilled into a 64 px student: other width, resolution, tokenizer and file layout.
#   bash recipes/foreign-teacher/run.sh                     on the quickstart's drawings: shows that the chain runs
#   bash recipes/foreign-teacher/run.sh PHOTOS [TEST ...]   on photographs: anything clipcid reads, with captions; or one
#                                                           folder per class, which get captions of their class names.
#                                                           TEST: what to evaluate on, likewise
# STEPS (400) and CLIPCID_WORK (work, in this folder) can be set.
set -euo pipefail
absolute=()
for path in "$@"; do
    absolute+=("$(realpath "$path")")
done
cd "$(dirname "$0")/../.."
source recipes/environment.sh
cd recipes/foreign-teacher

export CLIPCID_WORK=${CLIPCID_WORK:-work} HF_HUB_OFFLINE=1
if [ ${#absolute[@]} -eq 0 ]; then
    absolute=(../quickstart/data/pairs ../quickstart/data/classification ../quickstart/data/retrieval)
fi
photos=${absolute[0]}
tests=("${absolute[@]:1}")

say() { printf '\n$ %s\n' "$*" >&2; "$@"; }

bash teacher.sh

# Photographs in one folder per class, without a text beside them, have no captions: they get a list with some.
if [ -d "$photos" ] && [ -z "$(find "$photos" -name '*.tar' -print -quit -o -name '*.txt' -print -quit)" ]; then
    say python captions.py "$photos" "$CLIPCID_WORK/captions.csv"
    photos=$CLIPCID_WORK/captions.csv
fi

say clipcid embed "$photos" --model teacher
say clipcid balance --keep 0.8
say clipcid cluster --features joint  # for cid
length=(--steps "${STEPS:-400}" --batch-size 64 --val-fraction 0.05 --workers 0)
# Three students: with the default losses, with those of the CLIP-CID paper, and without the teacher.
say clipcid distill --teacher teacher --student student.json --name taught "${length[@]}"
say clipcid distill --teacher teacher --preset cid --student student.json --name cid "${length[@]}"
say clipcid distill --preset clip --student student.json --name alone "${length[@]}"

student=$CLIPCID_WORK/distill/taught/student
others=(--model "$CLIPCID_WORK/distill/cid/student" --model "$CLIPCID_WORK/distill/alone/student" --model teacher)
# Retrieval on the held-out part; with TEST, that as well.
say clipcid eval-zeroshot "$student" "${others[@]}"
[ ${#tests[@]} -eq 0 ] || say clipcid eval-zeroshot "$student" "${tests[@]}" "${others[@]}"
say clipcid export "$student" --format open-clip
