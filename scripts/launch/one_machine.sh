#!/usr/bin/env bash
# Runs a command on all GPUs of this machine and starts it again after a crash.
#
#   scripts/launch/one_machine.sh python -m experiments.ppo_max --config configs/ppo_max.py:paper_en
#
# Status 130 is a stop that was asked for (Ctrl-C, SIGTERM): the state is saved, and the script ends.
# RESTARTS (3) is how often it tries again, PAUSE (10) how many seconds it waits before that.
set -uo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: $0 COMMAND..." >&2
  exit 2
fi
# JAX takes 75% of the memory by default; the preflight names what a run needs.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

for ((attempt = 0; attempt <= ${RESTARTS:-3}; attempt++)); do
  "$@" &
  pid=$!
  signalled="" stopped=""
  trap 'signalled=yes stopped=yes; kill -TERM "$pid" 2>/dev/null' INT TERM
  # A signal ends `wait` early, with its own status: wait again for that of the command.
  while wait "$pid"; status=$?; [[ -n $signalled ]]; do signalled=""; done
  trap - INT TERM
  if [[ $status -eq 0 || $status -eq 130 || -n $stopped ]]; then
    exit "$status"
  fi
  echo "attempt $((attempt + 1)) ended with status $status" >&2
  sleep "${PAUSE:-10}"
done
exit "$status"
