#!/usr/bin/env bash
# From two GGUF files to the shipped spec of Qwen2.5-Coder-1.5B: see train/README.md.
set -euo pipefail
run=runs/qwen2.5-coder-1.5b
ship=checkpoints/qwen2.5-coder-1.5b
verifier=qwen2.5-coder-1.5b-instruct-q4_k_m.gguf
draft="prompt_lookup+int4:qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"

viasd capture --out "$run/traces-fit" --verifier "$verifier" --draft none --limit 213 --max-new-tokens 128 --batch-size 40
python train/self_prompts.py --per-opening 8 --seed 7000 --out "$run/self_prompts.jsonl"
viasd capture --out "$run/traces-self" --verifier "$verifier" --draft none --prompts "$run/self_prompts.jsonl" --split null \
    --limit 180 --max-new-tokens 128 --batch-size 40
# Gates learn from prompts that the slim verifier was not trained on: it knows those answers too well.
python train/self_prompts.py --per-opening 30 --seed 9000 --out "$run/gate_prompts.jsonl"
viasd capture --out "$run/traces-gates" --verifier "$verifier" --draft "$draft" --prompts "$run/gate_prompts.jsonl" \
    --split null --limit 64 --max-new-tokens 64 --batch-size 64
viasd fit --config configs/fit/qwen2.5-coder-1.5b.yaml --gate_folders "[$run/traces-gates]"
viasd calibrate --fit "$run/fit" --out "$run/calibrate" --max-loss 0.1 --confidence 0.95 --limit 40 --max-new-tokens 32 \
    --fractions '[0.1]' --dtype bfloat16
viasd export --calibrate "$run/calibrate" --out "$ship/routing.json" --dtype bfloat16
viasd bench --spec "$ship/routing.json" --split test --limit 20 --max-new-tokens 64 --json "$run/bench.json"
viasd export --calibrate "$run/calibrate" --out "$ship/routing.json" --dtype bfloat16 --evidence "$run/bench.json"
viasd validate "$ship/routing.json"
