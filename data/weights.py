"""GPT-2's weights from others and for others: the folders of transformers, nanoGPT's ckpt.pt."""

import json
import sys
from pathlib import Path

from data.records import UserError, atomic, printable
from data.tensors import by_our_names, read_json, read_tensors, unpickle, write_safetensors
from data.tokenizer import END, get_tokenizer
from data.vocabulary import FILES, hugging_face_files, read_tokenizer, with_padding

import torch
from tiktoken import Encoding
from torch import Tensor

PUBLISHED = dict.fromkeys(("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"))  # SHA-256, if known
PUBLISHED["gpt2"] = "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"
HUB = "https://huggingface.co/openai-community/{}/resolve/main/{}"
SIZES = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")  # nanoGPT's names and ours
HUGGING_FACE = {  # what a config.json may not say otherwise, for then it is another network
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MAX_UNUSED = 1024  # rows of the vocabulary without a token; more mean that the tokenizer is another


def is_hugging_face(source: str | Path) -> bool:
    """Whether this is a published GPT-2, a folder of transformers, or nanoGPT's ckpt.pt."""
    path = Path(source)
    theirs = any((path / name).exists() for name in ("config.json", "ckpt.pt"))
    ours = (path / "checkpoint.pt").exists()  # a stage's config.json holds its flags
    file = path.is_file() and path.name != "checkpoint.pt"
    return str(source) in PUBLISHED or file or (theirs and not ours)


def download(name: str) -> Path:
    """The folder of a published GPT-2 in torch's cache, fetched when it is not there yet."""
    folder = Path(torch.hub.get_dir()) / "picorlhf" / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, sha256 in (("config.json", None), ("model.safetensors", PUBLISHED[name])):
        if not (folder / file).exists():
            url = HUB.format(name, file)
            if file == "model.safetensors" and not sha256:
                say(f"{url} is not verified: its checksum is known for gpt2 only")
            try:
                torch.hub.download_url_to_file(url, str(folder / file), hash_prefix=sha256)
            except (OSError, RuntimeError) as error:  # no network, no such host, another hash
                remedy = f"put config.json and model.safetensors of {name} into a folder, give that"
                raise FileNotFoundError(f"{url} cannot be loaded ({error}); {remedy}") from None
    return folder


def say(line: str) -> None:
    print(printable(line), file=sys.stderr)


def tokenizer_of(source: str | Path) -> Encoding:
    """The tokenizer of a model for which `is_hugging_face` holds; GPT-2's if it has none."""
    own = None if str(source) in PUBLISHED else read_tokenizer(Path(source))
    if own is None and str(source) not in PUBLISHED:
        say(f"{source} has no tokenizer: GPT-2's is used")
    if own and (special := own.special_tokens_set - {END}):
        say(f"{source}: no text becomes one of its tokens {', '.join(sorted(special)):.300}")
    return own or get_tokenizer("gpt2")


def read_hugging_face(source: str | Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Sizes and float32 weights of a GPT-2, by our names; UserError for another network.

    Rows of the vocabulary behind the tokenizer's last token are cut, and a line says so.
    """
    path = download(str(source)) if str(source) in PUBLISHED else Path(source)
    transformers = (path / "config.json").exists()
    sizes, weights = read_transformers(path) if transformers else read_nanogpt(path)
    wte = weights.get("wte.weight", torch.empty(0))
    if not torch.equal(weights.pop("lm_head.weight", wte), wte):
        raise UserError(f"{source}: lm_head.weight differs from wte.weight; ours is tied to it")
    own, rows = read_tokenizer(path), sizes["vocab_size"]
    tokens = own.n_vocab if own else 50257  # GPT-2's
    if tokens < rows <= tokens + MAX_UNUSED and wte.shape[:1] == (rows,):
        say(f"{source}: {rows - tokens} of {rows} rows of the vocabulary have no token and are cut")
        sizes["vocab_size"], weights["wte.weight"] = tokens, wte[:tokens].clone()
    return sizes, weights


def read_transformers(folder: Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    config = read_json(path := folder / "config.json")
    sizes, weights = read_sizes(path, config), by_our_names(path, read_tensors(folder))
    if config.get("tie_word_embeddings") is False and "lm_head.weight" not in weights:
        raise UserError(f"{path}: tie_word_embeddings is False, yet there is no lm_head.weight")
    return sizes, transposed(weights)


def read_nanogpt(path: Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    path = path if path.is_file() else path / "ckpt.pt"
    saved = unpickle(path)
    config = saved.get("model_args") if isinstance(saved, dict) else None
    if not isinstance(config, dict):
        raise UserError(f"{path} has no model_args; expected nanoGPT's ckpt.pt, or a folder")
    say(f"{path}: nanoGPT's GELU is exact, ours is GPT-2's by tanh: logits differ slightly")
    sizes, weights = read_sizes(path, config), by_our_names(path, saved.get("model"))
    if config.get("bias") is False:
        for name in [name for name in weights if name.startswith(("h.", "ln_f."))]:
            weights[name.replace("weight", "bias")] = torch.zeros(weights[name].shape[:1])
    return sizes, weights


def read_sizes(path: Path, config: dict) -> dict[str, int]:
    """The sizes in config.json, or in nanoGPT's model_args; UserError for another network."""
    lengths = [config.get(name) for name in ("block_size", "n_positions", "n_ctx")]
    config = config | {"block_size": next(filter(None, lengths), None)}
    if config.get("activation_function") in ("gelu_fast", "gelu_pytorch_tanh"):
        config["activation_function"] = "gelu_new"  # three names of one function
    shown = {name: str(value)[:100] for name, value in config.items()}
    if "Classification" in (kind := shown.get("architectures", "")):
        raise UserError(f"{path}: {kind} is no language model; a reward model comes from reward.py")
    for name, value in HUGGING_FACE.items():
        if config.get(name) not in (None, value):
            raise UserError(f"{path}: {name} is {shown[name]}; only {value} is supported")
    for name in SIZES:
        if type(config.get(name)) is not int or config[name] < 1:
            raise UserError(f"{path}: {name} is {shown.get(name)}; expected a positive number")
    if config.get("n_inner") not in (None, width := 4 * config["n_embd"]):
        raise UserError(f"{path}: n_inner is {shown['n_inner']}; only {width} is supported")
    return {name: config[name] for name in SIZES}


def write_hugging_face(
    folder: str | Path, sizes: dict[str, int], weights: dict[str, Tensor], tokenizer: Encoding
) -> None:
    """Writes config.json, model.safetensors and the tokenizer's files, for transformers.

    The weights of a GPT become a GPT2LMHeadModel. Those of a ScalarModel (gpt.*, head.weight and
    head.bias) become a GPT2ForSequenceClassification with one label, the score at the last token;
    it pads with a token of its own, since end of text is a token that is scored.
    """
    folder, eos = Path(folder), tokenizer.eot_token
    config = HUGGING_FACE | {name: sizes[name] for name in SIZES if name != "block_size"}
    config |= {"n_positions": sizes["block_size"], "n_ctx": sizes["block_size"]}
    config |= {"architectures": ["GPT2LMHeadModel"], "bos_token_id": eos, "eos_token_id": eos}
    head = {"score.weight": weights["head.weight"]} if "head.weight" in weights else {}
    if head:
        weights, tokenizer = without_head(weights), with_padding(tokenizer)
        config |= {"architectures": ["GPT2ForSequenceClassification"]}
        config |= {"vocab_size": sizes["vocab_size"] + 1, "pad_token_id": sizes["vocab_size"]}
        config |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    files = hugging_face_files(tokenizer)
    others = {"checkpoint.pt", "config.json", "model.safetensors", "pytorch_model.bin", *FILES}
    if found := sorted(path.name for name in others for path in folder.glob(name)):
        raise UserError(f"{folder} has a {found[0]} already; export to an empty folder")
    named = {f"transformer.{name}": w for name, w in transposed(weights).items()}
    write_safetensors(folder / "model.safetensors", named | head)
    for name, text in (files | {"config.json": json.dumps(config, indent=1)}).items():
        with atomic(folder / name) as file:
            file.write(text.encode())


def without_head(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a ScalarModel's GPT, such that its head needs no bias.

    GPT2ForSequenceClassification has none: ln_f.bias is shifted by b w / |w|^2, of which the head's
    weight w makes the bias b. wte gets a row of zeros for the padding.
    """
    gpt = {k.removeprefix("gpt."): w for k, w in weights.items() if k.startswith("gpt.")}
    w = weights["head.weight"].double()  # (1, C)
    shift = weights["head.bias"] * w[0] / w.square().sum()
    gpt["ln_f.bias"] = (gpt["ln_f.bias"] + shift).float()
    gpt["wte.weight"] = torch.cat([gpt["wte.weight"], torch.zeros_like(w).float()])
    check_finite("the reward model's", gpt)
    return gpt


def transposed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """From GPT-2's layout of matrices, (in, out), to torch's, and back."""
    return {
        name: w.T.contiguous() if name.endswith(TRANSPOSED) and w.dim() == 2 else w
        for name, w in weights.items()
    }


def check_weights(found: dict[str, Tensor], ours: dict[str, Tensor], source: str | Path) -> None:
    """Raises UserError for weights that are not those of our network, or not numbers."""
    if not isinstance(found, dict) or not all(isinstance(w, Tensor) for w in found.values()):
        raise UserError(f"{source}: its weights are no tensors")
    for name in sorted(found.keys() | ours.keys()):
        own, shape = (tuple(w[name].shape) if name in w else "missing" for w in (ours, found))
        if shape != own:
            raise UserError(f"{source}: weight {name} is {shape}, expected {own}")
    check_finite(f"{source}: weight", found)


def check_finite(what: str, tensors: dict[str, Tensor]) -> None:
    """Raises UserError for tensors that hold infinities or NaN."""
    for name, x in tensors.items():
        if not x.isfinite().all():
            raise UserError(f"{what} {name} has values that are infinite or no number")
