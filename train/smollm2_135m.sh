#!/usr/bin/env bash
# From the trained drafter to the shipped specs: see train/README.md.
set -euo pipefail
run=runs/smollm2-135m
ship=checkpoints/smollm2-135m
draft="prompt_lookup+int8:$ship/draft"

# Gates learn from prompts that the drafter was not trained on: it knows those answers too well.
python train/self_prompts.py --per-opening 30 --seed 9000 --out "$run/gate_prompts.jsonl"
viasd capture --out "$run/traces-gates" --draft "$draft" --prompts "$run/gate_prompts.jsonl" --split null \
    --limit 240 --max-new-tokens 96 --batch-size 48 --draft-length 8
viasd fit --config configs/fit/low-bit.yaml --model.verifier smollm2-135m --out "$run/fit" \
    --data.folders "[$run/traces-gates]" --data.shares '{fit: 1.0, calibrate: 0.0, test: 0.0}' --data.validation_share 0.33

viasd calibrate --fit "$run/fit" --out "$run/calibrate" --max-loss 0.02 --confidence 0.95 --max-new-tokens 24 \
    --fractions '[0.05, 0.12]' --draft-length 8 --dtype bfloat16
viasd export --calibrate "$run/calibrate" --out "$ship/routing.json"
viasd bench --spec "$ship/routing.json" --split test --limit 30 --max-new-tokens 64 --json "$run/bench.json"
viasd export --calibrate "$run/calibrate" --out "$ship/routing.json" --evidence "$run/bench.json"
viasd validate "$ship/routing.json"

# The same with the verifier's layers read from disk for each of its passes.
viasd calibrate --fit "$run/fit" --out "$run/calibrate-offload" --max-loss 0.02 --confidence 0.95 --max-new-tokens 24 \
    --fractions '[0.05, 0.12]' --draft-length 12 --max-pending 48 --dtype bfloat16 --offload disk
viasd export --calibrate "$run/calibrate-offload" --out "$ship/offload.json"
viasd bench --spec "$ship/offload.json" --split test --limit 30 --max-new-tokens 64 --json "$run/bench-offload.json"
viasd export --calibrate "$run/calibrate-offload" --out "$ship/offload.json" --evidence "$run/bench-offload.json"
viasd validate "$ship/offload.json"
