#!/usr/bin/env bash
# Runs a command as N processes of one job on this machine, over loopback: a rehearsal of many machines.
#
#   scripts/launch/local.sh 2 python -m experiments.sft --config configs/sft.py:tiny
#
# On CPU, devices per process come from XLA_FLAGS=--xla_force_host_platform_device_count=4.
# The job ends when all processes have ended, with status 0 if all ended so. When one fails the
# others find out by themselves. Ctrl-C and SIGTERM go to all: they save and stop.
set -uo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 PROCESSES COMMAND..." >&2
  exit 2
fi
export JAX_NUM_PROCESSES=$1
shift
if [[ -z ${JAX_COORDINATOR_ADDRESS:-} ]]; then
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  export JAX_COORDINATOR_ADDRESS="127.0.0.1:$port"
fi

pids=()
for ((id = 0; id < JAX_NUM_PROCESSES; id++)); do
  JAX_PROCESS_ID=$id "$@" --distributed &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' INT TERM

status=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
  wait "$pid" || status=$?
done
exit "$status"
