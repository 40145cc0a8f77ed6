#!/usr/bin/env bash
# The setting of the CLIP-CID paper: LAION400M, 56.3 % kept, a million clusters, ViT-bigG-14 to ViT-B-32, 32 epochs.
#   DATA=laion400m/ DATA_ROOT=/data/clip_benchmark CLIPCID_WORK=/data/work bash recipes/paper/run.sh
#   bash recipes/paper/run.sh --check     the same steps on generated shards with tiny models, in minutes on a CPU
# Each step's dry run, which checks inputs and states the cost, comes before the step itself. The same command resumes.
# LAUNCH says how clipcid is started, SETS which data sets are measured (README.md).
set -euo pipefail
cd "$(dirname "$0")/../.."
source recipes/environment.sh

teacher=ViT-bigG-14
student=ViT-B-32
clusters=1000000
length=(--epochs 32)
launch=${LAUNCH:-torchrun --standalone --nproc-per-node gpu -m clipcid_cli}
sets=${SETS:-imagenet food101 cifar10 cifar100 sun397 cars aircraft dtd pets caltech101 flowers}

if [ "${1:-}" = --check ]; then
    scratch=${CHECK:-/tmp/clipcid-paper}
    python recipes/paper/check.py "$scratch"
    DATA=$scratch/shards
    DATA_ROOT=$scratch/data
    export CLIPCID_WORK=$scratch/work
    teacher=$scratch/teacher
    student=recipes/scale/student.json
    clusters=64
    length=(--steps 20 --batch-size 64)
    launch="python -m clipcid_cli"
    sets="food101 pets"
fi
: "${DATA:?the shards of LAION400M}" "${DATA_ROOT:?a folder with the data sets to measure on}" "${CLIPCID_WORK:?}"
read -ra clipcid <<<"$launch"
read -ra names <<<"$sets"

step() {
    echo "== $*"
    "${clipcid[@]}" "$@" --dry-run
    "${clipcid[@]}" "$@"
}

step embed "$DATA" --model "$teacher"
step balance --keep 0.563
step cluster --features joint --num-clusters "$clusters" --repair none
step distill --student "$student" --preset cid --name paper "${length[@]}" \
    --optimizer adamw --lr 1e-3 --wd 0.2 --repair none
step eval-zeroshot "$CLIPCID_WORK/distill/paper/student" "${names[@]}" --data-root "$DATA_ROOT"
for name in "${names[@]}"; do
    step eval-linear "$CLIPCID_WORK/distill/paper/student" "$name" --data-root "$DATA_ROOT"
done
python recipes/paper/mean.py "$CLIPCID_WORK/eval"
