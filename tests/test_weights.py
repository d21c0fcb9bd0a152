"""Weights in and out: transformers' folders both ways, malicious files, presets, the terminal."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

import ppo
import reward
import sft
from data import tokenizer
from data.python_reward import RewardFunction
from data.tokenizer import get_tokenizer
from data.weights import HUB, PUBLISHED, download, read_safetensors, write_safetensors
from model import (
    GPT,
    AskConfig,
    Codec,
    GPTConfig,
    ScalarModel,
    ask,
    generate,
    pack,
    parse,
)

ROOT = Path(__file__).parents[1]
SHAPES = [  # vocabulary, context, layers, heads, channels
    (128, 64, 2, 2, 32),
    (257, 48, 3, 4, 64),
    (1024, 96, 1, 1, 48),
]


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


def test_gpt2s_own_tokenizer_files(tmp_path, monkeypatch):
    cache = ROOT.parent / "shared/data/tiktoken_cache"
    if not cache.exists():
        pytest.skip(f"{cache} is absent")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    encoding, text = get_tokenizer("gpt2"), "Zoë didn't   pay 1,234 €.\n\n😀 "
    for name, content in tokenizer.hugging_face_files(encoding).items():
        (tmp_path / name).write_text(content, "utf-8")
    assert GPT2Tokenizer.from_pretrained(tmp_path).encode(text) == encoding.encode_ordinary(text)


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


def test_a_published_model_is_downloaded_once_and_checked(tmp_path, monkeypatch):
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
    assert download("gpt2") == tmp_path / "nanorlhf" / "gpt2"


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
        assert config.lr == 0.5 and config.batch_size == values["batch_size"]


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
        ("def score(texts, prompts): return [1.0, float('nan')]", "expected a finite number"),
        ("def score(texts, prompts): return [1.0, 'good']", "could not convert string to float"),
        ("def score(texts, prompts): return None", "'NoneType' object is not iterable"),
        ("def score(texts, prompts): return 1 / 0", "ZeroDivisionError: division by zero"),
        ("def score(texts): return [1.0, 2.0]", "TypeError: score() takes 1 positional"),
        ("def other(texts, prompts): return [1.0, 2.0]", "has no function 'score'"),
        ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
        ("def score(:", "SyntaxError"),
    ],
)
def test_a_faulty_python_reward_is_one_line(source, needle, codec, tmp_path):
    with pytest.raises(ValueError) as error:
        reward_function(source, codec, tmp_path).score(pack([[1], [2]], [[3], [4]]))
    assert needle in str(error.value) and "\n" not in str(error.value)


def test_a_missing_python_reward_names_the_file(codec, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.py"):
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


# ---- fine-tuning starts from either


def test_fine_tuning_starts_from_a_folder_of_transformers(folder, tmp_path):
    flags = {"toy_demonstrations": 40, "batch_size": 20, "epochs": 1, "seed": 1}
    config = sft.Config(init=folder, out=str(tmp_path / "sft"), template="Q: {prompt}", **flags)
    sft.main(config)
    assert Codec.load(tmp_path / "sft").template == "Q: {prompt}"
    before, after = GPT.load(folder), GPT.load(tmp_path / "sft")
    assert not torch.equal(before.wte.weight, after.wte.weight)
