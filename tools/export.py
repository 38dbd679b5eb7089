"""A finished run as a folder to publish: the policy, its tokenizer, and a model card with the run's numbers.

    python -m tools.export out/house           the last policy, to out/house/export
    python -m tools.export out/house --best    the policy with the best evaluation

Nothing is uploaded. `hf upload OWNER/NAME out/house/export` does that, or `HfApi().upload_folder`.
"""

import argparse
import json
import os
import shlex
import shutil
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from config import TrainConfig
from engine.checkpoint import SHARDS, CheckpointError, checkpoint_path, verify_checkpoint
from engine.files import CHECKSUMS, own_and_foreign, read_json, write_checksums
from eval import table

OF_TRAINING = {"optimizer.pt", "state.json", SHARDS, CHECKSUMS}  # what only training needs of a checkpoint

TEXT = """
# {title}

A language model that acts in the text world `{env}`. In every step it writes a line `Thought:` and a line `Action:`,
and reads the observation. It was trained from {base} with {method}. It is the policy after iteration {iteration} of
{iterations}, {choice}.

## Evaluation

Success in {episodes} held-out tasks (split `{split}`), {success:.1f} %, 95 % Wilson interval [{low:.1f}, {high:.1f}];
sampled at temperature {temperature}.

{table}

## How it was made

Seed {seed}, {ranks} process(es), commit `{commit}`. Command:

{command}

All settings:

{settings}

## Use

`AutoModelForCausalLM.from_pretrained` and `PreTrainedTokenizerFast.from_pretrained` open this folder. The first turn of
the chat is the system turn with the world's instructions. The second is the first observation. In training a response
had at most {max_step_tokens} tokens, and an episode at most {max_tokens}.

## Limits

- It was trained and evaluated in one world. Nothing is known about other worlds or other texts.
- This is one run with one seed. The interval is over tasks. Another seed gives another policy.
- {selection}
- The reward is the outcome of an episode. Thoughts got no reward, and need not be the reason for an action.
- It can repeat the errors of the model that it was trained from. That model's licence holds.
"""

CHOSEN = "It was chosen by this evaluation among the policies of the run, so its number is too high on average."


def export(run: Path, best: bool = False, licence: str = "") -> Path:
    """Write RUN/export and return it. Raises CheckpointError if the run is unfinished or the policy damaged.

    Only files that an earlier export wrote, and nobody has changed since, are replaced. The card is written beside
    another README.md. Raises CheckpointError if there is another file in the place of one of the policy.
    """
    try:
        about, result = (read_json(run / name) for name in ("config.json", "result.json"))
        card = model_card(about, result, best, licence)
        source = run / "best" if best else checkpoint_path(run, about["config"]["iterations"])
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{run} holds no finished run ({error}); finish it with train.py --resume") from error
    verify_checkpoint(source)
    folder, aside = run / "export", run / ".export.partial"
    own, foreign = own_and_foreign(folder)
    if clash := foreign & ({"README.new.md", *(path.name for path in source.iterdir())} - OF_TRAINING):
        raise CheckpointError(f"{folder / min(clash)} was not written by an export; move it, and run this again")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source, aside, symlinks=True, ignore=lambda _, names: OF_TRAINING & {*names})
    card.save(aside / ("README.new.md" if "README.md" in foreign else "README.md"))
    write_checksums(aside)
    new = {path.name for path in aside.iterdir()}
    folder.mkdir(exist_ok=True)
    for name in new:
        os.replace(aside / name, folder / name)
    for name in own - new:  # files of an earlier policy
        (folder / name).unlink()
    aside.rmdir()
    return folder


def model_card(about: dict, result: dict, best: bool, licence: str) -> ModelCard:
    """The card: text, and metadata that the hub reads.

    about: config.json of the run.  result: its result.json.  licence: "" stands for MIT (tiny model) or "other".
    """
    config, summary = about["config"], result["best" if best else "after"]
    settings, base, tiny = TrainConfig(**config), config["policy"], config["policy"] == "tiny"
    method = f"{config['algorithm'].upper()}{' with EMPG' if config['empg'] else ''}"
    name = f"{config['env']}-{method.lower().replace(' with ', '-')}"
    evaluation = EvalResult(
        task_type="reinforcement-learning",
        dataset_type=config["env"],
        dataset_name=config["env"],
        dataset_split=settings.held_out,
        metric_type="success_rate",
        metric_name="success, share of tasks",
        metric_value=summary["success"],
        metric_args={"low": summary["success_low"], "high": summary["success_high"], "tasks": summary["episodes"]},
    )
    data = ModelCardData(
        model_name=name,
        license=licence or ("mit" if tiny else "other"),
        base_model=hub_id(base),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["reinforcement-learning", "agent", "react", *method.lower().split(" with "), config["env"]],
        eval_results=[evaluation],
    )
    origin = "a tiny model that imitates a scripted player" if tiny else f"`{' '.join(base.split()).replace('`', '')}`"
    words = {
        "title": name,
        "base": origin,
        "method": method,
        "iteration": summary["iteration"] if best else config["iterations"],
        "choice": "the best of its evaluations" if best else "the last",
        "split": settings.held_out,
        "success": 100 * summary["success"],
        "low": 100 * summary["success_low"],
        "high": 100 * summary["success_high"],
        "table": block(table({"before": result["before"], "this policy": summary})),
        "ranks": about["ranks"],
        "commit": about["git"] or "unknown",
        "command": block(shlex.join(["python", *about["argv"]])),
        "settings": block(json.dumps(config, indent=1)),
        "selection": CHOSEN if best else "The number is of the last policy of the run. No evaluation chose it.",
    }
    text = TEXT.format(**config | summary | words)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def hub_id(policy: str) -> str | None:
    """The policy if it can be the name of a model on the hub, else None."""
    try:
        validate_repo_id(policy)
    except HFValidationError:
        return None
    return None if policy == "tiny" or Path(policy).exists() else policy


def block(text: str) -> str:
    """The text as an indented block, which Markdown shows as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.export", description="Write RUN/export: a finished run's policy with a model card."
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--best", action="store_true", help="the policy with the best evaluation, not the last one")
    parser.add_argument("--license", default="", help="for the card; default: mit for the tiny model, else other")
    options = parser.parse_args()
    folder = export(options.run, options.best, options.license)
    print(f"{folder} is ready; to publish it: hf upload OWNER/NAME {shlex.quote(str(folder))}")


if __name__ == "__main__":
    main()
