"""The credit page: one HTML file that shows what every step of a run was trained with.

    python -m paper.page out/house                               writes out/house/credit.html
    python -m paper.page out/house --iterations 20 60 --out page.html

It reads the kept episodes, RUN/episodes/*.jsonl, and those with measured true credit, RUN/credit/*.jsonl.
The page opens without a server and without a network.

The texts come from worlds and models, so they may be hostile. The page holds them as JSON, which jinja2's `tojson`
escapes, and its script shows them as text only. The Content-Security-Policy allows this one script, by its hash.
"""

import math
import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined

from engine.files import RecordError, parse_json, read_json, replace_file

TEMPLATE = Path(__file__).with_name("page.html")
FOLDERS = {"credit": "true credit measured", "episodes": "training batch"}  # of a run -> label on the page
NUMBERS = ("entropy", "norm_entropy", "g", "f", "advantage")  # of a step, under "modulation" in a kept episode
SETTINGS = ("env", "algorithm", "empg", "k", "k_future", "zeta", "group_size")  # flags of the run that the page shows


class Texts(dict):
    """Numbers the distinct texts. The same tokens and observations appear many times on a page."""

    def number(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is not a text")
        return self.setdefault(text, len(self))


def read_run(run: Path, iterations: Sequence[int] = (), max_groups: int = 8) -> dict:
    """What the page shows of a run, as JSON types: numbers are rounded, texts are indices of the list "texts".

    iterations: empty means all that were kept.  max_groups: only the first groups of a batch are shown.
    Raises OSError or ValueError, in one line, if there is nothing to show or a file cannot be read.
    """
    files = {(int(path.stem), folder): path for folder in FOLDERS for path in (run / folder).glob("[0-9]*.jsonl")}
    kept = sorted({iteration for iteration, _ in files})
    if not run.is_dir():
        raise ValueError(f"{run}: no such folder")
    if not kept:
        raise ValueError(f"{run}: no kept episodes; a run writes them to its folder episodes/")
    if missing := sorted(set(iterations) - set(kept)):
        raise ValueError(f"{run}: nothing was kept of iteration {missing[0]}, only of {', '.join(map(str, kept))}")
    config, texts = read_config(run / "config.json"), Texts()
    batches = [
        {"name": f"{iteration}-{folder}", "label": f"{iteration}, {FOLDERS[folder]}"}
        | read_batch(path, config["group_size"], max_groups, texts)
        for (iteration, folder), path in sorted(files.items())
        if not iterations or iteration in iterations
    ]
    return {"run": run.absolute().name, "config": config, "batches": batches, "texts": list(texts)}


def read_config(path: Path) -> dict:
    """The SETTINGS of a run. Raises OSError or ValueError if they cannot be read."""
    try:
        config = read_json(path)["config"]
        if config["group_size"] < 1:
            raise ValueError("group_size is below 1")
        return {name: config[name] for name in SETTINGS}
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the settings of a run ({error!r})") from error


def read_batch(path: Path, group_size: int, max_groups: int, texts: Texts) -> dict:
    """The groups of a file, and the limits of the two filters: a fifth of all its steps is below, a fifth above.

    Raises OSError, or ValueError for a line that is not a kept episode and for lines that are not whole groups.
    """
    records, norm_entropy = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        with naming_the_line(path, number):
            records.append(parse_json(line, path))
            of_steps = [finite(value) for value in records[-1]["modulation"]["norm_entropy"]]
            norm_entropy += [] if "error" in records[-1]["info"] else of_steps  # aborted episodes train nothing
    if not records or len(records) % group_size:
        raise ValueError(f"{path}: {len(records)} episodes are not whole groups of {group_size}")
    low, high = np.quantile(norm_entropy, [0.2, 0.8]).tolist() if norm_entropy else (0.0, 0.0)
    episodes = []
    for number, record in enumerate(records[: max_groups * group_size], 1):
        with naming_the_line(path, number):
            episodes.append(read_episode(record, low, high, texts))
    return {
        "steps": len(norm_entropy),
        "low": rounded(low),
        "high": rounded(high),
        "kept": len(records) // group_size,
        "groups": [episodes[first : first + group_size] for first in range(0, len(episodes), group_size)],
    }


def read_episode(record: dict, low: float, high: float, texts: Texts) -> dict:
    """An episode as the page shows it. low, high: limits of H_norm for confident mistakes and uncertain successes.

    Raises LookupError, TypeError or ValueError if the record is not that of a kept episode.
    """
    modulation, credit, task = record["modulation"], record.get("credit"), record["task"]
    success, tokens, steps = bool(record["info"]["success"]), iter(record["tokens"]), []
    for step, *values in zip(record["steps"], *(modulation[name] for name in NUMBERS), strict=True):
        span = slice(step["start"], step["end"])
        shown = {name: texts.number(step[name]) for name in ("thought", "action", "observation")}
        shown |= {"valid": step["valid"]} | dict(zip(NUMBERS, map(rounded, values), strict=True))
        of_norm = values[NUMBERS.index("norm_entropy")]
        shown["filter"] = "" if "error" in record["info"] else step_filter(success, of_norm, low, high)
        shown["token_entropy"] = [rounded(value) for value in record["token_entropy"][span]]
        shown["logp"] = [rounded(value) for value in record["old_logp"][span]]
        shown["tokens"] = [texts.number(text) for text in islice(tokens, len(shown["logp"]))]
        if not len(shown["tokens"]) == len(shown["token_entropy"]) == step["end"] - step["start"]:
            raise ValueError(f"step {len(steps)} has not as many tokens as its numbers say")
        steps.append(shown)
    if credit:
        for step, number, true_advantage in zip(steps, range(len(steps)), credit["true_advantage"], strict=True):
            before, after = credit["value"][number : number + 2]
            step |= {"before": rounded(before), "after": rounded(after), "true_advantage": rounded(true_advantage)}
    return {
        "task": texts.number(f"{task['env']} {task['split']} {task['seed']}"),
        "prompt": texts.number(record["prompt"]),
        "error": texts.number(record["info"].get("error", "")),
        "success": success,
        "truncated": bool(record["truncated"]),
        "reward": rounded(record["reward"]),
        "base": rounded(modulation["base"]),
        "continuations": credit["continuations"] if credit else 0,
        "steps": steps,
    }


def step_filter(success: bool, norm_entropy: float, low: float, high: float) -> str:
    """The filter that a step belongs to, "" for none. Equal limits: there is no lowest and no highest fifth."""
    if low == high:
        return ""
    if success:
        return "uncertain" if norm_entropy >= high else ""
    return "mistake" if norm_entropy <= low else ""


def finite(number: float) -> float:
    """The number. Raises ValueError for infinity and NaN, which JSON does not have, and TypeError for no number."""
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return number


def rounded(number: float) -> float:
    """The number with the three digits after the point that the page shows; never -0. Raises as `finite`."""
    return round(finite(number), 3) + 0.0


@contextmanager
def naming_the_line(path: Path, number: int) -> Iterator[None]:
    """Turns the errors of a malformed record into a ValueError of one line that names file and line."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path}, line {number}: not a kept episode ({error!r})") from error


def page(data: dict) -> str:
    """The page as HTML. data: what `read_run` returns."""
    source = TEMPLATE.read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    # The style and the script have no placeholders, so the browser gets the very characters that are hashed here.
    allowed = {}
    for tag in ("style", "script"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", source, re.DOTALL)[1]
        allowed[f"{tag}_hash"] = f"sha256-{b64encode(sha256(content.encode()).digest()).decode()}"
    return environment.from_string(source).render(data=data, **allowed)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. A wrong usage ends with status 2, a file that cannot be read or written with status 1."""
    parser = ArgumentParser("python -m paper.page", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run, the --out of train.py")
    parser.add_argument("--out", type=Path, help="file to write; default: credit.html in the folder of the run")
    parser.add_argument("--iterations", type=int, nargs="+", default=[], help="to show; default: all that were kept")
    parser.add_argument("--max_groups", type=int, default=8, help="of a batch, the first ones; default: 8")
    args = parser.parse_args(argv)
    if args.max_groups < 1:
        parser.error(f"--max_groups must be at least 1, got {args.max_groups}")
    out = args.out or args.run / "credit.html"
    try:
        html = page(read_run(args.run, args.iterations, args.max_groups))
        replace_file(out, html)
    except (OSError, RecordError, ValueError) as error:
        raise SystemExit(f"paper.page: {error}") from error
    print(f"{out}: {len(html) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
