#!/usr/bin/env bash
# From a fresh machine to the main job: eight questions through one prefill and one decode process.
# The watts are declared, not measured: on a host with NVML or RAPL the meter found there is used instead.
set -euo pipefail
source "$(dirname "$0")/environment.sh" ""
exec .venv/bin/python -m kvrelay demo --power-model idle_w=5,busy_w=20 --output results/demo.json "$@"
