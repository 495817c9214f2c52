"""The converted tokenizer is SentencePiece's, id for id; the quickstart's model folder is whole and seeded."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3VLProcessor,
)

from examples.quickstart.make_model import make_model
from tools.train_tokenizer import SPECIAL_TOKENS, TAGS, to_fast_tokenizer, train_sentencepiece

ROOT = Path(__file__).resolve().parents[1]
LINES = [
    text
    for n in range(300)
    for text in (
        "How many digits?",
        f"Which digit: {n % 10}, {n * 7 % 10} or {n * 3 % 10}?",
        "Sum of the two digits?",
        f"<think>{n % 9}+{n % 7}</think><answer>{n % 9 + n % 7}</answer>",
        "Give the box of the digit.",
        f"<think>box</think><answer>[{n % 4},{n % 3},{n % 4 + 3},{n % 3 + 4}]</answer>",
        "user",
        "assistant",
    )
]


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_sentencepiece(LINES, 352)


@pytest.fixture(scope="module")
def tokenizer(model: bytes, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """Saved and loaded again, as everything else sees it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    to_fast_tokenizer(model).save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


def strings() -> list[str]:
    """The text itself, hand-picked traps, and 4,000 random strings over familiar and unseen characters."""
    rng = random.Random(0)
    familiar = [*"abcdefghij digtsumow?.,:[]0123456789", *TAGS, "  ", "\n"]
    unseen = [*map(chr, range(32, 127)), "\t", "\r\n", "é", "你", "😀", "\u2028", "\u0301"]
    out = sorted(set(LINES))
    out += [
        "",
        " ",
        "   ",
        "\n\n",
        " <think> x</think> ",
        "<|im_start|>user\nHow?<|im_end|>\n",
        "1234 56",
        "<think",
        "think>",
    ]
    out += ["".join(rng.choices(familiar, k=rng.randint(1, 40))) for _ in range(2000)]
    out += ["".join(rng.choices(unseen, k=rng.randint(1, 40))) for _ in range(2000)]
    return out


def test_ids_are_sentencepiece_s(model: bytes, tokenizer: PreTrainedTokenizerFast) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert len(tokenizer) == reference.get_piece_size()
    texts = strings()
    got = tokenizer(texts, add_special_tokens=False)["input_ids"]
    wrong = [text for text, ids, want in zip(texts, got, reference.encode(texts), strict=True) if ids != want]
    assert wrong == []


def test_round_trip(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = strings()
    assert tokenizer.batch_decode(tokenizer(texts, add_special_tokens=False)["input_ids"]) == texts


def test_merges_were_learned_and_digits_stand_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer.tokenize("How many digits?")) <= 6
    pieces = [piece for piece in tokenizer.get_vocab() if not piece.startswith("<0x")]
    assert [p for p in pieces if len(p) > 1 and any(c.isdigit() for c in p)] == []


def test_special_tokens_and_tags_are_single(tokenizer: PreTrainedTokenizerFast) -> None:
    for token in (*SPECIAL_TOKENS, *TAGS):
        assert len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1
    text = "<|im_start|><think>a</think><|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == "<think>a</think>"


def test_command_line_writes_a_loadable_folder(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("\n".join(LINES))
    options = ["--text", str(tmp_path / "text"), "--vocab", "352", "--out", str(tmp_path / "out")]
    command = [sys.executable, "tools/train_tokenizer.py", *options]
    subprocess.run(command, cwd=ROOT, check=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    records = [{"prompt": LINES[i], "meta": {"demonstration": LINES[i + 3]}} for i in range(0, len(LINES), 4)]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_quickstart_model_loads_as_the_real_classes(data: Path, tmp_path: Path) -> None:
    count = make_model(data, tmp_path / "m", seed=3)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "m")
    assert count == sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 2) == 1.32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.text_config.vocab_size == 384
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    processor = AutoProcessor.from_pretrained(tmp_path / "m")
    assert isinstance(processor, Qwen3VLProcessor)
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id


def test_quickstart_weights_follow_the_seed_alone(data: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_model(data, tmp_path / name, seed)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]
    assert torch.equal(before, torch.random.get_rng_state())


def test_torchvision_declarations_are_inert_where_they_are_not_needed() -> None:
    """A fresh interpreter (-S: without the installed copy): no torch until torchvision itself is imported."""
    code = (
        "import sys, torchvision_cpu\n"
        "from importlib.util import find_spec; assert find_spec('torchvision'); assert 'torch' not in sys.modules\n"
        "import torch; torch.version.cuda = '13.0'\n"
        "from pathlib import Path; assert torchvision_cpu.declare_operators(Path('.')) is False\n"
        "assert not hasattr(torch.ops.torchvision, 'nms')\n"
        "torch.version.cuda = None; import torchvision.transforms.v2, torchvision.io\n"
        "assert hasattr(torch.ops.torchvision, 'nms')\n"
    )
    path = os.pathsep.join([str(ROOT / "tools"), *sys.path])
    subprocess.run([sys.executable, "-S", "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True)
