#!/usr/bin/env bash
# From the trained drafter to the shipped spec: see train/README.md.
set -euo pipefail
run=runs/smollm2-135m
ship=checkpoints/smollm2-135m
draft="prompt_lookup+$ship/draft"

viasd capture --out "$run/traces-fit" --draft "$draft" --max-new-tokens 128 --batch-size 48
# Gates learn from prompts that neither drafter nor slim verifier was trained on: both know those answers too well.
python train/self_prompts.py --per-opening 30 --seed 9000 --out "$run/gate_prompts.jsonl"
viasd capture --out "$run/traces-gates" --draft "$draft" --prompts "$run/gate_prompts.jsonl" --split null \
    --limit 240 --max-new-tokens 96 --batch-size 48
viasd fit --config configs/fit/smollm2-135m.yaml --gate_folders "[$run/traces-gates]"
viasd calibrate --fit "$run/fit" --out "$run/calibrate" --max-loss 0.02 --confidence 0.95 --max-new-tokens 24 \
    --fractions '[0.05, 0.12]' --dtype bfloat16
viasd export --calibrate "$run/calibrate" --out "$ship/routing.json" --dtype bfloat16
viasd bench --spec "$ship/routing.json" --split test --limit 30 --max-new-tokens 64 --json "$run/bench.json"
viasd export --calibrate "$run/calibrate" --out "$ship/routing.json" --dtype bfloat16 --evidence "$run/bench.json"
viasd validate "$ship/routing.json"
