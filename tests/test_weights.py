"""Weights in and out: other tools' folders, both ways, malicious files, presets, the terminal."""

import dataclasses
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import ppo
import reward
import sft
from data import tokenizer
from data.python_reward import RewardFunction
from data.records import UserError
from data.run import Run, RunConfig, parse
from data.tensors import read_safetensors, write_safetensors
from data.tokenizer import END, Codec, get_tokenizer
from data.vocabulary import hugging_face_files
from data.weights import HUB, PUBLISHED, download, write_hugging_face
from model import (
    GPT,
    AskConfig,
    GPTConfig,
    ScalarModel,
    adam,
    ask,
    generate,
    pack,
)

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

library = pytest.importorskip("transformers")
GPT2Config, GPT2LMHeadModel = library.GPT2Config, library.GPT2LMHeadModel
GPT2ForSequenceClassification = library.GPT2ForSequenceClassification
GPT2Tokenizer = library.GPT2Tokenizer
ROOT = Path(__file__).parents[1]
SHAPES = [  # vocabulary, context, layers, heads, channels
    (128, 64, 2, 2, 32),
    (257, 48, 3, 4, 64),
    (1024, 96, 1, 1, 48),
]


@pytest.fixture
def gpt2_cache(monkeypatch):
    """A cache that holds GPT-2's vocabulary, or the test is skipped."""
    cache = ROOT.parent / "shared/data/tiktoken_cache"
    if not cache.exists():
        pytest.skip(f"{cache} is absent")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))


def transformers_gpt2(shape) -> GPT2LMHeadModel:
    """One with random biases and gains, which transformers leaves at 0 and 1."""
    torch.manual_seed(0)
    names = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
    end = {"bos_token_id": 0, "eos_token_id": 0}
    theirs = GPT2LMHeadModel(GPT2Config(**dict(zip(names, shape, strict=True)), **end)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return theirs


@torch.no_grad()
def assert_equal_models(ours: GPT, theirs: GPT2LMHeadModel):
    """Logits to 1e-5, and the same greedy continuation."""
    tokens = torch.randint(1, ours.config.vocab_size, (20,), generator=torch.manual_seed(1))
    logits = ours.logits(ours.eval()(pack([tokens[:5].tolist()], [tokens[5:].tolist()])))
    expected = theirs(tokens[None]).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    prompt, never = tokens[:5].tolist(), ours.config.vocab_size
    (greedy,) = generate(ours, [prompt], 20, eos_token=never, temperature=0)
    flags = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert greedy == theirs.generate(tensor([prompt]), **flags)[0, 5:].tolist()


# ---- transformers' folders


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_loads_what_transformers_saves(shape, file, tmp_path):
    theirs = transformers_gpt2(shape)
    theirs.save_pretrained(tmp_path)
    if file == "pytorch_model.bin":  # which transformers itself no longer writes
        (tmp_path / "model.safetensors").unlink()
        masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 4, 4) for i in range(shape[2])}
        torch.save(theirs.state_dict() | masks, tmp_path / file)  # as the published files have them
    assert_equal_models(GPT.load(tmp_path), theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_loads_what_is_saved(shape, tmp_path):
    transformers_gpt2(shape).save_pretrained(tmp_path / "theirs")
    ours = GPT.load(tmp_path / "theirs")
    ours.save(tmp_path / "ours", get_tokenizer("toy"))
    theirs, report = GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert_equal_models(ours, theirs.eval())
    assert_equal_models(GPT.load(tmp_path / "ours"), theirs)


def test_transformers_reads_our_tokenizer(tmp_path):
    encoding, texts = get_tokenizer("toy"), ["Tell me a silly story.", "Once\n there  was 42 x!?"]
    config = GPTConfig(encoding.n_vocab, 16, 1, 1, 8)
    GPT(config).save(tmp_path, encoding)
    theirs = GPT2Tokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == encoding.eot_token
    for text in texts:
        assert theirs.encode(text) == encoding.encode_ordinary(text)
        assert theirs.decode(theirs.encode(text)) == text
    ours = Codec.load(tmp_path, "{prompt}\\n")
    assert ours.prompt("Hello") == encoding.encode_ordinary("Hello\n")


def test_gpt2s_own_tokenizer_files(tmp_path, gpt2_cache):
    encoding, text = get_tokenizer("gpt2"), "Zoë didn't   pay 1,234 €.\n\n😀 "
    for name, content in hugging_face_files(encoding).items():
        (tmp_path / name).write_text(content, "utf-8")
    assert GPT2Tokenizer.from_pretrained(tmp_path).encode(text) == encoding.encode_ordinary(text)
    (tmp_path / "config.json").write_text("{}")
    again = Codec.load(tmp_path).tokenizer
    assert again._mergeable_ranks == encoding._mergeable_ranks
    assert again.encode_ordinary(text) == encoding.encode_ordinary(text)


@pytest.mark.parametrize(
    "change, needle",
    [
        ({"activation_function": "relu"}, "activation_function is relu; only gelu_new"),
        ({"n_inner": 100}, "n_inner is 100; only 128"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"n_embd": "32"}, "n_embd is 32; expected a positive number"),
        ({"n_layer": True}, "n_layer is True"),
        ({"n_head": 3}, "n_head divides n_embd"),
        ({"n_layer": 3}, "weight h.2.attn.c_attn.bias is missing"),
        ({"n_layer": 1}, "weight h.1.attn.c_attn.bias is (96,), expected missing"),
        ({"vocab_size": 64}, "weight wte.weight is (128, 32), expected (64, 32)"),
        ({"model_type": "llama"}, "model_type is llama"),
        ({"model_type": "llama", "n_embd": None}, "model_type is llama"),
        ({"model_type": "gpt_neo"}, "model_type is gpt_neo; only gpt2"),
        ({"activation_function": "gelu"}, "activation_function is gelu; only gelu_new"),
        ({"activation_function": "a\nb"}, "activation_function is a\\nb; only gelu_new"),
        ({"n_positions": None, "n_ctx": None}, "block_size is None; expected a positive number"),
        ({"n_positions": None, "n_ctx": 32}, "weight wpe.weight is (64, 32), expected (32, 32)"),
    ],
)
def test_another_network_is_refused(change, needle, tmp_path):
    transformers_gpt2(SHAPES[0]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError) as error:
        GPT.load(tmp_path)
    assert needle in str(error.value)


def test_an_untied_head_is_refused(tmp_path):
    theirs = transformers_gpt2(SHAPES[0])
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    head = theirs.state_dict()["lm_head.weight"] + 1
    torch.save(theirs.state_dict() | {"lm_head.weight": head}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="lm_head.weight differs from wte.weight"):
        GPT.load(tmp_path)


def state(theirs: GPT2LMHeadModel) -> dict:
    """The weights as transformers writes them: the head is tied, and left out."""
    return {name: w for name, w in theirs.state_dict().items() if name != "lm_head.weight"}


def save(folder: Path, theirs: GPT2LMHeadModel, weights: dict, **changes) -> Path:
    """A folder of these weights; a change of None takes a key out of config.json."""
    library = pytest.importorskip("safetensors.torch")
    theirs.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: w.contiguous() for name, w in weights.items()}
    library.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "prefix", ["", "_orig_mod.", "module.", "_orig_mod.module.", "model_without_transformer"]
)
def test_prefixes_of_wrappers_are_left_out(prefix, tmp_path):
    theirs = transformers_gpt2(SHAPES[0])
    if prefix == "model_without_transformer":  # as GPT2Model has them
        weights = {name.removeprefix("transformer."): w for name, w in state(theirs).items()}
    else:
        weights = {prefix + name: w for name, w in state(theirs).items()}
    assert_equal_models(GPT.load(save(tmp_path, theirs, weights)), theirs)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32])
def test_masks_in_buffers_are_left_out(dtype, tmp_path):
    theirs = transformers_gpt2(SHAPES[0])
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 4, 4).to(dtype) for i in range(2)}
    masks |= {f"transformer.h.{i}.attn.masked_bias": tensor(-1e4) for i in range(2)}
    positions = {"transformer.h.0.attn.bias": torch.arange(4)}  # int64
    folder = save(tmp_path, theirs, state(theirs) | masks | positions)
    assert_equal_models(GPT.load(folder), theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_other_precisions_become_float32(dtype, tmp_path):
    theirs = transformers_gpt2(SHAPES[0]).to(dtype)
    ours = GPT.load(save(tmp_path, theirs, state(theirs)))
    assert ours.wte.weight.dtype == torch.float32
    assert_equal_models(ours, theirs.float())


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_sharded_weights(file, tmp_path):
    theirs, kind = transformers_gpt2(SHAPES[1]), file.rpartition(".")[2]
    folder = save(tmp_path, theirs, state(theirs))
    whole, weights, parts = tmp_path / "model.safetensors", state(theirs), {}
    for i in range(3):
        part = {name: weights[name].contiguous() for name in list(weights)[i::3]}
        parts |= dict.fromkeys(part, f"part-{i}.{kind}")
        if kind == "bin":
            torch.save(part, tmp_path / f"part-{i}.bin")
        else:
            write_safetensors(tmp_path / f"part-{i}.safetensors", part)
    whole.unlink()
    index = tmp_path / f"{file}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    assert_equal_models(GPT.load(folder), theirs)
    (tmp_path / f"part-1.{kind}").unlink()
    with pytest.raises(FileNotFoundError, match="part-1"):
        GPT.load(folder)
    for wrong in ({"a": "../part-0.bin"}, {"a": "/etc/passwd"}, {"a": 3}, {}, None, ["part-0.bin"]):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(UserError, match="has no weight_map|is missing"):
            GPT.load(folder)


def test_transformers_shards_load(tmp_path):
    theirs = transformers_gpt2(SHAPES[1])
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_equal_models(GPT.load(tmp_path), theirs)


def test_an_older_name_of_the_context(tmp_path):
    theirs = transformers_gpt2(SHAPES[0])
    folder = save(tmp_path, theirs, state(theirs), n_positions=None, n_ctx=64)
    assert_equal_models(GPT.load(folder), theirs)


@pytest.mark.parametrize("name", ["gelu_fast", "gelu_pytorch_tanh"])
def test_other_names_of_the_same_activation(name, tmp_path):
    theirs = transformers_gpt2(SHAPES[0])
    folder = save(tmp_path, theirs, state(theirs), activation_function=name)
    assert_equal_models(GPT.load(folder), GPT2LMHeadModel.from_pretrained(folder).eval())


def test_a_head_of_its_own_loads_where_it_equals_the_embedding(tmp_path):
    theirs = transformers_gpt2(SHAPES[0])
    head = {"lm_head.weight": theirs.transformer.wte.weight.clone()}
    weights = state(theirs)
    folder = save(tmp_path / "equal", theirs, weights | head, tie_word_embeddings=False)
    assert_equal_models(GPT.load(folder), theirs)
    other = {"lm_head.weight": head["lm_head.weight"] + 1}
    folder = save(tmp_path / "other", theirs, weights | other, tie_word_embeddings=False)
    with pytest.raises(UserError, match="lm_head.weight differs from wte.weight"):
        GPT.load(folder)
    folder = save(tmp_path / "none", theirs, weights, tie_word_embeddings=False)
    with pytest.raises(UserError, match="tie_word_embeddings is False, yet there is no lm_head"):
        GPT.load(folder)


@pytest.mark.parametrize(
    "extra, prefix, needle",
    [
        ({"score.weight": torch.ones(1, 32)}, "", "score.weight is (1, 32), expected missing"),
        (
            {"v_head.summary.bias": torch.ones(1)},
            "pretrained_model.",
            "v_head.summary.bias is (1,)",
        ),
        (
            {"transformer.wte.bias": torch.ones(1, dtype=torch.cfloat)},
            "",
            "is no tensor of weights",
        ),
        ({"wte.weight": torch.ones(128, 32)}, "", "wte.weight is no tensor of weights, or it is"),
    ],
)
def test_weights_of_another_network_are_refused(extra, prefix, needle, tmp_path):
    theirs = transformers_gpt2(SHAPES[0])
    theirs.config.save_pretrained(tmp_path)
    weights = {prefix + name: w for name, w in state(theirs).items()} | extra
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError) as error:
        GPT.load(tmp_path)
    assert needle in str(error.value)


@pytest.mark.parametrize("saved", [[1, 2], {"a": 3}, {"model": {}}, tensor(1.0), {1: tensor(1.0)}])
def test_a_pickle_of_something_else_is_one_line(saved, tmp_path):
    transformers_gpt2(SHAPES[0]).config.save_pretrained(tmp_path)
    torch.save(saved, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="no tensor of weights|is missing|expected missing"):
        GPT.load(tmp_path)


def test_a_folder_without_weights_says_so(tmp_path):
    transformers_gpt2(SHAPES[0]).config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no weights; expected model.safetensors or pytorch_m"):
        GPT.load(tmp_path)


# ---- vocabularies: padded ones, and a folder's own


@pytest.mark.parametrize("rows", [50260, 50304])
def test_rows_without_a_token_are_cut(rows, tmp_path, capsys):
    theirs = transformers_gpt2((rows, 16, 1, 1, 4))
    theirs.save_pretrained(tmp_path)
    capsys.readouterr()
    ours = GPT.load(tmp_path)
    assert capsys.readouterr().err == (
        f"{tmp_path}: {rows - 50257} of {rows} rows of the vocabulary have no token and are cut\n"
    )
    assert ours.config.vocab_size == 50257
    tokens = torch.randint(50257, (16,), generator=torch.manual_seed(0))
    with torch.no_grad():
        logits = ours.logits(ours.eval()(pack([tokens[:1].tolist()], [tokens[1:].tolist()])))
        expected = theirs(tokens[None]).logits[0, :, :50257]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_a_vocabulary_of_another_size_is_not_cut(tmp_path, gpt2_cache):
    transformers_gpt2((52000, 8, 1, 1, 2)).save_pretrained(tmp_path)
    assert GPT.load(tmp_path).config.vocab_size == 52000
    with pytest.raises(UserError, match="has 50257 tokens and the model has 52000"):
        Codec.load(tmp_path).check_vocabulary(52000)


def test_a_folder_without_a_tokenizer_gets_gpt2s(tmp_path, capsys, gpt2_cache):
    transformers_gpt2(SHAPES[0]).save_pretrained(tmp_path)
    capsys.readouterr()
    assert Codec.load(tmp_path).tokenizer.n_vocab == 50257
    assert capsys.readouterr().err == f"{tmp_path} has no tokenizer: GPT-2's is used\n"


TEXTS = [
    "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist Verpflichtung.",
    "日本語のテキスト、これはテストです。 the cat sat on the mat; 1234 it's we'll  \n\n\t ok",
    "Привет мир, как дела? Он сказал: «да». " * 3,
]
CONFIG = "tokenizer_config.json"
SPECIAL = {"none": [], "first": [END], "some": ["<s>", "<pad>", END, "<mask>"]}


def own_vocabulary(folder: Path, special: list[str]) -> GPT2Tokenizer:
    """Trains vocab.json and merges.txt by the library that transformers uses."""
    library = pytest.importorskip("tokenizers")
    trained = library.ByteLevelBPETokenizer()
    options = {"vocab_size": 400, "min_frequency": 1, "special_tokens": special}
    trained.train_from_iterator(TEXTS, show_progress=False, **options)
    folder.mkdir(exist_ok=True)
    trained.save_model(str(folder))
    return GPT2Tokenizer.from_pretrained(folder)


def random_texts(n: int) -> list[str]:
    """Strings of up to 40 characters, of more and more of Unicode."""
    draw, ranges = random.Random(0), [(32, 127), (0, 0x300), (0x300, 0x3000), (0x3000, 0xD800)]
    ranges.append((0xE000, 0x110000))
    return [
        "".join(chr(draw.randrange(*draw.choice(ranges[: 1 + i % 5]))) for _ in range(i % 40))
        for i in range(n)
    ]


@pytest.mark.parametrize("special", SPECIAL)
def test_a_vocabulary_of_its_own_gives_transformers_ids(special, tmp_path):
    theirs = own_vocabulary(tmp_path / "two", SPECIAL[special])
    theirs.save_pretrained(tmp_path / "one")
    assert (tmp_path / "one/tokenizer.json").exists()
    for folder in (tmp_path / "two", tmp_path / "one"):
        (folder / "config.json").write_text("{}")
        codec = Codec.load(folder)
        ours = codec.tokenizer
        again = tokenizer.from_state(tokenizer.to_state(ours))
        assert (ours.n_vocab, codec.eos) == (len(theirs), theirs.eos_token_id)
        assert (again.n_vocab, again.eot_token) == (ours.n_vocab, ours.eot_token)
        for text in [*TEXTS, *random_texts(1000)]:
            ids = theirs.encode(text)
            assert ours.encode_ordinary(text) == again.encode_ordinary(text) == ids, text
            assert ours.decode(ids) == text
        assert ours.decode(list(range(ours.n_vocab)))  # every id has a text


def test_a_model_with_a_vocabulary_of_its_own_comes_out_as_it_went_in(tmp_path):
    theirs = own_vocabulary(tmp_path / "in", SPECIAL["some"])
    model = transformers_gpt2((len(theirs) + 5, 64, 2, 2, 32))  # 5 rows are padding
    model.save_pretrained(tmp_path / "in")
    ours, codec = GPT.load(tmp_path / "in"), Codec.load(tmp_path / "in")
    codec.check_vocabulary(ours.config.vocab_size)
    ours.save(tmp_path / "out", codec.tokenizer)
    again = GPT2Tokenizer.from_pretrained(tmp_path / "out")
    assert (again.get_vocab(), again.eos_token_id) == (theirs.get_vocab(), theirs.eos_token_id)
    for text in random_texts(200):
        assert again.encode(text) == theirs.encode(text)
        assert Codec.load(tmp_path / "out").prompt(text) == theirs.encode(text)
    assert_equal_models(ours, GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval())


def added_tokens(folder: Path, *words: str) -> GPT2Tokenizer:
    """A vocabulary of its own, <pad> and <user> behind it, and words that stand for text."""
    theirs = own_vocabulary(folder, SPECIAL["first"])
    theirs.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<user>"]})
    theirs.add_tokens(list(words))
    return theirs


@pytest.mark.parametrize("files", ["tokenizer.json", "added_tokens.json", CONFIG])
def test_special_tokens_behind_the_vocabulary_are_kept(files, tmp_path, capsys):
    theirs = added_tokens(tmp_path / "in")
    if files == "tokenizer.json":
        theirs.save_pretrained(tmp_path / "in")
    else:  # as older versions wrote them, beside vocab.json
        added = {"<pad>": len(theirs) - 2, "<user>": len(theirs) - 1}
        if files == CONFIG:
            added = {str(i): {"content": token, "special": True} for token, i in added.items()}
            added = {"added_tokens_decoder": added}
        (tmp_path / "in" / files).write_text(json.dumps(added))
    model = transformers_gpt2((len(theirs) + 3, 16, 1, 1, 4))
    model.save_pretrained(tmp_path / "in")
    capsys.readouterr()
    codec, ours = Codec.load(tmp_path / "in"), GPT.load(tmp_path / "in")
    codec.check_vocabulary(ours.config.vocab_size)
    assert capsys.readouterr().err == (
        f"{tmp_path}/in: no text becomes one of its tokens <pad>, <user>\n"
        f"{tmp_path}/in: 3 of {len(theirs) + 3} rows of the vocabulary have no token and are cut\n"
    )
    again = tokenizer.from_state(tokenizer.to_state(codec.tokenizer))
    for text in random_texts(100):
        assert codec.prompt(text) == again.encode_ordinary(text) == theirs.encode(text)
    ours.save(tmp_path / "out", codec.tokenizer)
    exported = GPT2Tokenizer.from_pretrained(tmp_path / "out")
    text = "a <user> b<pad>"  # only transformers puts such tokens into a text
    assert exported.encode(text) == theirs.encode(text) and len(theirs) == len(exported)


def test_special_tokens_without_rows_in_the_network_are_dropped(tmp_path):
    added_tokens(tmp_path).save_pretrained(tmp_path)
    transformers_gpt2((400, 16, 1, 1, 4)).save_pretrained(tmp_path)
    Codec.load(tmp_path).check_vocabulary(400)
    assert GPT.load(tmp_path).config.vocab_size == 400


def test_added_words_are_refused(tmp_path):
    theirs = added_tokens(tmp_path, "covid19")
    theirs.save_pretrained(tmp_path)
    transformers_gpt2((len(theirs), 16, 1, 1, 4)).save_pretrained(tmp_path)
    for load in (Codec.load, GPT.load):
        with pytest.raises(UserError, match="its added tokens .'covid19'. stand for text; only sp"):
            load(tmp_path)


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def reverse_merges(folder: Path) -> None:
    first, *merges = (folder / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text("\n".join([first, *merges[::-1]]))


def unreachable_token(folder: Path) -> None:  # "qxz" from "qx" and "z", without a merge for "qx"
    vocab = json.loads((folder / "vocab.json").read_text())
    edit_json(folder / "vocab.json", qxz=len(vocab))
    with open(folder / "merges.txt", "a") as file:
        file.write("qx z\n")


def other_path(folder: Path) -> None:  # "qxz" joined as q + xz, though q + x comes first
    vocab = json.loads((folder / "vocab.json").read_text())
    edit_json(
        folder / "vocab.json", **{t: len(vocab) + i for i, t in enumerate(("qx", "xz", "qxz"))}
    )
    with open(folder / "merges.txt", "a") as file:
        file.write("q x\nx z\nq xz\n")


def model_json(**changes):
    def change(folder: Path) -> None:
        GPT2Tokenizer.from_pretrained(folder).save_pretrained(folder)
        edit_json(folder / "tokenizer.json", **changes)

    return change


SPACE = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
METASPACE = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}
TOKENIZERS = {  # what is done to a good folder, and what is said
    "merges in another order": (reverse_merges, "ids are not in the order of its merges"),
    "a merge of no token": (unreachable_token, "ids are not in the order of its merges"),
    "a merge that never happens": (other_path, "ids are not in the order of its merges"),
    "half a vocabulary": (lambda f: (f / "merges.txt").unlink(), "has a tokenizer (vocab.json)"),
    "the other half": (lambda f: (f / "vocab.json").unlink(), "has a tokenizer (merges.txt)"),
    "no bytes": (lambda f: (f / "vocab.json").write_text('{"<|endoftext|>": 0}'), "have no id"),
    "ids as text": (lambda f: edit_json(f / "vocab.json", a="7"), "1 of the 256 bytes"),
    "an id twice": (lambda f: edit_json(f / "vocab.json", a=7), "a rank is missing or occurs"),
    "a hole": (lambda f: edit_json(f / "vocab.json", **{END: 5000}), "a rank is missing or occurs"),
    "no JSON": (lambda f: (f / "vocab.json").write_text("{"), "is no tokenizer of GPT-2's kind"),
    "an array": (lambda f: (f / "vocab.json").write_text("[]"), "is no tokenizer of GPT-2's kind"),
    "deep nesting": (lambda f: (f / "vocab.json").write_text("[" * 10**5), "is no tokenizer of"),
    "merges of three": (lambda f: (f / "merges.txt").write_text("a b c"), "is no tokenizer of"),
    "another end of text": (
        lambda f: (f / CONFIG).write_text('{"eos_token": {"content": "</s>"}}'),
        "only <|endoftext|> is supported",
    ),
    "a space before": (
        lambda f: (f / CONFIG).write_text('{"add_prefix_space": true}'),
        "its add_prefix_space is true",
    ),
    "a space before in JSON": (model_json(pre_tokenizer=SPACE), "its pre_tokenizer is {'type'"),
    "Metaspace": (model_json(pre_tokenizer=METASPACE), "expected GPT-2's ByteLevel"),
    "no pre_tokenizer": (model_json(pre_tokenizer=None), "expected GPT-2's ByteLevel"),
    "lower case": (model_json(normalizer={"type": "Lowercase"}), "its normalizer is {'type': 'Low"),
    "WordPiece": (model_json(model={"type": "WordPiece"}), "it is WordPiece; expected BPE"),
    "no model": (model_json(model=None), "is no tokenizer of GPT-2's kind"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_is_none_of_ours_is_refused(name, tmp_path):
    theirs = own_vocabulary(tmp_path, SPECIAL["first"])
    transformers_gpt2((len(theirs), 16, 1, 1, 4)).save_pretrained(tmp_path)
    change, needle = TOKENIZERS[name]
    change(tmp_path)
    for load in (Codec.load, GPT.load):
        with pytest.raises(UserError) as error:
            load(tmp_path)
        message = str(error.value)
        assert needle in message and message.startswith(str(tmp_path)) and "\n" not in message


@pytest.mark.parametrize(
    "file", ["vocab.txt", "spiece.model", "tokenizer.model", "meta.pkl", "tokenizer_config.json"]
)
def test_gpt2s_vocabulary_never_stands_in_for_another(file, tmp_path):
    transformers_gpt2(SHAPES[0]).save_pretrained(tmp_path)
    (tmp_path / file).write_text("{}")
    with pytest.raises(UserError, match=f"has a tokenizer .{file}., but not one of GPT-2's kind"):
        Codec.load(tmp_path)


# ---- nanoGPT's checkpoints


def nanogpt_logits(weights: dict, n_head: int, tokens: torch.Tensor, gelu: str) -> torch.Tensor:
    """(T,) -> (T, V) by nanoGPT's formulae, written anew; gelu is "none", as today, or "tanh"."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    x = weights["transformer.wte.weight"][tokens] + weights["transformer.wpe.weight"][: len(tokens)]
    for i in range(sum(name.endswith("ln_1.weight") for name in weights)):
        h = f"transformer.h.{i}"
        qkv = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").chunk(3, -1)
        q, k, v = (part.unflatten(-1, (n_head, -1)).transpose(0, 1) for part in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)
        x = x + linear(y, f"{h}.attn.c_proj")
        y = F.gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc"), approximate=gelu)
        x = x + linear(y, f"{h}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ weights["lm_head.weight"].T


def nanogpt(folder: Path, bias: bool, compiled: bool, vocab_size: int = 128, **sizes) -> dict:
    """Writes a ckpt.pt as nanoGPT's train.py does, and returns its weights."""
    theirs = transformers_gpt2((vocab_size, 32, 2, 2, 16))
    weights = {
        name: w.T.contiguous() if "c_" in name and w.dim() == 2 else w
        for name, w in theirs.state_dict().items()
        if bias or not name.endswith("bias")
    }
    prefix = "_orig_mod." if compiled else ""
    args = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "dropout": 0.0}
    saved = {"model": {prefix + name: w for name, w in weights.items()}, "optimizer": {}}
    saved |= {"model_args": args | {"bias": bias, "vocab_size": vocab_size} | sizes}
    saved |= {"iter_num": 5, "best_val_loss": tensor(3.0), "config": {"dataset": "openwebtext"}}
    folder.mkdir(exist_ok=True)
    torch.save(saved, folder / "ckpt.pt")
    return weights


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_nanogpts_checkpoint_loads(bias, compiled, tmp_path, capsys):
    weights = nanogpt(tmp_path, bias, compiled)
    tokens = torch.randint(128, (30,), generator=torch.manual_seed(0))
    for source in (tmp_path, tmp_path / "ckpt.pt"):
        ours = GPT.load(source).eval()
        assert "nanoGPT's GELU is exact" in capsys.readouterr().err
        with torch.no_grad():
            logits = ours.logits(ours(pack([tokens[:1].tolist()], [tokens[1:].tolist()])))
        expected = nanogpt_logits(weights, 2, tokens, "tanh")
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
        exact = nanogpt_logits(weights, 2, tokens, "none")
        torch.testing.assert_close(logits, exact, atol=1e-2, rtol=0)


def test_nanogpts_padded_vocabulary_is_cut(tmp_path, gpt2_cache, capsys):
    nanogpt(tmp_path, bias=True, compiled=True, vocab_size=50304)
    ours, codec = GPT.load(tmp_path), Codec.load(tmp_path / "ckpt.pt")
    codec.check_vocabulary(ours.config.vocab_size)
    assert "47 of 50304 rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, needle",
    [
        ({"model_args": None}, "has no model_args; expected nanoGPT's ckpt.pt"),
        ({"model_args": {}}, "vocab_size is None; expected a positive number"),
        ({"model": None}, "is no tensor of weights"),
        ({"model": {}}, "weight h.0.attn.c_attn.bias is missing"),
    ],
)
def test_a_malformed_checkpoint_of_nanogpt_is_one_line(change, needle, tmp_path):
    nanogpt(tmp_path, bias=True, compiled=False)
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True) | change
    torch.save(saved, tmp_path / "ckpt.pt")
    with pytest.raises(UserError) as error:
        GPT.load(tmp_path)
    assert needle in str(error.value) and "\n" not in str(error.value)


# ---- everything out


def test_config_json_has_what_converters_read(tmp_path):
    encoding = get_tokenizer("toy")
    GPT(GPTConfig(encoding.n_vocab, 48, 1, 2, 16)).save(tmp_path, encoding)
    config = json.loads((tmp_path / "config.json").read_text())
    names = ("n_ctx", "n_positions", "n_embd", "n_layer", "n_head", "layer_norm_epsilon")
    assert [config[name] for name in names] == [48, 48, 16, 1, 2, 1e-5]
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    assert max(vocab.values()) < config["vocab_size"] == encoding.n_vocab
    assert len((tmp_path / "merges.txt").read_text().splitlines()) == encoding.n_vocab - 256


@pytest.mark.parametrize("bias", [0.0, -7.5, 300.0])
def test_the_reward_model_scores_the_same_in_transformers(bias, tmp_path):
    codec = Codec(get_tokenizer("toy"), "{prompt}\n")
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(codec.tokenizer.n_vocab, 64, 2, 2, 32))
    ours = ScalarModel(gpt).eval()
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
        ours.head.bias.fill_(bias)
    sizes = dataclasses.asdict(gpt.config)
    write_hugging_face(tmp_path, sizes, ours.state_dict(), codec.tokenizer)
    theirs, report = GPT2ForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    assert theirs.config.num_labels == 1
    pairs = [("Tell me a story.", "Once."), ("Sing!", "la " * 9), ("A long prompt, not short", "")]
    batch = pack([codec.prompt(p) for p, _ in pairs], [codec.response(r) for _, r in pairs])
    tokens = GPT2Tokenizer.from_pretrained(tmp_path)
    texts = [f"{prompt}\n{response}{END}" for prompt, response in pairs]
    padded = tokens(texts, padding=True, return_tensors="pt")
    assert (padded["input_ids"] == theirs.config.pad_token_id).any()
    with torch.no_grad():
        scores, found = ours.score(batch), theirs.eval()(**padded).logits[:, 0]
    torch.testing.assert_close(found, scores, atol=1e-5, rtol=2e-7)
    needle = "GPT2ForSequenceClassification'. is no language model; a reward model comes from rew"
    with pytest.raises(UserError, match=needle):
        GPT.load(tmp_path)
    with pytest.raises(UserError, match="holds another program's model; expected a stage's folder"):
        ScalarModel.load(tmp_path)


def test_an_export_never_mixes_with_another_model(tmp_path):
    encoding = get_tokenizer("toy")
    model = GPT(GPTConfig(encoding.n_vocab, 16, 1, 1, 8))
    for file in ("tokenizer.json", "checkpoint.pt"):
        (tmp_path / file).mkdir(parents=True)
        (tmp_path / file / "theirs").write_text("theirs")
        with pytest.raises(UserError, match=f"has a {file} already"):
            model.save(tmp_path / file / "..", encoding)
        assert not (tmp_path / "model.safetensors").exists()
        (tmp_path / file / "theirs").unlink()
        (tmp_path / file).rmdir()
    model.save(tmp_path, encoding)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(UserError, match="has a config.json already"):
        model.save(tmp_path, encoding)  # an earlier export is not replaced
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    transformers_gpt2(SHAPES[0]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"wte.weight": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read"):
        GPT.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_without_network_a_published_model_says_what_to_do(tmp_path, monkeypatch):
    def no_network(url, *_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(FileNotFoundError, match="put config.json and model.safetensors of gpt2 in"):
        GPT.load("gpt2")


def test_a_published_model_is_downloaded_once_and_checked(tmp_path, monkeypatch, capsys):
    transformers_gpt2(SHAPES[0]).save_pretrained(tmp_path / "hub")
    asked = []

    def fetch(url, target, hash_prefix=None):
        asked.append((url, hash_prefix))
        Path(target).write_bytes((tmp_path / "hub" / url.rpartition("/")[2]).read_bytes())

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for _ in range(2):
        assert GPT.load("gpt2").config.n_embd == 32
    urls = [HUB.format("gpt2", f) for f in ("config.json", "model.safetensors")]
    assert asked == [(urls[0], None), (urls[1], PUBLISHED["gpt2"])]
    assert download("gpt2") == tmp_path / "picorlhf" / "gpt2"
    assert "not verified" not in capsys.readouterr().err
    assert GPT.load("gpt2-medium").config.n_embd == 32
    assert "gpt2-medium/resolve/main/model.safetensors is not verified" in capsys.readouterr().err
    assert asked[-1][1] is None


# ---- safetensors


def test_safetensors_are_those_of_the_library(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    tensors = {"b": torch.randn(3, 4), "a": torch.randn(2), "scalar": tensor(1.5)}
    write_safetensors(tmp_path / "ours", tensors)
    low = {"half": torch.randn(2, 5).half(), "brain": torch.randn(4).bfloat16()}
    library.save_file(tensors | low, tmp_path / "theirs")
    for expected, found in (
        (tensors, library.load_file(tmp_path / "ours")),
        (tensors | low, read_safetensors(tmp_path / "theirs")),
    ):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert all(found[name].dtype == expected[name].dtype for name in expected)


def safetensors_bytes(header, data=bytes(16), n=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if n is None else n).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(4,), offsets=(0, 16)) -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


OVERLAP = entry() | {"b": entry(offsets=(8, 24))["a"]}
HOLE = entry(shape=(1,), offsets=(0, 4)) | {"b": entry(shape=(2,), offsets=(8, 16))["a"]}
MALICIOUS = {
    "empty": b"",
    "half a length": b"\1\0\0",
    "length beyond the file": safetensors_bytes(entry(), n=2**40),
    "the largest length": safetensors_bytes(entry(), n=2**64 - 1),
    "no JSON": safetensors_bytes(b"{]"),
    "invalid UTF-8": safetensors_bytes(b'{"\xff": 1}'),
    "deep nesting": safetensors_bytes(b"[" * 100_000),
    "an array": safetensors_bytes([1, 2]),
    "a number": safetensors_bytes(b"7"),
    "entry is null": safetensors_bytes({"a": None}),
    "entry without offsets": safetensors_bytes({"a": {"dtype": "F32", "shape": [4]}}),
    "unknown dtype": safetensors_bytes(entry(dtype="I64")),
    "dtype is a list": safetensors_bytes(entry(dtype=["F32"])),
    "negative size": safetensors_bytes(entry(shape=(-2, -2))),
    "size is true": safetensors_bytes(entry(shape=(True, 4))),
    "size is a float": safetensors_bytes(entry(shape=(4.0,))),
    "enormous size": safetensors_bytes(entry(shape=(2**62,))),
    "many dimensions": safetensors_bytes(entry(shape=(1,) * 70 + (4,))),
    "shape is text": safetensors_bytes(entry(shape="4")),
    "offsets past the end": safetensors_bytes(entry(shape=(8,), offsets=(0, 32))),
    "negative offsets": safetensors_bytes(entry(offsets=(-16, 0))),
    "offsets swapped": safetensors_bytes(entry(offsets=(16, 0))),
    "three offsets": safetensors_bytes(entry(offsets=(0, 8, 16))),
    "offsets are text": safetensors_bytes(entry(offsets=("0", "16"))),
    "offsets are not numbers": safetensors_bytes(entry(offsets=(float("nan"), 16))),
    "overlap": safetensors_bytes(OVERLAP, bytes(24)),
    "hole": safetensors_bytes(HOLE),
    "size that does not fit the shape": safetensors_bytes(entry(shape=(3,))),
    "bytes left over": safetensors_bytes(entry(), bytes(17)),
    "no data": safetensors_bytes(entry(), b""),
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_a_malicious_safetensors_file_is_one_line(name, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(MALICIOUS[name])
    with pytest.raises(ValueError, match="is no safetensors file that we read: ") as error:
        read_safetensors(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300), st.integers(0, 255), st.booleans())
def test_any_bytes_are_tensors_or_are_refused(tmp_path_factory, noise, at, value, whole):
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    content = bytearray(safetensors_bytes(entry()))
    content[at % len(content)] = value  # a good file with one byte changed; or nothing but noise
    path.write_bytes(noise if whole else bytes(content))
    try:
        tensors = read_safetensors(path)
    except ValueError:
        return
    assert sum(t.numel() * t.element_size() for t in tensors.values()) <= path.stat().st_size


# ---- checkpoints that are not what they should be


def test_a_foreign_checkpoint_is_one_line(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for saved in ([1, 2], {"model": {}}, tensor(1.0)):
        torch.save(saved, path)
        with pytest.raises(ValueError, match="is no checkpoint of a stage"):
            GPT.load(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cannot be read"):
        ScalarModel.load(tmp_path)


# ---- presets and the Python reward


@pytest.mark.parametrize("stage", [sft, reward, ppo])
def test_presets_are_defaults_that_a_flag_overrules(stage):
    assert parse(stage.Config, stage.PRESETS, []) == stage.Config()
    assert parse(stage.Config, stage.PRESETS, ["--preset", "toy"]) == stage.Config()
    for name, values in stage.PRESETS.items():
        assert parse(stage.Config, stage.PRESETS, ["--preset", name]) == stage.Config(**values) or (
            math.isnan(values["missing_eos_score"])
        )
        config = parse(stage.Config, stage.PRESETS, ["--lr", "0.5", "--preset", name])
        assert config.lr == 0.5 and all(
            getattr(config, name) == value or math.isnan(value)
            for name, value in values.items()
            if name != "lr"
        )


def test_presets_hold_published_numbers():
    """Ziegler et al. 2019 and lm-human-preferences; Huang et al. 2024; Ouyang et al. 2022."""
    instructgpt, tldr, sentiment = (ppo.PRESETS[n] for n in ("instructgpt", "tldr", "sentiment"))
    assert instructgpt["iterations"] * instructgpt["batch_size"] == 256_000
    assert (instructgpt["kl_coef"], instructgpt["ema_decay"]) == (0.02, 0.992)
    assert (tldr["lr"], tldr["kl_coef"], tldr["max_new_tokens"]) == (3e-6, 0.05, 53)
    assert (sentiment["kl_target"], sentiment["max_new_tokens"]) == (6.0, 24)


@pytest.fixture
def codec():
    return Codec(get_tokenizer("toy"), "{prompt}\\n")


def reward_function(source: str, codec: Codec, folder: Path) -> RewardFunction:
    (folder / "mine.py").write_text(source)
    return RewardFunction(f"{folder}/mine.py:score", codec)


def test_a_python_reward_sees_texts_and_prompts(codec, tmp_path):
    pairs = [("Tell me.", "Once."), ("Sing a song!", ""), ("x", "the end<|endoftext|>")]
    source = "def score(texts, prompts):\n    assert prompts[0] == 'Tell me.\\n', prompts\n"
    source += "    assert texts == ['Once.', '', 'the end<|endoftext|>'], texts\n"
    function = reward_function(source + "    return [len(t) for t in texts]", codec, tmp_path)
    batch = pack([codec.prompt(p) for p, _ in pairs], [codec.response(r) for _, r in pairs])
    assert function.score(batch).tolist() == [5.0, 0.0, 20.0]


@pytest.mark.parametrize(
    "source, needle",
    [
        ("def score(texts, prompts): return [1.0]", "returned [1.0] for 2 texts"),
        ("def score(texts, prompts): return [1.0, float('nan')]", "with a finite number for each"),
        ("def score(texts, prompts): return [1.0, 'good']", "returned [1.0, 'good'] for 2 texts"),
        ("def score(texts, prompts): return None", "returned None for 2 texts"),
        ("def score(texts, prompts): return 1 / 0", "ZeroDivisionError: division by zero"),
        ("def score(texts): return [1.0, 2.0]", "TypeError: score() takes 1 positional"),
        ("def other(texts, prompts): return [1.0, 2.0]", "has no function 'score'"),
        ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
        ("def score(:", "SyntaxError"),
    ],
)
def test_a_faulty_python_reward_is_one_line(source, needle, codec, tmp_path):
    with pytest.raises(UserError) as error:
        reward_function(source, codec, tmp_path).score(pack([[1], [2]], [[3], [4]]))
    assert needle in str(error.value) and "\n" not in str(error.value)


def test_a_missing_python_reward_names_the_file(codec, tmp_path):
    with pytest.raises(UserError, match="none.py:score: no Python file"):
        RewardFunction(f"{tmp_path}/none.py:score", codec)


# ---- python model.py


@pytest.fixture
def folder(tmp_path) -> str:
    torch.manual_seed(0)
    encoding = get_tokenizer("toy")
    GPT(GPTConfig(encoding.n_vocab, 64, 1, 2, 16)).save(tmp_path / "gpt", encoding)
    return str(tmp_path / "gpt")


def test_asking_two_models_gives_both_the_same_random_numbers(folder, capsys):
    ask(AskConfig(models=[folder, folder], prompt="Tell me a story.", max_new_tokens=8))
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and first.startswith(f"[{folder}] ")


@pytest.mark.parametrize(
    "flag",
    ["max_new_tokens=0", "max_new_tokens=-3", "temperature=-1", "temperature=nan", "top_k=-2"],
)
def test_a_number_that_asking_cannot_use_is_one_line(flag, folder):
    with pytest.raises(UserError, match=f"--{flag.split('=')[0]} .*: expected a number, "):
        parse(AskConfig, {}, [folder, f"--{flag}"])


def test_a_reward_model_is_exported_and_answers_nothing(folder, tmp_path):
    codec, scores = Codec(get_tokenizer("toy"), "{prompt}"), ScalarModel(GPT.load(folder))
    place = str(tmp_path / "reward")
    optimizer = adam([(scores, 0.0)])
    run = Run("reward", RunConfig(), place, scores.gpt.config, codec, optimizer, model=scores)
    run.save()
    with pytest.raises(UserError, match="reward is a reward model; use --export"):
        ask(AskConfig(models=[place], prompt="x"))
    with pytest.raises(UserError, match="takes one model, not 2"):
        ask(AskConfig(models=[place, folder], export=str(tmp_path / "both")))
    assert not (tmp_path / "both").exists()
    ask(AskConfig(models=[place], export=str(tmp_path / "export")))
    config = json.loads((tmp_path / "export/config.json").read_text())
    assert config["architectures"] == ["GPT2ForSequenceClassification"]


def test_asking_at_the_terminal_until_it_ends(folder):
    command = [sys.executable, str(ROOT / "model.py"), folder, "--max_new_tokens", "4"]
    result = subprocess.run(command, input="Hello\nAgain\n", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("> ") == 3 and not result.stderr


def test_export_writes_what_transformers_loads(folder, tmp_path, capsys):
    ask(AskConfig(models=[folder], export=str(tmp_path / "export")))
    assert "wrote" in capsys.readouterr().out
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "export").eval()
    assert_equal_models(GPT.load(folder), theirs)


def test_a_model_that_does_not_exist_is_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "model.py"), str(tmp_path / "nothing")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_a_refused_run_leaves_no_folder(folder, tmp_path):
    out = tmp_path / "new/reward"
    flags = ["--sft", folder, "--max_new_tokens", "5000", "--out", str(out)]
    command = [sys.executable, str(ROOT / "reward.py"), *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "the context is" in result.stderr and not out.exists()


# ---- fine-tuning starts from either


def test_fine_tuning_starts_from_a_folder_of_transformers(folder, tmp_path):
    flags = {"toy_demonstrations": 40, "batch_size": 20, "epochs": 1, "seed": 1}
    config = sft.Config(init=folder, out=str(tmp_path / "sft"), template="Q: {prompt}", **flags)
    sft.main(config)
    assert Codec.load(tmp_path / "sft").template == "Q: {prompt}"
    before, after = GPT.load(folder), GPT.load(tmp_path / "sft")
    assert not torch.equal(before.wte.weight, after.wte.weight)
