"""What the lab's kept batch is trained with, by the code as it stands. The exercises of docs/lab.md run it.

    python -m docs.lab.batch                          the batch of the run in docs/lab/house
    python -m docs.lab.batch --no_empg                any flag of train.py; --out names the folder of another run

It plays no episode and trains nothing. It takes the episodes that the run kept through beats 2, 3 and 4 of train.py.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from config import TrainConfig, parse_config
from empg import step_entropy
from episode import collate, load_episodes
from train import assign_credit, score


def report(config: TrainConfig) -> dict:
    """The numbers that docs/lab.md explains, rounded to three digits. Raises OSError if the run kept no episodes."""
    kept = sorted(Path(config.out).glob("episodes/[0-9]*.jsonl"))
    if not kept:
        raise FileNotFoundError(f"{config.out} has no kept episodes; a run writes them to its folder episodes/")
    records = [json.loads(line) for line in kept[-1].read_bytes().splitlines()]
    batch = collate(load_episodes(kept[-1]))
    entropy, valid = step_entropy(batch.token_entropy, batch.step_ids)  # (B, S)
    valid = valid & batch.keep[:, None]
    now = assign_credit(config, batch, score(config, batch), entropy, valid)
    advantage, g = now.advantage, now.g[valid]  # (B, S), (steps of the batch,)
    then = pad_sequence([torch.tensor(record["modulation"]["advantage"]) for record in records], batch_first=True)
    last = valid & ~torch.nn.functional.pad(valid[:, 1:], (0, 1))  # (B, S), the last step of each episode
    equal = valid & (now.base == 0)[:, None]  # groups whose rewards are all equal
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
