#!/usr/bin/env bash
# A language model in Deep Search: bash runs/llm_search.sh qwen7b|qwen32b|llama8b [flags]. Not run here.
# GRPO + EMPG; for the others --no_empg, --algorithm dapo, or both. Batch, steps, learning rate, KL and number of optimizer
# steps are those of verl-agent's search example; its penalty for invalid actions is left out.
# What it takes: LAUNCH="accelerate launch --cpu --mixed_precision bf16" bash runs/llm_search.sh qwen32b --dry_run 32
set -euo pipefail
model=${1:?qwen7b, qwen32b or llama8b} && shift
launch="accelerate launch --config_file runs/accelerate/eight_gpus.yaml"
case $model in # qwen32b: 4 nodes of 8 GPUs of 141 GB; the others: 8 GPUs of 80 GB
    qwen7b) policy=Qwen/Qwen2.5-7B-Instruct scale="--micro_batch_tokens 16384 --batch_size 64" ;;
    qwen32b) policy=Qwen/Qwen2.5-32B-Instruct scale="--micro_batch_tokens 8192 --batch_size 16 --gpu_memory 141"
        launch="accelerate launch --config_file runs/accelerate/four_nodes_fsdp.yaml --machine_rank ${NODE:-0} \
            --main_process_ip ${HEAD:-127.0.0.1}" ;;
    llama8b) policy=meta-llama/Llama-3.1-8B-Instruct scale="--micro_batch_tokens 16384 --batch_size 32" ;;
    *) echo "no preset for $model" >&2 && exit 2 ;;
esac
${LAUNCH:-$launch} train.py --policy "${POLICY:-$policy}" --fsdp \
    --env search --questions "${QUESTIONS:?a json, jsonl or parquet file, or a hub id}" \
    --retriever "${RETRIEVER:?http://HOST:PORT of a search server}" --env_args max_steps=4 --example \
    --out out/${model}_search --iterations 150 --tasks_per_iteration 256 --group_size 8 --learning_rate 1e-6 \
    --kl_coef 0.001 --mini_batches 8 --max_step_tokens 500 --max_tokens 8192 --gradient_checkpointing $scale \
    --eval_tasks 512 --eval_every 5 --checkpoint_every 5 "$@"
