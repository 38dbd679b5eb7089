"""A finished run as a folder to publish: the policy, its tokenizer, and a model card with the run's own numbers.

    python export.py out/house           the last policy, to out/house/export
    python export.py out/house --best    the one with the best evaluation

Nothing is sent. `hf upload OWNER/NAME out/house/export` does that, or `HfApi().upload_folder`.
"""

import argparse
import json
import shlex
import shutil
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from config import TrainConfig
from engine.checkpoint import CHECKSUMS, CheckpointError, checkpoint_path, verify_checkpoint
from eval import table

OF_TRAINING = {"optimizer.pt", "state.json", CHECKSUMS}  # files of a checkpoint that a reader of the policy needs not

TEXT = """
# {title}

A language model that acts in the text world `{env}`. In every step it writes a line `Thought:` and a line `Action:`,
and reads what the world answers. It was trained from {base} with {method}. It is the policy after iteration {iteration}
of {iterations}, {choice}.

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
the chat is the world's instructions as system text, the second its first observation. At most {max_step_tokens} tokens
a response and {max_tokens} tokens an episode were seen in training.

## Limits

- Trained and evaluated in one world. Nothing is known about others, or about other texts.
- One run with one seed. The interval is over tasks; another seed gives another policy.
- {selection}
- The reward is the outcome alone. Thoughts were not judged, and need not be the reason for an action.
- What the model that it was trained from says or does wrong, it can say or do too; that model's licence holds.
"""

CHOSEN = "It was chosen by this very evaluation among those of the run, so its number is too high on average."


def export(run: Path, best: bool = False, licence: str = "") -> Path:
    """Write RUN/export and return it. Raises CheckpointError if the run is not finished or its policy is damaged."""
    try:
        about, result = (json.loads((run / name).read_text()) for name in ("config.json", "result.json"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{run} holds no finished run ({error}); finish it with train.py --resume") from error
    config = about["config"]
    source = run / "best" if best else checkpoint_path(run, config["iterations"])
    verify_checkpoint(source)
    folder = run / "export"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in source.iterdir():
        if path.is_file() and path.name not in OF_TRAINING:
            shutil.copy(path, folder)
    model_card(about, result, best, licence).save(folder / "README.md")
    return folder


def model_card(about: dict, result: dict, best: bool, licence: str) -> ModelCard:
    """The card: metadata that the hub reads, and text.

    about: config.json of the run.  result: its result.json.  licence: "" is MIT for the tiny model, else "other".
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
        "selection": CHOSEN if best else "The number is of the last policy of the run, which was not chosen by it.",
    }
    text = TEXT.format(**config | summary | words)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def hub_id(policy: str) -> str | None:
    """The policy if it can be a model on the hub; None for a folder, for the tiny model, for any other text."""
    try:
        validate_repo_id(policy)
    except HFValidationError:
        return None
    return None if policy == "tiny" or Path(policy).exists() else policy


def block(text: str) -> str:
    """The text as an indented block, in which Markdown reads nothing."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description="Write RUN/export: a finished run's policy with a model card.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--best", action="store_true", help="the policy with the best evaluation, not the last one")
    parser.add_argument("--license", default="", help="for the card; default: mit for the tiny model, else other")
    options = parser.parse_args()
    try:
        folder = export(options.run, options.best, options.license)
    except CheckpointError as error:
        raise SystemExit(str(error)) from error
    print(f"{folder} is ready; to publish it: hf upload OWNER/NAME {shlex.quote(str(folder))}")


if __name__ == "__main__":
    main()
