"""Runs, checkpoints, models and games from somebody else: none runs code, writes a file or reaches a server untyped.

Each test holds a payload that leaves a file if it is run.
"""

import ast
import builtins
import json
import os
import pickle
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from conftest import ROOT
from torch import nn

from config import TrainConfig
from engine import checkpoint, ranks
from engine.checkpoint import CheckpointError
from engine.files import CHECKSUMS, RecordError, require_undamaged
from eval import load_player, parse_eval_config
from imitate import count_parameters
from policy import PolicyError, load_policy


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.fixture
def left(tmp_path):
    """The file that a payload leaves. It must not be there at the end."""
    file = tmp_path / "left_by_payload"
    yield file
    assert not file.exists()


# -------------------------------------------------------------------------------------------------------------- runs


def run_folder(folder: Path, **config) -> Path:
    """A run's folder with a checkpoint, as far as configurations go; values beyond TrainConfig's are kept."""
    saved = asdict(TrainConfig()) | config
    (folder / "checkpoint-000001").mkdir(parents=True)
    for file in (folder / "config.json", folder / "checkpoint-000001" / "state.json"):
        file.write_text(json.dumps({"config": saved}))
    return folder / "checkpoint-000001"


@pytest.mark.parametrize("state", ["{", '{"config": {"env": "mars"}}', '{"config": 3}'])
def test_a_checkpoint_that_does_not_say_its_world_is_not_measured_in_another_one(state, tmp_path):
    """eval.py measured it in the House, with limits of its own."""
    player = run_folder(tmp_path)
    (player / "state.json").write_text(state)
    with pytest.raises(CheckpointError, match=r"state.json does not say how it was trained: [^\n]+$"):
        parse_eval_config(["--policy", str(player)])


def test_a_damaged_checkpoint_is_not_measured(house_policy, tmp_path):
    checkpoint.write_folder(tmp_path / "checkpoint-000001", house_policy.save, {})
    weights = tmp_path / "checkpoint-000001" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000] + bytes(1000))
    (weights.parent / "notes.txt").write_text("a file of mine")
    with pytest.raises(RecordError, match=r"model.safetensors is damaged$"):
        load_player(str(tmp_path / "checkpoint-000001"), TrainConfig(), Accelerator(cpu=True))


def test_a_list_of_checksums_by_somebody_else_is_data(house_policy, tmp_path):
    """Another name of a file, and a list that is none, ended in a traceback."""
    house_policy.save(tmp_path)
    for saved in ([[1, 2]], 3, {"./notes.txt": 3, "../../elsewhere": "x", "": "x"}):
        (tmp_path / CHECKSUMS).write_text(json.dumps(saved))
        require_undamaged(tmp_path)
    (tmp_path / CHECKSUMS).write_text(json.dumps({"./model.safetensors": "x"}))
    with pytest.raises(RecordError, match=r"model.safetensors is damaged$"):
        require_undamaged(tmp_path)


SOURCES = {
    "webshop_root": "webshop",
    "data": "webshop",  # and in ALFWorld
    "questions": "search",
    "corpus": "search",
    "retriever": "search",
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_is_not_taken_from_a_folder_until_it_is_typed(name, tmp_path, capsys):
    """`eval.py --policy FOLDER` took all of them from the folder's state.json."""
    settings = ["max_steps=7", f"{name}=there/it is"]
    player = run_folder(tmp_path, env=SOURCES[name], env_args=settings, max_tokens=300)
    for typed in ([], ["--env_args", "max_steps=9"]):
        with pytest.raises(SystemExit, match="2"):
            parse_eval_config(["--policy", str(player), *typed])
        assert capsys.readouterr().err.endswith(f"if you trust it, type: --env_args '{name}=there/it is'\n")
    for value in ("there/it is", "elsewhere", ""):
        config = parse_eval_config(["--policy", str(player), "--env_args", f"{name}={value}"])
        assert (config.env_args, config.max_tokens) == (["max_steps=7", f"{name}={value}"], 300)
    config = parse_eval_config(["--policy", str(player), "--env", "house"])
    assert (config.env, config.env_args) == ("house", [])


def test_two_settings_that_exclude_each_other_are_one_line(tmp_path, capsys):
    player = run_folder(tmp_path, env="search", env_args=["retriever=http://here"])
    with pytest.raises(SystemExit, match="2"):
        parse_eval_config(["--policy", str(player), "--env_args", "corpus=c", "questions=q", "retriever=http://there"])
    assert "corpus and retriever exclude each other" in capsys.readouterr().err
    config = parse_eval_config(["--policy", str(player), "--env_args", "corpus=c", "questions=q", "retriever="])
    assert config.env_args == ["retriever=", "corpus=c", "questions=q"]


def test_a_line_to_type_holds_no_control_characters(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_eval_config(["--policy", str(run_folder(tmp_path, env="alfworld", env_args=["data=\x1b[2J"]))])
    assert "\x1b" not in capsys.readouterr().err


def test_a_folder_names_no_file_to_write_and_no_other_player(tmp_path, left):
    """A state.json with "json" made `eval.py --policy FOLDER` write its result there."""
    player = run_folder(tmp_path / "run", json=str(left), episodes=str(left), compare=["some/model", "other/model"])
    config = parse_eval_config(["--policy", str(player)])
    assert (config.json, config.episodes, config.compare, config.policy) == ("", "", [], str(player))


@pytest.fixture
def checkout(tmp_path, left) -> Path:
    """A folder that looks like a checkout of WebShop."""
    (tmp_path / "web" / "web_agent_site").mkdir(parents=True)
    for file in ("rich.py", "web_agent_site/__init__.py"):
        (tmp_path / "web" / file).write_text(f"import os; os.mkdir({str(left)!r})")
    return tmp_path / "web"


def test_a_folder_brings_no_code_to_eval(tmp_path, left, checkout, evaluate, house_policy, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    player = run_folder(tmp_path / "run", env="webshop", env_args=[f"webshop_root={checkout}"], eval_tasks=1)
    house_policy.save(player)
    with pytest.raises(SystemExit, match="2"):
        evaluate("--policy", str(player))


def test_a_folder_brings_no_code_to_the_credit_page(tmp_path, left, checkout, monkeypatch, capsys):
    from paper import credit

    monkeypatch.setattr("sys.path", [*sys.path])
    run_folder(tmp_path / "run", env="webshop", env_args=[f"webshop_root={checkout}"])
    monkeypatch.setattr("sys.argv", ["credit", "--run", str(tmp_path / "run"), "--checkpoint", "1"])
    with pytest.raises(SystemExit, match="2"):
        credit.main()
    assert capsys.readouterr().err.endswith(f"type: --env_args webshop_root={checkout}\n")


@pytest.mark.parametrize(("name", "value"), [("policy", "some/model"), ("env_args", ["data=there"])])
def test_resume_takes_no_source_that_is_not_typed(name, value, begun):
    file = begun / "checkpoint-000002" / "state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps(state | {"config": state["config"] | {name: value}}))
    sums = checkpoint.checksums(file.parent)
    (file.parent / checkpoint.CHECKSUMS).write_text(json.dumps(sums))
    config = TrainConfig(**state["config"] | {"resume": True, "iterations": 3, "out": str(begun)})
    typed = " ".join(value) if isinstance(value, list) else value
    with pytest.raises(SystemExit, match=f"was trained with --{name} {typed}; resume with the same"):
        checkpoint.run_position(config, "no")


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def sharded(tmp_path, monkeypatch):
    """A model and its optimizer as one rank of a sharded run has them, and the folder where it saved them."""
    monkeypatch.setattr(ranks, "FSDPModule", nn.Module)
    Accelerator(cpu=True)
    model = nn.Linear(3, 3)
    model.all_tied_weights_keys = {}
    optimizer = AcceleratedOptimizer(torch.optim.AdamW(model.parameters()))
    model(torch.ones(3)).sum().backward()
    optimizer.optimizer.step()
    return model, optimizer, ranks.save_shards(tmp_path / "shards", model, optimizer)


def test_shards_are_restored(sharded):
    model, optimizer, folder = sharded
    weight, moment = model.weight.detach().clone(), optimizer.state[model.weight]["exp_avg"].clone()
    for tensor in (model.weight.data, optimizer.state[model.weight]["exp_avg"]):
        tensor.zero_()
    optimizer.param_groups[0]["lr"] = 7.0
    assert ranks.load_shards(folder, model, optimizer)
    assert torch.equal(model.weight, weight)
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], moment)
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_shards_that_torch_cannot_write_or_read_end_in_one_line(sharded, tmp_path, monkeypatch):
    """torch's own error is no Exception, so it was a traceback."""
    model, optimizer, folder = sharded
    state, policy = checkpoint.RunState({}, iteration=1), type("P", (), {"model": model})
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"^could not save .+ \(.*Not a directory.*\); earlier .+$"):
        checkpoint.save(tmp_path / "file" / "run", state, None, policy, optimizer)
    next(folder.glob("*.distcp")).write_bytes(b"cut")
    with pytest.raises(SystemExit, match=r"^.+ cannot be restored: .+$"):
        checkpoint.restore(folder.parent, policy, optimizer)


@pytest.mark.parametrize("place", ["metadata", "storage", "bytes"])
def test_shards_run_nothing(place, sharded, left, monkeypatch):
    """torch.distributed.checkpoint unpickles .metadata, and every value that is not a tensor."""
    model, optimizer, folder = sharded
    if place == "metadata":
        (folder / ".metadata").write_bytes(pickle.dumps(Touch(left)))
    elif place == "storage":
        metadata = torch.distributed.checkpoint.FileSystemReader(folder).read_metadata()
        metadata.storage_data["more"] = Touch(left)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    else:
        state = ranks._state(model, optimizer)
        group = "param_groups"
        state["optimizer"][group][0]["lr"] = Touch(left)
        torch.distributed.checkpoint.save(state, checkpoint_id=folder)
    policy = type("P", (), {"model": model})
    with pytest.raises(SystemExit, match=f"^{folder.parent} cannot be restored: it holds more than data$"):
        checkpoint.restore(folder.parent, policy, optimizer)


def test_shards_of_a_model_that_is_not_sharded_are_not_read(sharded, left, monkeypatch):
    """--resume without --fsdp unpickled them, too, if the folder was there."""
    model, optimizer, folder = sharded
    (folder / ".metadata").write_bytes(pickle.dumps(Touch(left)))
    torch.save(optimizer.state_dict(), folder.parent / "optimizer.pt")
    monkeypatch.undo()
    checkpoint.restore(folder.parent, type("P", (), {"model": model}), optimizer)


def test_an_optimizer_runs_nothing(tmp_path, left):
    torch.save({"state": Touch(left)}, tmp_path / "optimizer.pt")
    model = nn.Linear(3, 3)
    with pytest.raises(SystemExit, match=r"cannot be restored: it holds more than data$"):
        checkpoint.restore(tmp_path, type("P", (), {"model": model}), torch.optim.AdamW(model.parameters()))


# ------------------------------------------------------------------------------------------------------------- models


@pytest.fixture
def model_folder(house_policy, tmp_path, monkeypatch) -> Path:
    """A saved policy; whoever asks on the terminal gets a yes."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    house_policy.save(tmp_path / "model")
    return tmp_path / "model"


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


CODE = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.Tok", "code.Tok"]}


def with_code(folder: Path, left: Path) -> None:
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(left)!r})\n")
    change(folder / "config.json", auto_map=CODE)
    change(folder / "tokenizer_config.json", auto_map=CODE)


def test_the_code_of_a_model_is_not_run_and_nobody_is_asked(model_folder, left):
    """transformers asks on the terminal, unless trust_remote_code is said to be False."""
    with_code(model_folder, left)
    change(model_folder / "config.json", model_type="evil")
    for load in (load_policy, count_parameters):
        with pytest.raises(PolicyError, match="contains custom code") as error:
            load(str(model_folder))
        assert "\n" not in str(error.value)


def test_a_model_that_transformers_knows_is_loaded_without_its_code(model_folder, left, house_policy):
    with_code(model_folder, left)
    (model_folder / "custom_generate").mkdir()
    (model_folder / "code.py").rename(model_folder / "custom_generate" / "generate.py")
    ids = torch.tensor([[1, 2, 3]])
    loaded = load_policy(str(model_folder))
    assert torch.equal(loaded.model(ids).logits, house_policy.model(ids).logits)
    assert count_parameters(str(model_folder)) == house_policy.model.num_parameters()


def test_pickled_weights_run_nothing(model_folder, left):
    (model_folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Touch(left)}, model_folder / "pytorch_model.bin")
    with pytest.raises(PolicyError, match="no policy at"):
        load_policy(str(model_folder))


def test_a_chat_template_runs_nothing(model_folder, left):
    template = (model_folder / "chat_template.jinja").read_text()
    payload = f"{{{{ cycler.__init__.__globals__.os.mkdir({str(left)!r}) }}}}"
    (model_folder / "chat_template.jinja").write_text(payload + template)
    with pytest.raises(PolicyError, match="unsafe"):
        load_policy(str(model_folder))


@pytest.mark.parametrize("kernel", ["some-body/kernel", "flash_attention_2"])
@pytest.mark.parametrize("key", ["attn_implementation", "experts_implementation"])
def test_a_kernel_of_the_hub_is_not_fetched(key, kernel, model_folder):
    """With the package `kernels` it is code that transformers downloads and runs."""
    change(model_folder / "config.json", **{key: kernel})
    for load in (load_policy, count_parameters):
        with pytest.raises(PolicyError, match=f"asks for '{kernel}', which may be code from the hub"):
            load(str(model_folder))


def test_an_adapter_does_not_fetch_the_model_that_it_names(model_folder):
    """With the package `peft` transformers loads that model from the hub."""
    (model_folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')
    for load in (load_policy, count_parameters):
        with pytest.raises(PolicyError, match="merge the two"):
            load(str(model_folder))


# -------------------------------------------------------------------------------------------------------- the project


def test_the_project_names_no_way_to_run_data():
    """Every load says that it takes data alone; nothing unpickles, evaluates or executes."""
    found = []
    for file in sorted(ROOT.rglob("*.py")):
        if "tests" in file.parts or file.parts[len(ROOT.parts)].startswith((".", "out")):
            continue
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            said = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
            called = ast.unparse(call.func)
            name = called.rpartition(".")[2]
            bad = name in ("from_pretrained", "from_config") and said.get("trust_remote_code") is not False
            bad |= called == "torch.load" and said.get("weights_only") is not True
            bad |= called in ("eval", "exec", "np.load", "numpy.load", "pickle.load", "pickle.loads", "yaml.load")
            bad |= said.get("allow_pickle", False) is not False
            found += [f"{file.relative_to(ROOT)}:{call.lineno} {called}"] * bad
    assert not found
