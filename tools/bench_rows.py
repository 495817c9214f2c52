"""How much a packed row saves: the same update from grouped rows, from one row for each response, and by transformers.

One process, one thread. The sides take turns in every round; the first round is dropped. What is printed are ratios
within a round, median and range, so the machine's own speed does not enter.

    python tools/bench_rows.py [--shape quickstart|visual] [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from megatron_vlrl.backends import Backend, BackendOptions, build_backend
from megatron_vlrl.backends.protocol import OptimizerStep
from megatron_vlrl.config.schema import AlgorithmConfig, LossConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_vlrl.packing import packed_tokens
from megatron_vlrl.runtime.launch import World
from megatron_vlrl.runtime.process import joined
from megatron_vlrl.train.minibatches import TrainGroup
from megatron_vlrl.train.update import Updater
from megatron_vlrl.types import Message, Prompt, Rollout, RolloutGroup, Sample, Sampling


@dataclass(frozen=True)
class Shape:
    """One image of `grid` patches in a prompt with `text` further tokens; G answers of `answer` tokens each."""

    prompts: int
    text: int
    grid: tuple[int, int, int]
    answer: int
    rollouts: int


SHAPES = {
    "quickstart": Shape(prompts=20, text=14, grid=(1, 6, 6), answer=11, rollouts=8),
    "visual": Shape(prompts=2, text=30, grid=(1, 62, 64), answer=128, rollouts=8),
}


def make_model(folder: Path, width: int = 1) -> None:
    """The quickstart's architecture with random weights, `width` times as wide, written as a Hugging Face folder."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from examples.quickstart.make_model import quickstart_config, random_model
    from tools.train_tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["How many digits? <think>count</think><answer>3</answer>"] * 50, 330)
    config = quickstart_config(tokenizer)
    config.text_config.hidden_size *= width
    config.text_config.intermediate_size *= width
    config.vision_config.out_hidden_size *= width
    random_model(config, tokenizer, seed=0).save_pretrained(folder)


def make_groups(shape: Shape, folder: Path) -> list[RolloutGroup]:
    """Random tokens, pixels and answers of one shape."""
    from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
    from megatron_vlrl.models.qwen3_vl.geometry import image_token_count, mrope_positions

    spec = Qwen3VLSpec.load(folder)
    random = np.random.default_rng(0)
    image = [spec.vision_start_token_id]
    image += [spec.image_token_id] * image_token_count(shape.grid, spec.vision.merge_size)
    image += [spec.vision_end_token_id]
    groups = []
    for position in range(shape.prompts):
        words = random.integers(20, 300, shape.text).tolist()
        ids = (*words[: shape.text // 2], *image, *words[shape.text // 2 :])
        patches = random.standard_normal((int(np.prod(shape.grid)), spec.vision.patch_dim), dtype=np.float32)
        sample = Sample(
            key=str(position),
            task="bench",
            messages=(Message(role="user", content=""),),
            images=(),
            answer="",
            position=position,
        )
        prompt = Prompt(
            sample=sample,
            token_ids=ids,
            positions=mrope_positions(ids, (shape.grid,), spec),
            grids=(shape.grid,),
            patches=(patches,),
        )
        rollouts = tuple(_rollout(random, shape.answer) for _ in range(shape.rollouts))
        groups.append(RolloutGroup(prompt=prompt, rollouts=rollouts))
    return groups


def _rollout(random: np.random.Generator, length: int) -> Rollout:
    ids = tuple(random.integers(20, 300, length).tolist())
    log_probs = np.full(length, -6.0, np.float32)
    return Rollout(
        token_ids=ids, log_probs=log_probs, temperature=1.0, text="", finish_reason="length", weight_version=0
    )


def train_groups(groups: Sequence[RolloutGroup]) -> list[TrainGroup]:
    """Groups with alternating advantages and the weights of a token mean."""
    tokens = sum(len(rollout.token_ids) for group in groups for rollout in group.rollouts)
    return [
        TrainGroup(
            group=group,
            advantages=np.resize([1.0, -1.0], len(group.rollouts)),
            weights=np.full(len(group.rollouts), 1.0 / tokens),
            task=0,
        )
        for group in groups
    ]


def make_backend(folder: Path) -> Backend:
    """The megatron backend in this process."""
    sampling = Sampling(n=1, temperature=1.0, max_new_tokens=1, stop_token_ids=(0,))
    options = BackendOptions(
        folder=folder,
        model=ModelConfig(path=str(folder)),
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(lr=1e-4),
        sampling=sampling,
        seed=0,
    )
    return build_backend(options)


def ours(backend: Backend, groups: Sequence[RolloutGroup]) -> Callable[[str], object]:
    """One update on the megatron backend."""
    algorithm = AlgorithmConfig(loss=LossConfig(aggregation="token_mean", importance="none"))
    updater = Updater(
        backend=backend,
        task_names=("bench",),
        microbatch_tokens=16384,
        cost=packed_tokens,
    )
    members = {
        "grouped": train_groups(groups),
        "single": train_groups([one for group in groups for one in split(group)]),
    }

    def update(kind: str) -> object:
        (batches,) = updater.prepare([members[kind]], algorithm, version=None)
        return updater.update(batches, algorithm, OptimizerStep(lr=1e-4, clip_norm=1.0, weight_decay=0.0))

    return update


def split(group: RolloutGroup) -> list[RolloutGroup]:
    """A group for each response: what training without shared prompts computes."""
    return [replace(group, rollouts=(rollout,)) for rollout in group.rollouts]


def theirs(folder: Path, groups: Sequence[RolloutGroup]) -> Callable[[], None]:
    """The same update by transformers: rows of equal length, prompt and image repeated, head on answers only."""
    from transformers import Qwen3VLForConditionalGeneration

    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    rows = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
    per_batch = max(1, 16384 // (len(rows[0][0].token_ids) + len(rows[0][1].token_ids)))
    old = -6.0

    def update() -> None:
        optimizer.zero_grad()
        for start in range(0, len(rows), per_batch):
            batch = rows[start : start + per_batch]
            ids = torch.tensor([[*prompt.token_ids, *rollout.token_ids] for prompt, rollout in batch])
            grids = torch.tensor([prompt.grids[0] for prompt, _ in batch])
            types = (ids == model.config.image_token_id).int()
            positions, _ = model.model.get_rope_index(ids, types, image_grid_thw=grids)
            hidden = model.model(
                input_ids=ids,
                position_ids=positions,
                pixel_values=torch.cat([torch.from_numpy(prompt.patches[0]) for prompt, _ in batch]),
                image_grid_thw=grids,
                mm_token_type_ids=types,
                use_cache=False,
            ).last_hidden_state
            length = len(batch[0][1].token_ids)
            logits = model.lm_head(hidden[:, -length - 1 : -1]).float()
            log_probs = logits.log_softmax(-1).gather(2, ids[:, -length:, None])[..., 0]
            ratio = (log_probs - old).clamp(-20, 20).exp()
            sign = torch.tensor([1.0, -1.0]).repeat(len(batch))[: len(batch), None]
            (-torch.min(ratio * sign, ratio.clamp(0.8, 1.2) * sign)).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return update


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="quickstart")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    world = World(rank=0, local_rank=0, size=1, launcher="none")
    with tempfile.TemporaryDirectory() as folder, joined(world, timeout_seconds=60, threads=1):
        make_model(Path(folder))
        groups = make_groups(shape, Path(folder))
        update = ours(make_backend(Path(folder)), groups)
        sides: dict[str, Callable[[], object]] = {
            "grouped rows": lambda: update("grouped"),
            "a row for each response": lambda: update("single"),
            "transformers, padded": theirs(Path(folder), groups),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(arguments.rounds + 1):
            for name, run in sides.items():
                start = time.process_time()
                run()
                seconds[name].append(time.process_time() - start)
    base = seconds["grouped rows"][1:]
    print(f"{arguments.shape}: {shape}; CPU seconds of one update, {arguments.rounds} rounds, one thread")
    for name, values in seconds.items():
        ratios = [value / own for value, own in zip(values[1:], base, strict=True)]
        print(
            f"{name:<26} {statistics.median(values[1:]):7.3f} s   / grouped: median {statistics.median(ratios):.2f}, "
            f"range {min(ratios):.2f} to {max(ratios):.2f}"
        )


if __name__ == "__main__":
    main()
