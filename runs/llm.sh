#!/usr/bin/env bash
# A language model in a world: bash runs/llm.sh WORLD MODEL [flags of train.py]. Not run here. It trains with GRPO + EMPG;
# --no_empg, --algorithm dapo or both give the other methods. alfworld, webshop and search take batch, steps, learning rate,
# KL and number of optimizer steps from verl-agent's examples, without its penalty for invalid actions.
# The dry run: TRAIN="python -m tools.cost --processes 8 --mixed_precision bf16" bash runs/llm.sh house qwen1.5b
set -euo pipefail
world=${1:?house, alfworld, webshop or search} model=${2:?qwen1.5b, qwen7b, llama8b or qwen32b} && shift 2
launch="accelerate launch --config_file runs/accelerate/eight_gpus.yaml" often="--eval_every 5 --checkpoint_every 5"

case $world-$model in # what fits 8 GPUs of 80 GB; qwen32b: 4 machines of 8 GPUs of 141 GB
    house-qwen1.5b) fit="--micro_batch_tokens 16384" ;;
    alfworld-qwen1.5b | webshop-qwen1.5b) fit="--micro_batch_tokens 32768" ;;
    alfworld-qwen7b | webshop-qwen7b | webshop-llama8b) fit="--fsdp --micro_batch_tokens 16384" ;;
    alfworld-llama8b) fit="--fsdp --micro_batch_tokens 16384 --batch_size 16" ;;
    search-qwen7b) fit="--fsdp --micro_batch_tokens 16384 --batch_size 64" ;;
    search-llama8b) fit="--fsdp --micro_batch_tokens 16384 --batch_size 32" ;;
    search-qwen32b) fit="--fsdp --micro_batch_tokens 8192 --batch_size 16"
        launch="accelerate launch --config_file runs/accelerate/four_nodes_fsdp.yaml --machine_rank ${NODE:-0} \
            --main_process_ip ${HEAD:-127.0.0.1}" ;;
    *) echo "no preset for $model in $world" >&2 && exit 2 ;;
esac
case $model in
    qwen1.5b) policy=Qwen/Qwen2.5-1.5B-Instruct ;;
    qwen7b) policy=Qwen/Qwen2.5-7B-Instruct ;;
    qwen32b) policy=Qwen/Qwen2.5-32B-Instruct ;;
    llama8b) policy=meta-llama/Llama-3.1-8B-Instruct ;;
esac
case $world in
    house) batch="--tasks_per_iteration 16 --kl_coef 0.01 --mini_batches 1 --max_step_tokens 256 --max_tokens 8192"
        settings=(receptacles=20 objects=20 max_steps=40) ;;
    alfworld) batch="--tasks_per_iteration 16 --kl_coef 0.01 --mini_batches 16 --max_step_tokens 512 --max_tokens 16384 \
            --example --eval_split valid_unseen --eval_tasks 134 $often"
        settings=(restate_task=0 max_steps=50 "data=${ALFWORLD_DATA:?the folder that holds json_2.1.1, see alfworld-download}") ;;
    webshop) batch="--tasks_per_iteration 16 --kl_coef 0.01 --mini_batches 16 --max_step_tokens 512 --max_tokens 16384 \
            --example --eval_tasks 128 $often"
        settings=(max_steps=15 human_goals=1 "data=${WEBSHOP_DATA:?the folder that holds the product files of WebShop}") ;;
    search) batch="--tasks_per_iteration 256 --kl_coef 0.001 --mini_batches 8 --max_step_tokens 500 --max_tokens 8192 \
            --example --eval_tasks 512 $often"
        settings=(max_steps=4 "retriever=${RETRIEVER:?http://HOST:PORT of a search server}"
            "questions=${QUESTIONS:?a json, jsonl or parquet file, or a hub id}") ;;
esac
${TRAIN:-$launch train.py} --policy "${POLICY:-$policy}" --env "$world" --env_args "${settings[@]}" --out "out/${model}_$world" \
    --iterations 150 --group_size 8 --learning_rate 1e-6 --gradient_checkpointing $fit $batch "$@"
