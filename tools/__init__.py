"""Commands beside training: `python -m tools.cost`, `tools.bench`, `tools.speed`, `tools.export`, `tools.gguf`."""
