#!/usr/bin/env bash
# Lint, types, import contracts and tests, on a machine that has Python >= 3.11 and nothing else.
#   bash tests/run.sh [pytest arguments]      default: -m "not slow and not gpu", two tests at a time
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh
unset PYTHONDONTWRITEBYTECODE  # the package is compiled once, not by every process of a test

ruff check .
ruff format --check .
mypy
lint-imports
deptry clipcid_cli
if [ $# -eq 0 ]; then
    # Most of a test of the command line is PyTorch starting, on one core.
    set -- -m "not slow and not gpu" -n 2 --dist worksteal
    if python -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
        # From 3.12 on Python itself notes which lines run, for a tenth more time.
        COVERAGE_CORE=sysmon coverage run -m pytest "$@"
        coverage combine --quiet
        exec coverage report --skip-covered
    fi
fi
exec pytest "$@"
