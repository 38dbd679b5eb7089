"""The benchmark of the GPU runs, with a tiny model on a CPU: every figure is there and is a positive number."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from tools import bench_gpu
from tools.bench_gpu import PARTS, measure_gpu
from tools.bench_rollout import Load

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
def test_every_figure_of_the_gpu_is_measured(monkeypatch):
    copied = partial(bench_gpu.copy_bandwidth, size=2**20)  # a GB takes longer than all the rest
    monkeypatch.setattr(bench_gpu, "copy_bandwidth", copied)
    figures = list(measure_gpu(TINY, replace(TINY, episodes=8), repeats=1))
    result = {name: value for part in figures for name, value in part.items()}
    assert result["turns an episode"] == 2
    assert all(math.isfinite(value) for value in result.values())
    assert {name[-7:] for name, value in result.items() if value <= 0} == {"capture"}  # a CPU captures no graphs
    shares = [value for name, value in result.items() if "share" in name]
    assert len(shares) == 2
    for piece in ("update, seconds of", "decode step, ms of"):
        parts = [name.removeprefix(piece).strip() for name in result if name.startswith(piece)]
        assert {"attention", "casts", "matrix products", "the rest"} <= {*parts} <= {*PARTS, "the rest"}
    assert {"update, seconds of optimizer", "update, seconds of head and its recomputation"} <= {*result}
    loop = [part for part in figures if "sampler over generate loop" in part]
    assert len(loop) == 2  # a figure after each turn
