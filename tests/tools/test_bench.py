"""The benchmark of the GPU runs, with a tiny model on a CPU: every figure is there and is a positive number."""

import math

import pytest
import torch

from tools.bench_rollout import Load, measure_gpu

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY = Load(
    SHAPE | {"num_key_value_heads": 2, "vocab_size": 1024, "tie_word_embeddings": True},
    torch.bfloat16,
    episodes=2,
    turns=2,
    step_tokens=4,
    context=512,
    rows=2,
)


@pytest.mark.usefixtures("no_precision_yet")
def test_every_figure_of_the_gpu_is_measured():
    result = {name: value for figures in measure_gpu(TINY, repeats=1) for name, value in figures.items()}
    assert result["turns an episode"] == 2
    assert all(math.isfinite(value) and value > 0 for value in result.values())
    shares = [value for name, value in result.items() if "share" in name]
    assert len(shares) == 2
    assert max(shares) < 1
