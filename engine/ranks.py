"""One process of several: how ranks start, share work, hold weights, and divide a model too large for one device.

Every rank plays its share of a list of tasks, and gets the results of all (`play_over_ranks`). Forward and backward
passes are divided in update.py.

With --fsdp (FSDP2, through Accelerate) each rank keeps a part of every weight. While a layer computes, its weights are
gathered; then they are dropped again. While a rank samples, all weights stay gathered (`weights_for_sampling`).
Otherwise each token would gather the whole model again, and all ranks would wait for each other at every token.

The main process does not hold all weights of a sharded model. So all ranks take part in saving: `full_weights` for a
checkpoint that `from_pretrained` opens, `save_shards` for one that training resumes from. Without --fsdp they do
nothing.

Not run here: several machines. Their ranks need a common file system for checkpoints.
"""

import io
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from operator import itemgetter
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, InitProcessGroupKwargs, fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from config import TrainConfig
from engine.stopping import gather_or_stop
from policy import PolicyError

COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by the name of Accelerate's mixed precision
OFF = ("", "false", "no", "0", "none")
# Settings of a launcher that would change the algorithm, and their values that do not. Accelerate obeys in silence.
LAUNCHER = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1",),  # divides every gradient: update.py makes its own micro-batches
    "ACCELERATE_MIXED_PRECISION": ("no", *COMPUTE),  # fp8 replaces layers
    "ACCELERATE_DYNAMO_BACKEND": OFF,  # compiles the model, whose numbers are then not those of sampling
    "ACCELERATE_USE_DEEPSPEED": OFF,  # has its own optimizer, clipping and accumulation
    "ACCELERATE_USE_MEGATRON_LM": OFF,
    "ACCELERATE_USE_PARALLELISM_CONFIG": OFF,  # tensor and context parallelism
    "FSDP_IGNORED_MODULES": OFF,  # their gradients would differ between ranks
}
# How PyTorch and its libraries say that memory ran out, in errors of several classes.
OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED", "can't allocate memory")
# How long a rank waits for another. One whose episodes are long may sample for an hour while the others wait, and NCCL
# would give up after ten minutes. When a rank dies, the launcher ends the others at once.
PATIENCE = timedelta(hours=4)
# What the file .metadata of a sharded checkpoint is made of, and data types.
METADATA = {
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *(f"torch.distributed.checkpoint.metadata.{kind}StorageMetadata" for kind in ("Tensor", "Bytes", "Chunk")),
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")),
    *("torch.distributed.checkpoint.filesystem._StorageInfo", "torch.serialization._get_layout", "torch.Size"),
    *("pathlib.PosixPath", "pathlib._local.PosixPath"),
}

# ------------------------------------------------------------------------------------------------------------- start


def start_ranks(threads: int, fsdp: bool = False, **options) -> Accelerator:
    """This process as one of the ranks that the launcher started; options go to Accelerator.

    threads: of this process on the CPU; 0: see `cpu_threads`.  fsdp: models will be divided among the ranks.
    Exits if N processes were launched but did not find each other; each would train the whole run. Exits if the
    launcher's settings would change the algorithm.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not fsdp:
        raise SystemExit("this launcher's configuration shards models in its own way: use runs/accelerate, and --fsdp")
    for name, harmless in LAUNCHER.items():
        if (value := os.environ.get(name, harmless[0])).lower() not in harmless:
            raise SystemExit(f"the launcher sets {name}={value}, which changes the algorithm: use runs/accelerate")
    # Without a GPU the ranks find each other only if they are told to stay on the CPU.
    options |= {"cpu": not torch.cuda.is_available(), "kwargs_handlers": [InitProcessGroupKwargs(timeout=PATIENCE)]}
    accelerator = sharding_accelerator(**options) if fsdp else Accelerator(**options)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise SystemExit(
            f"{launched} processes were launched but {accelerator.num_processes} found each other; "
            "on CPUs launch with: torchrun --nproc_per_node N train.py"
        )
    if threads or accelerator.device.type == "cpu":
        torch.set_num_threads(threads or cpu_threads(accelerator.num_processes))
    return accelerator


def cpu_threads(processes: int) -> int:
    """The user's OMP_NUM_THREADS, or else this process's share of the cores that it may use."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads == "1" and ("LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ):
        # Launchers set 1 where the user set nothing. The launcher's own environment tells which of the two it was.
        launcher = Path(f"/proc/{os.getppid()}/environ")  # on Linux
        if not launcher.exists() or b"OMP_NUM_THREADS=1" not in launcher.read_bytes().split(b"\0"):
            threads = ""
    if threads.isdecimal() and int(threads):
        return int(threads)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // processes)


@contextmanager
def explain_out_of_memory(work: str, advice: str) -> Iterator[None]:
    """Ends the program with one line, which gives the advice, if memory runs out within."""
    try:
        yield
    except (Exception, PolicyError) as error:
        cause = error  # the end of a capture and a PolicyError may hide the error that they came from
        while cause and not (isinstance(cause, torch.OutOfMemoryError) or any(w in str(cause) for w in OUT_OF_MEMORY)):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise SystemExit(f"out of memory while {work}: {advice}") from error


# ---------------------------------------------------------------------------------------------------------- sampling


def play_over_ranks(accelerator: Accelerator, jobs: Sequence, play: Callable[[Sequence], list]) -> list:
    """The results of all jobs, in their order, on every rank; all ranks call this together.

    play: plays this rank's share of the jobs, every n-th of them, and returns one result for each.
    Raises Stopped on every rank if one of them was asked to stop.
    """
    mine = range(accelerator.process_index, len(jobs), accelerator.num_processes)
    numbered = gather_or_stop(lambda: list(zip(mine, play([jobs[i] for i in mine]), strict=True)))
    return [result for _, result in sorted(numbered, key=itemgetter(0))]


@contextmanager
def weights_for_sampling(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Within, every rank has whole weights, in the type that it computes in; all ranks enter together."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        with sampling_weights(model, accelerator.mixed_precision):
            yield
    finally:
        for module in shards:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


@contextmanager
def sampling_weights(model: nn.Module, mixed_precision: str) -> Iterator[None]:
    """While this lasts, linear layers hold their weights in the type that mixed precision computes in.

    Autocast casts their float32 weights in every forward pass, which costs a decode step more than its own work. Here
    they are cast once, and the numbers are the same. The copies take 2 bytes a parameter. They stay with the model,
    because CUDA graphs know their addresses.  mixed_precision: as Accelerate names it; nothing is done for "no".
    """
    dtype = COMPUTE.get(mixed_precision)
    if dtype is None:
        yield
        return
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.weight.dtype != dtype]
    own = [(layer, name, weight) for layer in layers for name, weight in layer.named_parameters(recurse=False)]
    kept = getattr(model, "sampling_copies", [])  # in a list they are no parameters of the model
    if [(copy.dtype, copy.device) for copy in kept] != [(dtype, weight.device) for *_, weight in own]:
        kept = model.sampling_copies = [nn.Parameter(torch.empty_like(w, dtype=dtype), False) for *_, w in own]
    try:
        for (layer, name, weight), copy in zip(own, kept, strict=True):
            setattr(layer, name, copy)
            copy.copy_(weight.detach())
        with torch.autocast(model.device.type, dtype):
            yield
    finally:
        for layer, name, weight in own:
            setattr(layer, name, weight)


# --------------------------------------------------------------------------------------------- rows of an update


def micro_batches(
    config: TrainConfig, accelerator: Accelerator, length: Tensor, rows: Sequence[int]
) -> list[tuple[list[int], int]]:
    """This rank's share of a mini-batch in parts of at most micro_batch_tokens tokens, each with its loss's weight.

    length: (B,), tokens of each episode. Rows are sorted by length, so that little of a part is padding. DDP averages
    gradients over ranks, where their sum is needed: the weight is the number of ranks. DDP needs every rank in every
    backward pass: one with too few parts runs one row with weight 0.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    lengths = length.tolist()
    rows = sorted(rows, key=lambda row: lengths[row])
    shares = [split_by_tokens(rows[i::ranks], lengths, config.micro_batch_tokens) for i in range(ranks)]
    missing = max(map(len, shares)) - len(shares[rank])
    return [(part, ranks) for part in shares[rank]] + [(rows[:1], 0)] * missing


def split_by_tokens(rows: list[int], lengths: list[int], budget: int) -> list[list[int]]:
    """Rows, sorted by length, in parts of at most `budget` tokens, padding included. A longer row is alone."""
    parts: list[list[int]] = []
    for row in rows:
        if parts and (len(parts[-1]) + 1) * lengths[row] <= budget:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


# ---------------------------------------------------------------------------------------------------------- sharding


def sharding_accelerator(**options) -> Accelerator:
    """An Accelerator whose `prepare` divides a model among the ranks. Ends the program if there is one rank alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        raise SystemExit("--fsdp divides the model among processes: launch at least two, see runs/accelerate")
    if not torch.cuda.is_available():
        # On CPUs Accelerate takes DDP without a word. So it is told that these ranks have GPUs, which lets it shard.
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",  # a layer is gathered at a time
        reshard_after_forward=True,
        cpu_ram_efficient_loading=True,  # the main process of each machine reads the weights, the others get their part
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = Accelerator(fsdp_plugin=plugin, **options)
    if dtype := COMPUTE.get(accelerator.mixed_precision):
        # Accelerate's own policy would also round gradients, and log-probs on their way out of the model.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    return accelerator


def gradient_sync(accelerator: Accelerator, model: nn.Module, last: bool) -> AbstractContextManager:
    """DDP all-reduces gradients once per mini-batch, in its `last` backward pass. FSDP2 must reduce in every pass."""
    return nullcontext() if last or accelerator.is_fsdp2 else accelerator.no_sync(model)


def prepare_frozen(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The model, prepared as the policy is, but not for training."""
    if not accelerator.is_fsdp2:
        return accelerator.prepare_model(model, evaluation_mode=True)
    model = fsdp2_prepare_model(accelerator, model)
    model.set_reshard_after_forward(True)  # also for lm_head: no backward pass would free its gathered weights
    return model


def to_float(value: Tensor) -> float:
    """A scalar that may be a sharded DTensor, such as the norm of all gradients, as a float."""
    return float(value.full_tensor() if isinstance(value, DTensor) else value)


# ------------------------------------------------------------------------------------------------------- checkpoints


def full_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """All weights by name, on the CPU of the main process, {} on the others; None if the model is not sharded."""
    if not isinstance(model, FSDPModule):
        return None
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: weight for name, weight in weights.items() if name not in model.all_tied_weights_keys}


def save_shards(folder: Path, model: nn.Module, optimizer: AcceleratedOptimizer) -> Path | None:
    """Every rank writes its part of model and optimizer. Returns the folder, or None if the model is not sharded."""
    if not isinstance(model, FSDPModule):
        return None
    if PartialState().is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    PartialState().wait_for_everyone()
    dcp.save(_state(model, optimizer), checkpoint_id=folder)
    return folder


def load_shards(folder: Path, model: nn.Module, optimizer: AcceleratedOptimizer) -> bool:
    """Restore what `save_shards` wrote, in place, on as many ranks as there were or on another number.

    Returns False, and reads nothing, if the model is not sharded.  Raises UnpicklingError if they hold more than data.
    """
    if not isinstance(model, FSDPModule):
        return False
    state, reader = _state(model, optimizer), _ShardReader(folder)
    reader.read_metadata()  # dcp.load would hide its error in another
    dcp.load(state, storage_reader=reader, planner=_ShardPlanner())
    set_state_dict(model, optimizer.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return True


class _ShardReader(dcp.FileSystemReader):
    """PyTorch's reader unpickles .metadata, which can run any code. This one builds the classes of METADATA only."""

    def read_metadata(self, *args, **kwargs) -> dcp.Metadata:
        with (self.path / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        data_type = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if not data_type and f"{module}.{name}" not in METADATA:
            raise pickle.UnpicklingError(f".metadata names {module}.{name}, which is no part of a checkpoint")
        return super().find_class(module, name)


class _ShardPlanner(DefaultLoadPlanner):
    """PyTorch's planner unpickles what is not a tensor. Here it gets a copy of what `weights_only` could read."""

    def load_bytes(self, read_item, value: io.BytesIO) -> None:
        copy = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), copy)
        copy.seek(0)
        super().load_bytes(read_item, copy)


def _state(model: nn.Module, optimizer: AcceleratedOptimizer) -> dict[str, dict]:
    if not optimizer.state:
        # get_state_dict creates missing Adam moments with a zero step, which increments `step`; reset it.
        get_state_dict(model, optimizer.optimizer)
        for moments in optimizer.state.values():
            moments["step"].zero_()
    weights, moments = get_state_dict(model, optimizer.optimizer)
    return {"model": weights, "optimizer": moments}
