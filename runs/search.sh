#!/usr/bin/env bash
# The tiny agent in the embedded Deep Search world: ID and both OOD splits against its warm start; 6 minutes on two cores.
set -euo pipefail
out=out/search
world="--env search --env_args entities=400 syllables=20 topk=1"
accelerate launch train.py $world --out $out --iterations 150 --mini_batches 1 --demonstrations 10000 --slip 0.2 \
    --eval_every 25 --checkpoint_every 50 --max_step_tokens 48 "$@"
python eval.py --compare $out/first_policy $out/checkpoint-000150 --split eval ood_comp ood_hops \
    --json $out/compared.json --episodes $out/compared.jsonl
