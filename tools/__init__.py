"""Commands beside training: `python -m tools.cost`, `tools.bench`, `tools.bench_scale`, `tools.export`."""
