#!/usr/bin/env bash
# Runs other people's clients against a kvrelay server, each in an environment of its own, and prints a table.
#
#   bash scripts/clients.sh                       all of them, against a server started for it
#   bash scripts/clients.sh --url http://127.0.0.1:8000 vllm aiperf
#
# Environments stay in KVRELAY_CLIENTS (default: kvrelay-clients in the temporary directory); vLLM's alone is 3 GB.
# kvrelay itself runs in .venv, or, if PYTHON names one, in that Python's environment.
set -euo pipefail
if [ -n "${PYTHON:-}" ]; then cd "$(dirname "$0")/.."; else source "$(dirname "$0")/environment.sh" ""; fi
export PYTHONPATH="engine:kernels${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-.venv/bin/python}" scripts/clients.py "$@"
