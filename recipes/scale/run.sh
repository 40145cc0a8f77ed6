#!/usr/bin/env bash
# What each step costs a row, measured at two sizes with 1 and 2 processes, and what 400 million rows would take:
#   bash recipes/scale/run.sh                          250,000 and 1,000,000 pairs, shards of 10,000
#   bash recipes/scale/run.sh --sizes 4M 16M           larger; 16M pairs take 33 GB of disk while they run
#   bash recipes/scale/run.sh --many-shards            50,000 shards of 10 pairs through the whole chain
# Every command runs under `ulimit -n 1024`. `python recipes/scale/chain.py --help` lists all options.
set -euo pipefail
cd "$(dirname "$0")/../.."
source recipes/environment.sh
exec python recipes/scale/chain.py "$@"
