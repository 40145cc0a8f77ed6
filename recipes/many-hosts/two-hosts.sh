#!/usr/bin/env bash
# Two "hosts" on this machine, a process each: the shipped data through the chain, as two hosts of a cluster run it.
#   bash recipes/many-hosts/two-hosts.sh [STEPS]       training steps, by default 100
set -euo pipefail
cd "$(dirname "$0")/../.."
source recipes/environment.sh
cd recipes/many-hosts

export HEAD=localhost HOSTS=2 PROCESSES=1 JOB=two-hosts-$$ CLIPCID_WORK=work
export DATA=../quickstart/data/pairs TEACHER=../quickstart/teacher STUDENT=../quickstart/student.json
export CLUSTER_FLAGS="--num-clusters 256 --features joint"
export DISTILL_FLAGS="--preset cid --steps ${1:-100} --batch-size 64 --workers 0"
# Two hosts have cores of their own; here both share these, and idle threads must not spin on them.
OMP_NUM_THREADS=$((($(nproc) + 1) / 2))
export OMP_NUM_THREADS GOMP_SPINCOUNT=0
PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1] - 4)')
export PORT

bash host.sh &
other=$!
# Whatever ends this script ends the other host too; it waits for nobody then.
trap 'kill "$other" 2>/dev/null || true' EXIT
bash host.sh
wait "$other"
trap - EXIT
