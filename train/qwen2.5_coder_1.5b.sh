#!/usr/bin/env bash
# From two GGUF files to the shipped spec of Qwen2.5-Coder-1.5B: see train/README.md.
set -euo pipefail
run=runs/qwen2.5-coder-1.5b
ship=checkpoints/qwen2.5-coder-1.5b
verifier=qwen2.5-coder-1.5b-instruct-q4_k_m.gguf
draft="prompt_lookup+int4:qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"

# Nothing is trained, neither the slim verifier nor a drafter: gates may learn from any prompts that nothing is tested on.
viasd capture --out "$run/traces-gates" --verifier "$verifier" --draft "$draft" --limit 56 --max-new-tokens 48 --batch-size 14 \
    --draft-length 8
viasd fit --config configs/fit/low-bit.yaml --model.verifier "$verifier" --out "$run/fit" \
    --data.folders "[$run/traces-gates]" --data.shares '{fit: 1.0, calibrate: 0.0, test: 0.0}' --data.validation_share 0.33
viasd calibrate --fit "$run/fit" --out "$run/calibrate" --max-loss 0.1 --confidence 0.95 --limit 40 --max-new-tokens 32 \
    --fractions '[0.1]' --draft-length 8 --dtype bfloat16
viasd export --calibrate "$run/calibrate" --out "$ship/routing.json"
viasd bench --spec "$ship/routing.json" --split test --limit 12 --max-new-tokens 48 --json "$run/bench.json"
viasd export --calibrate "$run/calibrate" --out "$ship/routing.json" --evidence "$run/bench.json"
viasd validate "$ship/routing.json"

# The same with the verifier's layers read from disk for each of its passes: two hours, as a full pass takes over a second.
viasd calibrate --fit "$run/fit" --out "$run/calibrate-offload" --max-loss 0.1 --confidence 0.95 --limit 40 --max-new-tokens 32 \
    --fractions '[0.1]' --draft-length 12 --max-pending 48 --dtype bfloat16 --offload disk
viasd export --calibrate "$run/calibrate-offload" --out "$ship/offload.json"
viasd bench --spec "$ship/offload.json" --split test --limit 9 --max-new-tokens 32 --json "$run/bench-offload.json" \
    --methods autoregressive,speculative,three_tier,self_speculative
viasd export --calibrate "$run/calibrate-offload" --out "$ship/offload.json" --evidence "$run/bench-offload.json"
viasd validate "$ship/offload.json"
