"""A GPU that is not there: tensors on the CPU that claim to be on cuda:0.

Every operation is checked: a mixture of devices is an error, as on a GPU, and `waits` counts what
would make the CPU wait for the device. bf16 autocast is that of the CPU.
"""

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parents[1]
waits: Counter[str] = Counter()  # kind and place: how often the CPU waited for the device
FACTORIES = {torch.arange, torch.empty, torch.full, torch.ones, torch.zeros}
READS = {getattr(torch.Tensor, n) for n in ("item", "tolist", "__bool__", "__int__", "__float__")}
READS |= {torch.Tensor.numpy, torch.Tensor.__format__, torch.Tensor.__index__}
OF_UNKNOWN_SIZE = ("nonzero", "masked_select", "_unique2", "unique_dim", "bincount")


def note(kind: str) -> None:
    """Counts a wait, with the line of the product that caused it."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and "tests" not in path.parts:
            waits[f"{kind} at {path.name}: {frame.line}"] += 1
            return
    waits[kind] += 1


def is_gpu(device: object) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class FakeTensor(torch.Tensor):
    device = property(lambda self: torch.device("cuda", 0))
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "FakeTensor":
        how = {"dtype": held.dtype, "strides": held.stride(), "device": "cpu"}
        self = torch.Tensor._make_wrapper_subclass(cls, held.size(), **how)
        self.held = held
        return self

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        copied = FakeTensor(self.held.clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        return memo.setdefault(id(self), copied)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = function._schema.name.split("::")[1]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_cpu = [x for x in tensors if not isinstance(x, FakeTensor)]
        # there, autograd's own zeros and casts take the CPU for the device
        in_backward = torch._C._current_graph_task_id() >= 0
        if in_backward and kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cuda", 0)
        if name == "_local_scalar_dense" or name in OF_UNKNOWN_SIZE:
            note(name)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [i for i in args[1] if i is not None]
            if any(i.dtype == torch.bool for i in indices):
                note("a mask as index")
            if any(not isinstance(i, FakeTensor) for i in indices):
                note("an index of the CPU")
            on_cpu = [x for x in on_cpu if not any(x is i for i in indices)]
        sized = kwargs.get("output_size") is not None or isinstance(args[-1], int)
        if name == "repeat_interleave" and not sized:
            note(name)
        if name in ("copy_", "_to_copy"):
            to_gpu = is_gpu(kwargs["device"]) if kwargs.get("device") else True
            to_gpu = isinstance(args[0], FakeTensor) if name == "copy_" else to_gpu
            asynchronous = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
            if not to_gpu or (on_cpu and not asynchronous):
                note("a copy")
            on_cpu = []
        if any(x.dim() and (x.any() or not in_backward) for x in on_cpu):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        args, kwargs = tree_map(lambda x: getattr(x, "held", x), (args, kwargs))
        out = product(*args) if function is torch.ops.aten.mm.dtype else function(*args, **kwargs)
        first = function._schema.arguments[0].alias_info
        if first is not None and first.is_write and isinstance(tensors[0], FakeTensor):
            return tensors[0] if isinstance(out, torch.Tensor) else out
        if device is not None and not is_gpu(device):
            return out
        return tree_map(lambda x: FakeTensor(x) if isinstance(x, torch.Tensor) else x, out)


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """aten::mm.dtype, which no CPU has."""
    assert a.dtype == b.dtype == torch.bfloat16, "a GPU takes two factors in bf16"
    return a.to(dtype) @ b.to(dtype)


class Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.held.clone()

    @staticmethod
    def backward(ctx, grad):
        return FakeTensor(grad)


class Mode(TorchFunctionMode):
    """What tensors are made by, and what they are read by: before any dispatch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        x = args[0] if args else None
        if function in READS and isinstance(x, FakeTensor):
            note(function.__name__)
            return function(x.held.detach(), *args[1:])
        if function in FACTORIES and is_gpu(kwargs.get("device")):
            kwargs.pop("device")
            return FakeTensor(function(*args, **kwargs))
        if function in (torch.tensor, torch.as_tensor) and is_gpu(kwargs.get("device")):
            kwargs.pop("device")
            if isinstance(x, FakeTensor):
                return function(x, **kwargs)
            note(function.__name__)
            return FakeTensor(function(*args, **kwargs))
        if function is torch.Tensor.cpu:
            function, args = torch.Tensor.to, (x, "cpu")
        if function is torch.Tensor.to:
            return moved(*args, **kwargs)
        if is_gpu(kwargs.get("device")) and isinstance(x, FakeTensor):
            kwargs.pop("device")
        return function(*args, **kwargs)


def moved(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """x.to(...)"""
    args = [a for a in args if a is not None and not isinstance(a, bool)]
    places = [a for a in args if isinstance(a, str | torch.device)]
    device = places[0] if places else kwargs.get("device")
    rest = [a for a in args if a is not device]
    others = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")}
    if isinstance(x, FakeTensor) and device is not None and not is_gpu(device):
        note("a copy")
        x = Down.apply(x) if x.requires_grad else x.held.clone()
    elif not isinstance(x, FakeTensor) and is_gpu(device):
        if not kwargs.get("non_blocking"):
            note("a copy")
        x = FakeTensor(x.detach().clone())
    return torch.Tensor.to(x, *rest, **others) if rest or others else x


GROUPED = "torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype"
group_tensors = torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype


def grouped(*lists):
    """torch's own, which sees through to the CPU."""
    return {(torch.device("cuda", 0), kind): x for (_, kind), x in group_tensors(*lists).items()}


class Autocast(torch.autocast):
    def __init__(self, device_type: str, *args, **kwargs):
        super().__init__("cpu", *args, **kwargs)


@contextlib.contextmanager
def fake_gpu(free: int = 2**40) -> Iterator[Counter[str]]:
    """Inside, --device cuda is a GPU with this much free memory; yields `waits`."""
    enabled, dtype, modules = torch.is_autocast_enabled, torch.get_autocast_dtype, torch.__future__
    patches = {
        GROUPED: grouped,
        "torch.autocast": Autocast,
        "torch.amp.autocast": Autocast,
        "torch.is_autocast_enabled": lambda *device: enabled("cpu"),
        "torch.get_autocast_dtype": lambda device: dtype("cpu"),
        "torch.cuda.set_device": mock.Mock(),
        "torch.cuda.is_bf16_supported": lambda *_, **__: True,
        "torch.cuda.mem_get_info": lambda device: (free, free),
        "torch.cuda.memory_reserved": lambda device: 0,
        "torch.cuda.memory_allocated": lambda device: 0,
        "torch.set_float32_matmul_precision": mock.Mock(),
    }
    waits.clear()
    overwrites = modules.get_overwrite_module_params_on_conversion()
    modules.set_overwrite_module_params_on_conversion(True)
    try:
        with contextlib.ExitStack() as stack:
            for name, patch in patches.items():
                stack.enter_context(mock.patch(name, patch))
            stack.enter_context(Mode())
            yield waits
    finally:
        modules.set_overwrite_module_params_on_conversion(overwrites)
