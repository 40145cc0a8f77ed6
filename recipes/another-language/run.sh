#!/usr/bin/env bash
# A text tower of another language, on the stamps of Tux Paint (Debian's package tuxpaint-stamps-default, 81 MB):
#   bash recipes/another-language/run.sh [LANGUAGE]    French by default; minutes on 2 cores
# STAMPS names a folder of stamps that is there already.
set -euo pipefail
cd "$(dirname "$0")/../.."
source recipes/environment.sh
cd recipes/another-language

language=${1:-fr}
work=${WORK:-work-$language}
mkdir -p "$work"
if [ -z "${STAMPS:-}" ]; then
    (cd "$work" && [ -d package ] || { apt-get download tuxpaint-stamps-default && dpkg-deb -x tuxpaint-stamps-default_*.deb package; })
    STAMPS=$work/package/usr/share/tuxpaint/stamps
fi
export CLIPCID_WORK=$work/clipcid-work
python stamps.py "$STAMPS" "$work" "$language"

say() { printf '\n$ clipcid %s\n' "$*" >&2; clipcid "$@"; }
bash ../foreign-teacher/teacher.sh  # whose text tower was trained on English
teacher=../foreign-teacher/teacher
say embed "$work/pairs" --model "$teacher"
say distill --teacher "$teacher" --student "$work/student" --student-caption-key "$language.txt" --name "$language" \
    --steps 400 --batch-size 64 --val-fraction 0 --workers 0
say eval-zeroshot "$CLIPCID_WORK/distill/$language/student" "$work/test" --model "$teacher" --caption-key "$language.txt"
say eval-zeroshot "$teacher" "$work/test"
