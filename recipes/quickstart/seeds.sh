#!/usr/bin/env bash
# Does the teacher help, or was it luck? The quickstart's two students with seeds 0, 1 and 2, on what the quickstart left:
#   bash recipes/quickstart/run.sh && bash recipes/quickstart/seeds.sh
# Prints mean and spread over the seeds; seeds.log is what it printed when it was last run for the record.
set -euo pipefail
cd "$(dirname "$0")/../.."
source recipes/environment.sh
cd recipes/quickstart
export CLIPCID_WORK=work CLIPCID_QUIET=true

models=()
for seed in 0 1 2; do
    common=(--student student.json --steps 1200 --batch-size 64 --workers 0 --seed "$seed")
    clipcid distill --teacher teacher "${common[@]}" --name "taught-$seed"
    clipcid distill --preset clip "${common[@]}" --name "alone-$seed"
    models+=(--model "work/distill/taught-$seed/student" --model "work/distill/alone-$seed/student")
done
clipcid eval-zeroshot teacher data/classification data/retrieval "${models[@]}"
for seed in 0 1 2; do
    for kind in taught alone; do
        clipcid eval-linear "work/distill/$kind-$seed/student" data/classification
    done
done
python seeds.py work | tee seeds.log
