"""Files of tensors: safetensors, what torch.save wrote, and folders of either.

Loading is safe: no pickled code runs, and no file makes us read elsewhere or more than it holds.
"""

import json
import math
import pickle
import re
from pathlib import Path

from data.records import UserError, atomic

import numpy as np
import torch
from torch import Tensor

DTYPES = {"BF16": torch.bfloat16, "U8": torch.uint8, "BOOL": torch.bool}
DTYPES |= {f"F{bits}": getattr(torch, f"float{bits}") for bits in (16, 32, 64)}
DTYPES |= {f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)}
WRAPPERS = ("transformer", "module", "_orig_mod", "pretrained_model")  # in a weight's name


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's file, or of the several files that its index lists."""
    readers = {"model.safetensors": read_safetensors, "pytorch_model.bin": unpickle}
    for name, read in readers.items():
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return read(folder / name)
        if index.exists():
            parts = read_json(index).get("weight_map")
            parts = list(parts.values()) if isinstance(parts, dict) else [None]
            if any(type(part) is not str or Path(part).name != part for part in parts):
                raise UserError(f"{index} has no weight_map to files of this folder")
            return {k: w for part in dict.fromkeys(parts) for k, w in read(folder / part).items()}
    raise UserError(f"{folder} has no weights; expected {' or '.join(readers)}")


def by_our_names(path: Path, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in float32, without the prefixes of wrappers and without causal masks."""
    weights: dict[str, Tensor] = {}
    for theirs, w in found.items() if isinstance(found, dict) else [("model", None)]:
        name = ".".join(part for part in str(theirs).split(".") if part not in WRAPPERS)
        if not isinstance(w, Tensor) or not w.is_cpu or w.is_complex() or name in weights:
            raise UserError(f"{path}: {theirs!s:.99} is no tensor of weights, or it is there twice")
        if not re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):  # masks are buffers
            weights[name] = w.to_dense().float()
    return weights


def read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no JSON object: {error}") from None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file: 8 bytes n, n bytes of JSON that say where each lies, and the data.

    Raises UserError unless they lie end to end, fill the data, and have the size of their dtype and
    shape.
    """
    try:
        with open(path, "rb") as file:
            n = int.from_bytes(file.read(8), "little")
            if 8 + n > path.stat().st_size:
                raise ValueError("it is cut off")
            header = json.loads(file.read(n))
        data = np.memmap(path, np.uint8, "r", offset=8 + n)
        header.pop("__metadata__", None)
        tensors, at = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            begin, end = entry["data_offsets"]
            if len(shape) > 8 or any(type(size) is not int or size < 1 for size in shape):
                raise ValueError(f"{name} has shape {shape}")
            if begin != at or end - begin != math.prod(shape) * dtype.itemsize or end > len(data):
                raise ValueError(f"{name} cannot lie at {begin} to {end} of {len(data)}")
            at = end
            tensors[name] = torch.from_numpy(data[begin:end].copy()).view(dtype).view(shape)
        if at != len(data):
            raise ValueError(f"{len(data) - at} bytes too many")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no safetensors file that we read: {error!s:.200}") from None
    return tensors


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes the tensors in float32."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = at + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    with atomic(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().float().cpu().contiguous().numpy().tobytes())


def unpickle(path: Path) -> dict:
    """What torch.save wrote: tensors and plain values only."""
    malformed = (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, LookupError)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (*malformed, TypeError, AttributeError, AssertionError, OverflowError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__})") from None
