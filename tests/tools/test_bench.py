"""The benchmark of the GPU runs, with a tiny model on a CPU: every figure is there and is a positive number."""

import math
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState

from tools import bench_rollout
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


@pytest.fixture
def no_precision_yet(monkeypatch):
    """Accelerate allows one mixed precision in a process, and other tests have theirs."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("no_precision_yet")
def test_every_figure_of_the_gpu_is_measured(monkeypatch):
    copied = partial(bench_rollout.copy_bandwidth, size=2**20)  # a GB takes longer than all the rest
    monkeypatch.setattr(bench_rollout, "copy_bandwidth", copied)
    result = {name: value for figures in measure_gpu(TINY, repeats=1) for name, value in figures.items()}
    assert result["turns an episode"] == 2
    assert all(math.isfinite(value) and value > 0 for value in result.values())
    shares = [value for name, value in result.items() if "share" in name]
    assert len(shares) == 2
    assert max(shares) < 1
