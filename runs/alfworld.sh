#!/usr/bin/env bash
# The tiny agent on the real ALFWorld engine, in small rooms written here: seen and unseen rooms against its warm start.
# 3 minutes for the games, 28 on two cores for the rest. First: pip install --no-deps -r requirements-alfworld.txt
set -euo pipefail
games=out/alfworld_games out=out/alfworld
write() { [ -d $games/json_2.1.1/$1 ] || python -m worlds.alfworld_games --out $games --split $1 --games $2 --receptacles 6 --objects 6; }
write train 500 && write valid_seen 300 && write valid_unseen 300
world="--env alfworld --env_args max_steps=20 data=$games"
accelerate launch train.py $world --max_step_tokens 48 --max_tokens 3000 --out $out --iterations 120 --mini_batches 1 --demonstrations 5000 --slip 0.2 \
    --eval_split valid_unseen --eval_every 40 --checkpoint_every 20 "$@"
python eval.py --compare $out/first_policy $out/checkpoint-000120 --env_args data=$games --split valid_seen valid_unseen --tasks 300 \
    --json $out/compared.json --episodes $out/compared.jsonl
