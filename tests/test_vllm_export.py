"""What we export loads in vLLM, with the log-probs that transformers has for the same folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_vlrl.backends import build_backend
from megatron_vlrl.checkpoint.export import export_model
from megatron_vlrl.cli import main
from megatron_vlrl.packing import pack
from tests.reference import at_rate, backend_options, make_groups, renderer_and_sampling
from tests.run_folder import REPOSITORY
from tests.spawn import run_ranks
from tests.test_backend_state import surprise
from tests.tiny import png, tiny_config, tiny_tokenizer, write_tiny

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(600)]  # the first one waits for vLLM

TWO_BY_TWO = {"tensor": 2, "pipeline": 2}
MODELS = ("tied", "untied", "experts")
IMAGES: tuple[list[tuple[int, int]], ...] = ([], [(96, 96)], [(128, 64), (64, 96)])  # of each prompt, width and height
SAMPLES, TOKENS = 3, 16
LARGEST_DIFFERENCE = 2e-5  # nats; of a token's log-prob, in float32
VISUAL = "model.visual.blocks.1.attn.proj.weight"


def make_model(folder: Path, *, tied: bool, moe: bool = False) -> Path:
    """A tiny model with heads as wide as vLLM's attention on a CPU asks for, stored as the published ones are."""
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer, tied=tied, layers=4, vision_depth=3, deepstack=(0, 2), moe=moe)
    config.text_config.head_dim = 32
    config.text_config.rope_parameters["mrope_section"] = [6, 5, 5]
    if moe:
        config.text_config.norm_topk_prob = True  # in published configs; transformers takes it for granted
    write_tiny(folder, config, tokenizer)
    if moe:
        change(folder, lambda name, weight: weight.transpose(1, 2) if ".experts." in name else weight)
    return folder


def change(folder: Path, new: Any) -> None:
    """Replace every weight of a folder by new(name, weight)."""
    path = folder / "model.safetensors"
    weights = {name: new(name, weight).contiguous() for name, weight in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def step_and_export(folder: Path, out: Path) -> None:
    """One optimizer step over four ranks, and their export."""
    renderer, sampling = renderer_and_sampling(folder)
    backend = build_backend(backend_options(folder, sampling, **TWO_BY_TWO))
    backend.train_step([pack(make_groups(renderer), multiple=2)], surprise, at_rate(1e-2))
    export_model(backend, out, folder)
    backend.close()


def through_a_checkpoint(folder: Path, root: Path, out: Path) -> None:
    """`convert` to a checkpoint of eight ranks, and back."""
    cut = ["--tensor", "2", "--pipeline", "2", "--expert", "2"]
    assert main(["convert", "--from-hf", str(folder), "--to", str(root / "checkpoint"), *cut]) == 0
    assert main(["convert", "--from", str(root / "checkpoint"), "--to-hf", str(out)]) == 0


def write_request(path: Path, folders: list[Path], prompts: list[dict[str, Any]], special: set[int]) -> Path:
    allowed = [token for token in range(len(tiny_tokenizer())) if token not in special]
    request = {"seed": 0, "samples": SAMPLES, "tokens": TOKENS, "allowed": allowed, "prompts": prompts}
    path.write_text(json.dumps({**request, "folders": [str(folder) for folder in folders]}))
    return path


def ask_vllm(request: Path, result: Path) -> list[list[dict[str, Any]]]:
    process = subprocess.run(
        [sys.executable, "-m", "tests.vllm_score", str(request), str(result)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    found: list[list[dict[str, Any]]] = json.loads(result.read_text())
    return found


def make_prompts(folder: Path, root: Path) -> list[dict[str, Any]]:
    """Text as the chat template has it, and image files."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    prompts = []
    for number, sizes in enumerate(IMAGES):
        files = [root / f"{number}-{index}.png" for index in range(len(sizes))]
        for index, (file, size) in enumerate(zip(files, sizes, strict=True)):
            file.write_bytes(png(size, seed=10 * number + index))
        content = [*({"type": "image"} for _ in sizes), {"type": "text", "text": "How many digits?"}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        prompts.append({"text": text, "images": [str(file) for file in files]})
    return prompts


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], list[dict[str, Any]], dict[str, Any]]:
    """(exported folders, prompts, what vLLM said of each folder); "spoilt" is "tied" with one other tensor."""
    root = tmp_path_factory.mktemp("vllm")
    sources = {
        "tied": make_model(root / "tied", tied=True),
        "untied": make_model(root / "untied", tied=False),
        "experts": make_model(root / "experts", tied=False, moe=True),
    }
    folders = {name: root / f"{name}-exported" for name in sources}
    for name in ("tied", "untied"):
        run_ranks(step_and_export, 4, sources[name], folders[name])
        assert (folders[name] / "model.safetensors").read_bytes() != (sources[name] / "model.safetensors").read_bytes()
    through_a_checkpoint(sources["experts"], root, folders["experts"])
    folders["spoilt"] = root / "spoilt"
    shutil.copytree(folders["tied"], folders["spoilt"])
    change(folders["spoilt"], lambda name, weight: weight * 1.01 if name == VISUAL else weight)

    prompts = make_prompts(sources["tied"], root)
    special = set(renderer_and_sampling(sources["tied"])[1].banned_token_ids)
    request = write_request(root / "request.json", list(folders.values()), prompts, special)
    found = ask_vllm(request, root / "result.json")
    return folders, prompts, dict(zip(folders, found, strict=True))


def differences(folder: Path, prompts: list[dict[str, Any]], said: list[dict[str, Any]]) -> list[float]:
    """Of each prompt: the largest difference between vLLM's log-probs and those of transformers with `folder`."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    largest = []
    for prompt, theirs in zip(prompts, said, strict=True):
        images = [Image.open(path) for path in prompt["images"]] or None
        inputs = processor(text=[prompt["text"]], images=images, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == theirs["ids"]
        assert len(theirs["answers"]) == SAMPLES
        found = []
        for answer in theirs["answers"]:
            assert len(answer["ids"]) == TOKENS
            ours = transformers_log_probs(model, inputs, answer["ids"])
            found.append((ours - torch.tensor([*theirs["log_probs"], *answer["log_probs"]])).abs().max().item())
        largest.append(max(found))
    return largest


@torch.no_grad()
def transformers_log_probs(model: Any, inputs: Mapping[str, Tensor], answer: list[int]) -> Tensor:
    """Log-prob of every token of prompt and answer but the first."""
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
    pixels = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    types = (ids == model.config.image_token_id).int()
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types, **pixels).logits
    return logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


@pytest.mark.parametrize("name", MODELS)
def test_vllm_has_the_log_probs_of_transformers(name, asked):
    folders, prompts, said = asked
    found = differences(folders[name], prompts, said[name])
    assert max(found) < LARGEST_DIFFERENCE, found


def test_one_changed_tensor_of_the_vision_tower_is_seen_with_images_alone(asked):
    folders, prompts, said = asked
    text, *images = differences(folders["tied"], prompts, said["spoilt"])
    assert text < LARGEST_DIFFERENCE
    assert min(images) > 10 * LARGEST_DIFFERENCE, images
