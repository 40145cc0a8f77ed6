#!/usr/bin/env bash
# Tests and figures of a machine with GPUs, in one command and some 15 minutes:
#   bash recipes/gpu/run.sh                   on the first GPU, and one training on all of them
#   bash recipes/gpu/run.sh --cpu             in small on the CPU: does it run?
#   bash recipes/gpu/run.sh --prepare         before, for a machine without a network: fetch small wheels that it may lack
# It uses the Python that has PyTorch (PYTHON names another). What that lacks is unpacked from the wheels of --prepare, in
# recipes/gpu/wheels or WHEELS, into an environment in the scratch folder. A part that fails or takes too long leaves the
# others; the table says so. CLIPCID_GPU_PATIENCE multiplies the time limits of the parts, by default by 1 on a GPU and by 5 on
# a CPU. CLIPCID_GPU_OUT, by default /tmp/clipcid-gpu, receives the table, the logs, and each figure once it is known.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
wheels=$(realpath -m "${WHEELS:-recipes/gpu/wheels}")
cpu=${1:-}
case $cpu in
    "" | --cpu) ;;
    --prepare) exec "$python" recipes/gpu/offline.py fetch "$wheels" ;;
    *) echo "Usage: bash recipes/gpu/run.sh [--cpu | --prepare]" >&2; exit 2 ;;
esac
patience=${CLIPCID_GPU_PATIENCE:-$([ -z "$cpu" ] && echo 1 || echo 5)}
[[ $patience =~ ^[1-9][0-9]*$ ]] || { echo "CLIPCID_GPU_PATIENCE is $patience; it must be a whole number from 1." >&2; exit 2; }
out=$(realpath -m "${CLIPCID_GPU_OUT:-/tmp/clipcid-gpu}")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out"
figures=$out/figures.jsonl
: > "$figures"

"$python" -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)' || {
    echo "$python has no PyTorch 2.9 or newer. Set PYTHON to one that has it." >&2
    exit 1
}
export GOMP_SPINCOUNT=0 HF_HUB_OFFLINE=1
# -P: from the checkout, clipcid_cli could be imported without being installed
if "$python" -P -c 'import clipcid_cli, hypothesis, pytest, sklearn' 2> /dev/null; then
    export PATH="$(dirname "$("$python" -c 'import sys; print(sys.executable)')"):$PATH"
else
    "$python" recipes/gpu/offline.py install "$wheels" "$scratch/venv" || exit 1
    export PATH="$scratch/venv/bin:$PATH"
fi

# Workers hand batches over in shared memory, of which containers often have 64 MiB.
shared=$(df --output=avail -k /dev/shm 2> /dev/null | tail -1)
[ "${shared:-8388608}" -ge 4194304 ] || echo "/dev/shm has $((shared / 1024)) MiB: start the container with --shm-size 16g." >&2

# part SECONDS NAME COMMAND..., on a GPU: what it prints goes to NAME.log
part() {
    local limit=$(($1 * patience)) name=$2 began=$SECONDS code=0
    shift 2
    timeout --kill-after=10 "$limit" "$@" > "$out/$name.log" 2>&1 || code=$?
    printf '{"part": "%s", "exit": %d, "seconds": %d}\n' "$name" "$code" $((SECONDS - began)) >> "$figures"
    echo "$name: $((SECONDS - began)) s, exit $code" >&2
}

measure() { part "$1" "$2" python recipes/gpu/measure.py "$2" --scratch "$scratch" --figures "$figures" $cpu; }

python recipes/gpu/table.py "$figures" --describe || exit 1
# Exit 1 says that this machine lacks something, which its table names: the figures are measured all the same.
part 60 doctor bash -c 'clipcid doctor || [ $? -eq 1 ]'
cat "$out/doctor.log" >&2
[ -n "$cpu" ] || part 150 tests python -m pytest -m gpu -q tests/gpu tests/gpu_simulated
measure 30 product
measure 60 balance
measure 60 cluster
measure 120 embed
measure 60 distill
measure 90 distill-large
measure 90 distill-b16
measure 180 distill-compile
measure 180 distill-all
measure 30 loss
measure 60 evaluate
python recipes/gpu/table.py "$figures" | tee "$out/table.md"
grep -q '"exit": [^0]' "$figures" && { echo "Some parts failed; their logs are in $out." >&2; exit 1; }
exit 0
