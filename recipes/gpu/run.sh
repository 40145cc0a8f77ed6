#!/usr/bin/env bash
# Tests and figures of a machine with a GPU, in one command and some 8 minutes:
#   bash recipes/gpu/run.sh                   on the first GPU
#   bash recipes/gpu/run.sh --cpu             in small on the CPU: does it run?
#   WHEELS=folder bash recipes/gpu/run.sh     offline: packages that are missing are taken from wheels in a folder
# It uses the Python that has PyTorch (PYTHON names another), and puts what that lacks into an environment in the scratch
# folder. A part that fails or takes too long leaves the others; the table says so. CLIPCID_GPU_PATIENCE multiplies the time
# limits of the parts, by default by 1 on a GPU and by 5 on a CPU. CLIPCID_GPU_OUT, by default /tmp/clipcid-gpu, receives
# the table, figures and logs.
set -uo pipefail
cd "$(dirname "$0")/../.."
cpu=${1:-}
[ -z "$cpu" ] || [ "$cpu" = --cpu ] || { echo "Usage: bash recipes/gpu/run.sh [--cpu]" >&2; exit 2; }
patience=${CLIPCID_GPU_PATIENCE:-$([ -z "$cpu" ] && echo 1 || echo 5)}
[[ $patience =~ ^[1-9][0-9]*$ ]] || { echo "CLIPCID_GPU_PATIENCE is $patience; it must be a whole number from 1." >&2; exit 2; }
out=$(realpath -m "${CLIPCID_GPU_OUT:-/tmp/clipcid-gpu}")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out"
: > "$out/figures.jsonl"

python=${PYTHON:-python3}
"$python" -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)' || {
    echo "$python has no PyTorch 2.9 or newer. Set PYTHON to one that has it." >&2
    exit 1
}
export GOMP_SPINCOUNT=0 HF_HUB_OFFLINE=1
# -P: from the checkout, clipcid_cli could be imported without being installed
if "$python" -P -c 'import clipcid_cli, hypothesis, pytest, sklearn' 2> /dev/null; then
    export PATH="$(dirname "$("$python" -c 'import sys; print(sys.executable)')"):$PATH"
else
    "$python" -m venv --system-site-packages "$scratch/venv" || exit 1
    export PATH="$scratch/venv/bin:$PATH"
    # Where $python is of an environment itself, the new one would see the system's packages only, not that one's PyTorch.
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), sep="\n")' \
        > "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth" || exit 1
    offline=()
    [ -z "${WHEELS:-}" ] || offline=(--no-index --find-links "$WHEELS")
    python -m pip install --quiet "${offline[@]}" --editable . 'pytest>=8.2' 'hypothesis>=6.100' 'scikit-learn>=1.5' || exit 1
fi

# Workers hand batches over in shared memory, of which containers often have 64 MiB.
shared=$(df --output=avail -k /dev/shm 2> /dev/null | tail -1)
[ "${shared:-8388608}" -ge 4194304 ] || echo "/dev/shm has $((shared / 1024)) MiB: start the container with --shm-size 16g." >&2

# part SECONDS NAME COMMAND..., on a GPU: its figures go to figures.jsonl, the rest to NAME.log
part() {
    local limit=$(($1 * patience)) name=$2 began=$SECONDS code=0
    shift 2
    timeout --kill-after=10 "$limit" "$@" > "$scratch/figures" 2> "$out/$name.log" || code=$?
    grep '^{' "$scratch/figures" >> "$out/figures.jsonl"
    grep -v '^{' "$scratch/figures" >> "$out/$name.log"
    printf '{"part": "%s", "exit": %d, "seconds": %d}\n' "$name" "$code" $((SECONDS - began)) >> "$out/figures.jsonl"
    echo "$name: $((SECONDS - began)) s, exit $code" >&2
}

[ -n "$cpu" ] || part 150 tests python -m pytest -m gpu -q tests/gpu tests/gpu_simulated
part 30 product python recipes/gpu/measure.py product --scratch "$scratch" $cpu
part 60 balance python recipes/gpu/measure.py balance --scratch "$scratch" $cpu
part 60 cluster python recipes/gpu/measure.py cluster --scratch "$scratch" $cpu
part 120 embed python recipes/gpu/measure.py embed --scratch "$scratch" $cpu
part 60 distill python recipes/gpu/measure.py distill --scratch "$scratch" $cpu
part 30 loss python recipes/gpu/measure.py loss --scratch "$scratch" $cpu
part 60 evaluate python recipes/gpu/measure.py evaluate --scratch "$scratch" $cpu
python recipes/gpu/table.py "$out/figures.jsonl" | tee "$out/table.md"
grep -q '"exit": [^0]' "$out/figures.jsonl" && { echo "Some parts failed; their logs are in $out." >&2; exit 1; }
exit 0
