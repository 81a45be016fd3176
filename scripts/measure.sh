#!/usr/bin/env bash
# Makes five of the records behind the README's tables anew, and all tables (docs/benchmarks.md says which); about half an
# hour on two idle cores. Commit first, and leave the machine alone. VLLM=/path/to/vllm adds vLLM to the peers
# (benchmarks/servers.py says how to have its CPU build).
set -euo pipefail
source "$(dirname "$0")/environment.sh" dev
[ -z "$(git status --porcelain --untracked-files=no -- . :!benchmarks/results)" ] || { echo "commit first: records name a commit"; exit 1; }
python=.venv/bin/python
peers=(--server kvrelay-colocated --server kvrelay-1P1D ${VLLM:+--server vllm})

$python benchmarks/transport.py
$python benchmarks/interference.py
$python benchmarks/disaggregation_map.py
$python benchmarks/disaggregation.py --rounds 3 --requests 6 --concurrency 2 --output-tokens 48
$python benchmarks/peers.py "${peers[@]}"
$python scripts/readme_tables.py
