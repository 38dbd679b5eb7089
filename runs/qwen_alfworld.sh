#!/usr/bin/env bash
# Qwen2.5-1.5B on 8 GPUs in the published ALFWorld games (alfworld-download), the paper's setting; not run here.
accelerate launch --num_processes 8 --mixed_precision bf16 train.py --policy Qwen/Qwen2.5-1.5B-Instruct \
    --env alfworld --data "${ALFWORLD_DATA:?the folder that holds json_2.1.1}" --env_args restate_task=0 \
    --out out/qwen_alfworld --learning_rate 1e-6 --kl_coef 0.01 --gradient_checkpointing --iterations 150 --mini_batches 1 \
    --tasks_per_iteration 16 --group_size 8 --micro_batch_tokens 32768 --max_step_tokens 256 --max_tokens 16384 \
    --eval_split valid_unseen --eval_tasks 134 "$@"
