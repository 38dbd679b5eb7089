#!/usr/bin/env bash
# The tiny agent in a shop of 60 products: both held-out splits against its warm start; 17 minutes on two cores.
set -euo pipefail
out=out/webshop
world="--env webshop --env_args products=60 goals=30"
accelerate launch train.py $world --max_step_tokens 48 --max_tokens 3000 --out $out --iterations 150 --mini_batches 1 --demonstrations 4000 --slip 0.1 \
    --eval_every 25 --checkpoint_every 50 "$@"
python eval.py --compare $out/first_policy $out/checkpoint-000150 --split eval test \
    --json $out/compared.json --episodes $out/compared.jsonl
