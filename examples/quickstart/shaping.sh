#!/usr/bin/env bash
# The quickstart with response lengths and entropies shaped by task: a reward for lengths inside a trapezoid, and a
# penalty that pulls each task's mean entropy back into its band. Data, model and warm start are the quickstart's.
set -euo pipefail
exec bash "$(dirname "$0")/run.sh" \
  run.folder=runs/quickstart-shaping \
  reward.length_weight=0.1 \
  'reward.length_bands={count: [4, 7, 11, 16], read: [4, 7, 12, 16], box: [8, 12, 17, 22], sum: [4, 7, 12, 16], pick: [4, 7, 11, 16]}' \
  algorithm.entropy.coefficient=0.02 \
  'algorithm.entropy.bands={count: [0.05, 0.4], read: [0.1, 0.4], box: [0.05, 0.4], sum: [0.1, 0.4], pick: [0.05, 0.4]}' \
  "$@"
