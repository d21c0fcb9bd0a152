"""Random numbers, the device, and the processes that torchrun starts: each one's share of a batch,
sums of gradients, and networks that are sharded over the processes."""

import atexit
import functools
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from data.records import UserError

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, init_device_mesh

FULL = dcp.StateDictOptions(full_state_dict=True)
FULL_ON_CPU = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)  # for rank 0 alone


def seed_of(*key: int | str) -> int:
    """A 63-bit seed that is a function of the key alone, for example (seed, stage, step)."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest()) >> 1


def generator(*key: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*key))


@functools.lru_cache(maxsize=2)  # every step of an epoch asks for the same one
def permutation(n: int, *key: int | str) -> list[int]:
    return torch.randperm(n, generator=generator(*key)).tolist()


def shuffled(items: Sequence, *key: int | str) -> list:
    return [items[i] for i in permutation(len(items), *key)]


def steps_per_epoch(items: Sequence, batch_size: int) -> int:
    return -(-len(items) // batch_size)


def batch_at(step: int, items: Sequence, batch_size: int, *key: int | str) -> list:
    """The items of this step: every epoch goes through all of them in a new order."""
    epoch, i = divmod(step, steps_per_epoch(items, batch_size))
    order = permutation(len(items), *key, epoch)
    return [items[j] for j in order[i * batch_size :][:batch_size]]


def rank_key(*key: int | str) -> tuple[int | str, ...]:
    """The key for random numbers that differ between processes."""
    rank, _ = rank_and_world()
    return (*key, rank) if rank else key


def resolve_device(name: str) -> torch.device:
    """The device of a --device flag; torchrun's processes on one machine get a GPU each.

    A GPU becomes the current one: NCCL, FSDP2 and Triton use no other.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"--device {name} is not available: {line:.100}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def send(x: Tensor | list, device: torch.device | str) -> Tensor:
    """A copy on the device of what the CPU holds; the CPU does not wait for the device."""
    return torch.as_tensor(x).to(device, non_blocking=True)


def move(owner, device: torch.device | str):
    """Sends every tensor that an object holds, and returns the object."""
    for name, x in vars(owner).items():
        if isinstance(x, Tensor):
            setattr(owner, name, send(x, device))
    return owner


def free_memory(device: torch.device) -> int:
    """Bytes that a GPU has left for new tensors; of a CPU's, nothing is known here."""
    if device.type != "cuda":
        return sys.maxsize
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def last_line(command: list[str], folder: Path, seconds: float) -> tuple[str, bool]:
    """The last line that a command prints, or why there is none; false if it may pass next time."""
    try:
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"no answer in {seconds} seconds", False
    printed = (ran.stderr if ran.returncode else ran.stdout).split("\n")
    lines = [line for line in printed if line.strip()]
    line = [f"exit status {ran.returncode}", *lines][-1][:200]
    return line, "out of memory" not in line


def rank_and_world() -> tuple[int, int]:
    """The rank of this process, and the number of processes: (0, 1) without torchrun."""
    d = torch.distributed
    return (d.get_rank(), d.get_world_size()) if d.is_initialized() else (0, 1)


def join(device: str) -> None:
    """Makes this process, which torchrun has started, a member of the group until it ends.

    Gloo sums the tensors of a CPU and carries all objects; NCCL sums the tensors of GPUs.
    """
    on_gpu = resolve_device(device).type == "cuda"
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    atexit.register(leave)


def leave() -> None:
    """Ends this process's part in the group; its threads abort a Python that ends before them."""
    time.sleep(0.1)  # the pause lets them release the tensors of the last `gather`
    torch.distributed.destroy_process_group()


def my_share(items: Sequence) -> Sequence:
    """This process's contiguous slice of the items; the slices in order give all of them."""
    rank, world = rank_and_world()
    return items[rank * len(items) // world : (rank + 1) * len(items) // world]


def gather(mine: object) -> list:
    """A list of what each process passes, in order of rank; every process waits for the others."""
    values = [mine] * rank_and_world()[1]
    if len(values) > 1:
        torch.distributed.all_gather_object(values, mine)
    return values


def mean_of_all(noted: dict[str, list[Tensor | float]]) -> dict[str, float]:
    """The mean of what all processes have noted, by name; a name without numbers is left out."""
    mine = {k: torch.stack([*map(torch.as_tensor, x)]).tolist() for k, x in noted.items() if x}
    found: dict[str, list[float]] = {}
    for share in gather(mine):
        for name, values in share.items():
            found[name] = found.get(name, []) + values
    return {name: sum(values) / len(values) for name, values in found.items()}


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Sums gradients over the processes; those of a sharded network are sums already."""
    if rank_and_world()[1] > 1 and not isinstance(parameters[0], DTensor):
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            torch.distributed.all_reduce(p.grad)


def shard(model: nn.Module, keep: bool, methods: Sequence[str]) -> None:
    """FSDP2: spreads every tensor over the processes; nothing may be done to the network later.

    A block (item of a ModuleList) is gathered for its pass only, the rest until the backward pass
    if `keep`. Gradients are summed as they arise. `methods` run a pass, as forward does.
    """
    if not torch.distributed.is_initialized():
        raise UserError("--shard needs several processes: torchrun --nproc_per_node=2 ...")
    mesh = init_device_mesh(next(model.parameters()).device.type, (rank_and_world()[1],))
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    for part in [*(block for blocks in lists for block in blocks), model]:
        fully_shard(part, mesh=mesh, reshard_after_forward=part is not model or not keep)
        part.set_gradient_divide_factor(1.0)  # a sum over processes, not their mean
        part.set_force_sum_reduction_for_comms(True)
    for method in methods:
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)


def unsharded_weights(model: nn.Module, options: dcp.StateDictOptions = FULL) -> dict[str, Tensor]:
    """The state_dict, unsharded, for every process; all of them call it."""
    if isinstance(model, FSDPModule):
        model.reshard()  # what is outside of blocks may still be gathered
    return dcp.get_model_state_dict(model, options=options)


def load_unsharded(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Loads what unsharded_weights returned; every process keeps its shard."""
    if missing := sorted(model.state_dict().keys() - weights.keys()):
        raise LookupError(f"{missing[0]} is missing")  # torch would keep the old weights
    dcp.set_model_state_dict(model, weights, options=FULL)


def full_state(
    modules: nn.ModuleDict, optimizer: torch.optim.Optimizer, everywhere: bool = False
) -> dict[str, dict]:
    """{module: its state_dict, ..., "optimizer": its own}, unsharded, for rank 0 or everywhere."""
    options = FULL if everywhere else FULL_ON_CPU
    state = {name: unsharded_weights(m, options) for name, m in modules.items()}
    found = dcp.get_optimizer_state_dict(modules, optimizer, options=options)
    return state | {"optimizer": found}


def load_full_state(modules: nn.ModuleDict, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Loads what full_state returned to rank 0; every process keeps its shard."""
    for name, module in modules.items():
        load_unsharded(module, state[name])
    dcp.set_optimizer_state_dict(modules, optimizer, state["optimizer"], options=FULL)


def whole(x: Tensor) -> Tensor:
    """A tensor of which every process may hold a part."""
    return x.full_tensor() if isinstance(x, DTensor) else x
