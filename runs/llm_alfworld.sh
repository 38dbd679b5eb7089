#!/usr/bin/env bash
# A language model in the published ALFWorld games: bash runs/llm_alfworld.sh qwen1.5b|qwen7b|llama8b [flags]. Not run here.
# GRPO + EMPG; for the others --no_empg, --algorithm dapo, or both. Batch, steps, learning rate, KL and number of optimizer
# steps are those of verl-agent's ALFWorld example; its penalty for invalid actions is left out.
# What it takes: LAUNCH="accelerate launch --cpu --mixed_precision bf16" bash runs/llm_alfworld.sh qwen7b --dry_run 8
set -euo pipefail
model=${1:?qwen1.5b, qwen7b or llama8b} && shift
launch="accelerate launch --config_file runs/accelerate/eight_gpus.yaml"
case $model in # 8 GPUs of 80 GB
    qwen1.5b) policy=Qwen/Qwen2.5-1.5B-Instruct scale="--micro_batch_tokens 32768" ;;
    qwen7b) policy=Qwen/Qwen2.5-7B-Instruct scale="--fsdp --micro_batch_tokens 16384" ;;
    llama8b) policy=meta-llama/Llama-3.1-8B-Instruct scale="--fsdp --micro_batch_tokens 16384" ;;
    *) echo "no preset for $model" >&2 && exit 2 ;;
esac
${LAUNCH:-$launch} train.py --policy "${POLICY:-$policy}" \
    --env alfworld --data "${ALFWORLD_DATA:?the folder that holds json_2.1.1, see alfworld-download}" \
    --env_args restate_task=0 max_steps=50 --example --out out/${model}_alfworld --iterations 150 \
    --tasks_per_iteration 16 --group_size 8 --learning_rate 1e-6 --kl_coef 0.01 --mini_batches 16 \
    --max_step_tokens 512 --max_tokens 16384 --gradient_checkpointing $scale \
    --eval_split valid_unseen --eval_tasks 134 --eval_every 5 --checkpoint_every 5 "$@"
