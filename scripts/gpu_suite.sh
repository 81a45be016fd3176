#!/usr/bin/env bash
# Everything that wants a GPU, from the source tree and without an install: correctness, then speed. Goes on
# after a failure, keeps every log in $OUT, and stays under nine minutes. `--dry-run` goes through the
# interpreter and the compiler instead, where no GPU is.
set -u
cd "$(dirname "$0")/.."
dry=${1:-}
# build/gpu: where a bare image lacks the engine's small dependencies, put them there for its Python:
#   pip install --target build/gpu --python-version 3.12 --only-binary :all: msgspec pyzmq prometheus-client psutil
export PYTHONPATH=engine:kernels:tests:build/gpu OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"
python=${PYTHON:-python3}
failed=()

step() { # name, seconds, command...
  local name=$1 limit=$2
  shift 2
  echo "== $name: $*"
  local begun=$SECONDS
  timeout "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
  local status=${PIPESTATUS[0]}
  echo "== $name: status $status after $((SECONDS - begun)) s"
  [ "$status" -eq 0 ] || failed+=("$name")
}

if [ "$dry" = --dry-run ]; then
  export OMP_NUM_THREADS=1
  step compile 300 "$python" -W ignore -m kvrelay_kernels.compile_gate --sm 90 --head-dim 128 --group 4
  step correctness 300 env TRITON_INTERPRET=1 "$python" -m pytest -q -p no:cacheprovider tests/kernels \
    -k "match_the_keys or (up_to_ties and tree) or any_chunk_offset"
  step decode_graphs 200 "$python" benchmarks/decode_graphs.py --dry-run --batches 1 3 --steps 6
  step attention_gpu 300 env TRITON_INTERPRET=1 "$python" benchmarks/attention_gpu.py --dry-run
else
  nvidia-smi || true
  # a bare image may lack pytest; the benchmark gates itself, so its absence costs no correctness check
  if "$python" -c 'import pytest, hypothesis' 2>/dev/null; then
    step correctness 120 "$python" -m pytest -q -p no:cacheprovider tests/kernels/test_attention.py \
      tests/kernels/test_kv_block_stats.py tests/kernels/test_select_blocks.py -k triton
  else
    echo "== correctness: no pytest or hypothesis here; the benchmark's own gates stand alone"
  fi
  if "$python" -c 'import kvrelay.runner, kvrelay.experiments.record' 2>/dev/null; then
    step decode_graphs 150 "$python" benchmarks/decode_graphs.py
  else
    echo "== decode_graphs: NOT RUN, the engine's dependencies are not here (see build/gpu above)"
    failed+=(decode_graphs)
  fi
  step attention_gpu 270 "$python" benchmarks/attention_gpu.py --limit-s 200
fi

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all passed"
