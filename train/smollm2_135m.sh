#!/usr/bin/env bash
# From the trained drafter to the shipped spec: see train/README.md.
set -euo pipefail
run=runs/smollm2-135m
ship=checkpoints/smollm2-135m

viasd capture --out "$run/traces-fit" --draft "prompt_lookup+$ship/draft" --max-new-tokens 128 --batch-size 48
viasd fit --config configs/fit/smollm2-135m.yaml
viasd calibrate --fit "$run/fit" --out "$run/calibrate" --max-loss 0.02 --confidence 0.95 --max-new-tokens 24 \
    --fractions '[0.05, 0.12]'
viasd export --calibrate "$run/calibrate" --out "$ship/routing.json"
viasd bench --spec "$ship/routing.json" --split test --limit 30 --max-new-tokens 64 --json "$run/bench.json"
viasd export --calibrate "$run/calibrate" --out "$ship/routing.json" --evidence "$run/bench.json"
viasd validate "$ship/routing.json"
