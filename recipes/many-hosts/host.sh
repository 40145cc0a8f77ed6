#!/usr/bin/env bash
# What every host runs, at the same time, with the same settings: the chain under torchrun, one step after another.
# Settings are environment variables, so that srun, ssh or a pod's specification can hand them on:
#   HEAD       a name or address of one of the hosts, the same for all
#   PORT       the first of four free ports on it                         29400
#   HOSTS      how many hosts                                             1
#   PROCESSES  processes on each host, one for each GPU                   gpu
#   JOB        a word no other job uses that meets at HEAD:PORT           clipcid
#   DATA TEACHER STUDENT KEEP                                             what the README's chain is told
#   CLUSTER_FLAGS DISTILL_FLAGS           further flags, divided by spaces; --features joint, and --preset cid, which reads
#                                         the clusters
# The work directory (CLIPCID_WORK), DATA and models that are folders must be the same files on all hosts.
set -euo pipefail

: "${HEAD:?a name or address of the host where all meet}" "${DATA:?}" "${TEACHER:?}" "${STUDENT:?}" "${CLIPCID_WORK:?}"
port=${PORT:-29400}
read -ra cluster_flags <<<"${CLUSTER_FLAGS:---features joint}"
read -ra distill_flags <<<"${DISTILL_FLAGS:---preset cid}"

# Each step meets at a port of its own: a host that is through early must not meet the store of the step before.
# A signal is passed on: this shell is the first process of a pod, and has 30 s. Then `wait` ends, before torchrun does, which
# leaves with 1 whatever its processes answered: 143 says that they were asked to end.
together() {
    local child status=0 asked=
    torchrun --nnodes "${HOSTS:-1}" --nproc-per-node "${PROCESSES:-gpu}" \
        --rdzv-backend c10d --rdzv-endpoint "$HEAD:$port" --rdzv-id "${JOB:-clipcid}-$1" \
        -m clipcid_cli "$@" &
    child=$!
    trap 'asked=yes; kill -TERM "$child" 2>/dev/null || true' TERM INT # SLURM has sent it to torchrun, too
    wait "$child" || status=$?
    if kill -0 "$child" 2>/dev/null; then
        status=0
        wait "$child" || status=$?
    fi
    trap - TERM INT
    [ -z "$asked" ] || exit 143
    port=$((port + 1))
    return "$status"
}

together embed "$DATA" --model "$TEACHER"
together balance --keep "${KEEP:-0.563}"
together cluster "${cluster_flags[@]}"
together distill --student "$STUDENT" "${distill_flags[@]}"
