#!/usr/bin/env bash
# From a fresh machine to green tests. Arguments go to pytest; --slow runs what is otherwise sampled.
set -euo pipefail
source "$(dirname "$0")/environment.sh" dev

phase() {
  local start=$SECONDS
  echo "== $*"
  "$@"
  echo "== $((SECONDS - start)) s"
}

phase .venv/bin/ruff check .
phase .venv/bin/ruff format --check .
phase .venv/bin/mypy
phase .venv/bin/python -m pytest "$@"
