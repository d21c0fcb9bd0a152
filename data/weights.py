"""Weights from files that others have written, and for others to read: Hugging Face's folders of
GPT-2, safetensors, and what torch.save wrote. No file can run code, or make us read elsewhere."""

import json
import math
import pickle
import re
from pathlib import Path

import numpy as np
import torch
from tiktoken import Encoding
from torch import Tensor

from data.records import printable, write_atomically
from data.tokenizer import hugging_face_files

PUBLISHED = {  # and the SHA-256 of model.safetensors, where we know it
    "gpt2": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    "gpt2-medium": None,
    "gpt2-large": None,
    "gpt2-xl": None,
}
HUB = "https://huggingface.co/openai-community/{}/resolve/main/{}"
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HUGGING_FACE = {  # what a config.json may not say otherwise, for then it is another network
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
SIZES = {  # our names for what is in config.json
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}


def is_hugging_face(source: str | Path) -> bool:
    folder = Path(source)  # a stage's folder has a config.json as well, of its flags
    ours = (folder / "checkpoint.pt").exists()
    return str(source) in PUBLISHED or ((folder / "config.json").exists() and not ours)


def download(name: str) -> Path:
    """The folder of a published GPT-2 in torch's cache, fetched when it is not there yet."""
    folder = Path(torch.hub.get_dir()) / "nanorlhf" / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, sha256 in (("config.json", None), ("model.safetensors", PUBLISHED[name])):
        if not (folder / file).exists():
            url = HUB.format(name, file)
            try:
                torch.hub.download_url_to_file(url, str(folder / file), hash_prefix=sha256)
            except (OSError, RuntimeError) as error:  # no network, no such host, another hash
                raise FileNotFoundError(
                    f"{url} cannot be loaded ({error}); put config.json and model.safetensors of "
                    f"{name} into a folder yourself and give its path"
                ) from None
    return folder


def read_hugging_face(source: str | Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Sizes and weights, by our names, of a GPT-2 that transformers has saved; else ValueError."""
    folder = download(str(source)) if str(source) in PUBLISHED else Path(source)
    path = folder / "config.json"
    try:
        config = dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no JSON object: {error}") from None
    sizes = {ours: config.get(theirs) for ours, theirs in SIZES.items()}
    for name, size in zip(SIZES.values(), sizes.values(), strict=True):
        if type(size) is not int or size < 1:
            raise ValueError(f"{path}: {name} is {size}; expected a positive number")
    ours = HUGGING_FACE | {"n_inner": 4 * config["n_embd"]}
    for name, value in ours.items():
        if config.get(name) not in (None, value):
            raise ValueError(f"{path}: {name} is {config[name]}; only {value} is supported")
    if (folder / "model.safetensors").exists():
        found = read_safetensors(folder / "model.safetensors")
    else:
        found = unpickle(folder / "pytorch_model.bin")
    found = {name.removeprefix("transformer."): w.float() for name, w in found.items()}
    head = found.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, found.get("wte.weight", head)):
        raise ValueError(f"{folder}: lm_head.weight differs from wte.weight; ours is tied to it")
    weights = {
        name: w.T.contiguous() if name.endswith(TRANSPOSED) and w.dim() == 2 else w
        for name, w in found.items()
        if not re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name)  # the causal mask, as a buffer
    }
    return sizes, weights


def write_hugging_face(
    folder: str | Path, sizes: dict[str, int], weights: dict[str, Tensor], tokenizer: Encoding
) -> None:
    """Writes what transformers reads: config.json, model.safetensors, the tokenizer's files."""
    folder, eos = Path(folder), tokenizer.eot_token
    folder.mkdir(parents=True, exist_ok=True)
    config = HUGGING_FACE | {theirs: sizes[ours] for ours, theirs in SIZES.items()}
    config |= {"architectures": ["GPT2LMHeadModel"], "bos_token_id": eos, "eos_token_id": eos}
    weights = {
        f"transformer.{name}": w.T if name.endswith(TRANSPOSED) else w
        for name, w in weights.items()
    }
    write_safetensors(folder / "model.safetensors", weights)
    files = {"config.json": json.dumps(config, indent=1)} | hugging_face_files(tokenizer)
    for name, text in files.items():
        write_atomically(folder / name, lambda file, text=text: file.write(text.encode()))


def refuse_unusable(found: dict[str, Tensor], ours: dict[str, Tensor], source: str | Path) -> None:
    """ValueError for weights that are not those of our network, or not numbers."""
    for name in sorted(found.keys() | ours.keys()):
        shapes = [tuple(w[name].shape) if name in w else "missing" for w in (found, ours)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{source}: weight {name} is {shapes[0]}, expected {shapes[1]}")
    refuse_not_finite(f"{source}: weight", found)


def refuse_not_finite(what: str, tensors: dict[str, Tensor]) -> None:
    for name, x in tensors.items():
        if not x.isfinite().all():
            raise ValueError(f"{what} {name} has values that are infinite or no number")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file: 8 bytes n, n bytes of JSON that say where each lies, and the data.

    ValueError unless they lie end to end, fill the data, and have the size of dtype and shape: no
    file makes us read elsewhere, or more than it holds.
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
        message = printable(str(error))[:200]
        raise ValueError(f"{path} is no safetensors file that we read: {message}") from None
    return tensors


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = at + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8

    def write(file) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().float().cpu().contiguous().numpy().tobytes())

    write_atomically(path, write)


def unpickle(path: Path) -> dict:
    """What torch.save wrote: tensors and plain values only, so that no file can run code."""
    malformed = (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, LookupError)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (*malformed, TypeError, AttributeError, AssertionError, OverflowError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__})") from None
