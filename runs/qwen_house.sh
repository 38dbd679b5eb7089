#!/usr/bin/env bash
# Qwen2.5-1.5B on 8 GPUs in the House world; not run here.
accelerate launch --num_processes 8 --mixed_precision bf16 train.py --policy Qwen/Qwen2.5-1.5B-Instruct \
    --out out/qwen_house --learning_rate 1e-6 --kl_coef 0.01 --gradient_checkpointing --iterations 150 --mini_batches 1 \
    --tasks_per_iteration 16 --group_size 8 --micro_batch_tokens 16384 --max_step_tokens 256 --max_tokens 8192 \
    --env_args receptacles=20 objects=20 max_steps=40 "$@"
