"""What the lab's kept batch is trained with, by the code as it stands. The exercises of docs/lab.md run it.

    python -m docs.lab.batch                          the batch of the run in docs/lab/house
    python -m docs.lab.batch --normalization rank     any flag of train.py; --out names the folder of another run

It plays no episode and trains nothing: `train.assign_credit` gets the episodes that the run kept.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from config import TrainConfig, parse_config
from empg import rewards_differ
from episode import Episode, collate
from train import assign_credit


def report(config: TrainConfig) -> dict:
    """The numbers that docs/lab.md explains, rounded to three digits. Raises OSError if the run kept no episodes."""
    kept = sorted(Path(config.out).glob("episodes/[0-9]*.jsonl"))
    if not kept:
        raise FileNotFoundError(f"{config.out} has no kept episodes; a run writes them to its folder episodes/")
    records = [json.loads(line) for line in kept[-1].read_text().splitlines()]
    names = [field.name for field in dataclasses.fields(Episode)]
    batch = collate([Episode(**{name: record[name] for name in names}) for record in records])
    now = assign_credit(config, batch)
    valid, advantage, g = now.valid, now.advantage, now.g[now.valid]  # (B, S), (B, S), (steps of the batch,)
    then = pad_sequence([torch.tensor(record["modulation"]["advantage"]) for record in records], batch_first=True)
    last = valid & ~torch.nn.functional.pad(valid[:, 1:], (0, 1))  # (B, S), the last step of each episode
    equal = valid & ~rewards_differ(batch.reward, config.group_size)[:, None]  # groups without a base advantage
    numbers = {
        "base_max": now.base.max(),
        "entropy_max": now.entropy[valid].max(),
        "g_min": g.min(),
        "g_max": g.max(),
        "g_std": g.std(correction=0),
        "advantage_std": advantage[valid].std(correction=0),
        "equal_last": advantage[equal & last].mean(),
        "equal_others": advantage[equal & ~last].mean(),
        "difference": (advantage - then)[valid].abs().mean(),
        "sign_changes": (advantage.sign() != then.sign())[valid].float().mean(),
    }
    counts = {"episodes": len(records), "steps": int(valid.sum()), "solved": int(batch.reward.sum())}
    return counts | {name: round(float(value), 3) + 0.0 for name, value in numbers.items()}  # never -0


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(TrainConfig, argv, {"out": "docs/lab/house"})
    try:
        print(json.dumps(report(config), indent=1))
    except OSError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
