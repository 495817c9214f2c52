"""Follows one sample through every stage of a step, on a CPU, in one process, with a small model made on the spot.

    python tools/trace_sample.py            print the record after each stage
    python tools/trace_sample.py --write    put them into docs/tour.md

This is `Run.step` of megatron_vlrl/loop.py, line by line, with a look at each result. One thing is put in by hand: a
random model answers nothing right, so two written answers stand in for its own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from examples.quickstart import make_digits, make_model
from megatron_vlrl.backends.protocol import OptimizerStep
from megatron_vlrl.config.load import load
from megatron_vlrl.config.schema import Config
from megatron_vlrl.data.prepare import prepare
from megatron_vlrl.loop import Run
from megatron_vlrl.packing import pack
from megatron_vlrl.runtime.launch import World
from megatron_vlrl.runtime.process import joined
from megatron_vlrl.runtime.seed import seed_all
from megatron_vlrl.tasks.reward import reward_group
from megatron_vlrl.train.divide import divide
from megatron_vlrl.train.estimate import estimate
from megatron_vlrl.train.rewards import gather_table, score_groups
from megatron_vlrl.train.statistics import step_means
from megatron_vlrl.types import Prompt, Rollout, RolloutGroup, StepStats
from tools import tour_lines as lines
from tools.pages import code_block, write_parts

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tour.md"
ITEMS = 200  # enough text for a tokenizer; the tour looks at one


def trace(config: Config) -> dict[str, str]:
    """One step with one prompt: the record after each stage, by the stage's name."""
    show: dict[str, str] = {}
    run = Run(config)

    [prompt] = run.loader.next(1)
    show["shard"] = lines.of_shard(Path(config.data.train), prompt.sample)
    show["sample"] = lines.of_sample(prompt.sample)
    show["prompt"] = lines.of_prompt(prompt, run.renderer.spec.image_token_id)

    [own] = run.engine.generate([prompt], run.sampling)
    reward = partial(reward_group, config=config.reward)
    show["engine"] = lines.of_engine(own, reward(own), trainer_log_probs(run, own))
    groups = [written_group(run, prompt)]
    show["rollouts"] = lines.of_group(groups[0])

    scored = score_groups(groups, reward, run.groups.model)
    show["rewards"] = lines.of_rewards(scored[0].rewards)
    table = gather_table(scored, run.groups.data, run.tasks)
    result = estimate(table, config.algorithm.advantage, {})
    show["advantages"] = lines.of_table(table, result)

    division = divide(scored, table, result, config, step=0, cost=run.cost, data=run.groups.data)
    show["minibatch"] = lines.of_minibatch(division.updates[0])
    [[row]] = run.updater.prepare(division.updates, config.algorithm, version=0)
    show["row"] = lines.of_row(row)

    [before] = run.backend.score([row])
    update = run.updater.update([row], config.algorithm, OptimizerStep.of(config.optimizer, lr=config.optimizer.lr))
    show["update"] = lines.of_update(before, update, config.optimizer.lr)

    run.engine.update_weights(run.backend.hf_weights(), 1)
    [after] = run.backend.score([row])
    gains = [float(part.sum()) for part in (after.log_probs - before.log_probs).split(list(row.lengths))]
    show["weights"] = lines.of_weights([(name, w.numel()) for name, w in run.backend.hf_weights()], gains)

    means = step_means([table], table, result, [update], config.reward)
    stats = StepStats(step=1, means=means, scalars={"lr": config.optimizer.lr}, seconds={})
    show["metrics"] = lines.of_stats(stats, prompt.sample.task)
    run.backend.close()
    return show


def written_group(run: Run, prompt: Prompt) -> RolloutGroup:
    """Two answers by hand, a right and a wrong one, with the log-probs that the model gives them."""
    right = prompt.sample.meta["demonstration"]
    wrong = right.replace(f"<answer>{prompt.sample.answer}<", "<answer>10<")
    rollouts = tuple(_written(run, text) for text in (right, wrong))
    log_probs = trainer_log_probs(run, RolloutGroup(prompt=prompt, rollouts=rollouts))
    parts = np.split(log_probs, [len(rollouts[0].token_ids)])
    known = (replace(rollout, log_probs=part) for rollout, part in zip(rollouts, parts, strict=True))
    return RolloutGroup(prompt=prompt, rollouts=tuple(known))


def _written(run: Run, text: str) -> Rollout:
    ids = (*run.renderer.encode(text), run.renderer.stop_token_ids[0])
    unknown = np.zeros(len(ids), np.float32)
    temperature = run.config.rollout.temperature
    return Rollout(
        token_ids=ids, log_probs=unknown, temperature=temperature, text=text, finish_reason="stop", weight_version=0
    )


def trainer_log_probs(run: Run, group: RolloutGroup) -> np.ndarray:
    """What the trainer's model gives the group's response tokens, one response after another: float32[R]."""
    [scores] = run.backend.score([pack([group])])
    return scores.log_probs.numpy()


def make_config(folder: Path) -> Config:
    """Digits on canvases, a tokenizer and a random model from them, shards, and the settings of one step."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    make_digits.write(folder, "train", make_digits.split_scans()[0], ITEMS, seed=0)
    make_model.make_model(folder / "train.jsonl", folder / "model", seed=0)
    prepare(folder / "train.jsonl", folder / "images", folder / "shards", samples_per_shard=100)
    settings = {
        "run.folder": folder / "run",
        "model.path": folder / "model",
        "data.train": folder / "shards",
        "rollout.samples_per_prompt": 2,
        "rollout.max_new_tokens": 24,
        "optimizer.lr": 1e-3,
        "train.steps": 1,
    }
    return load(None, [f"{key}={value}" for key, value in settings.items()])


def take_tour() -> dict[str, str]:
    """Make everything in a temporary folder, and trace; torch.distributed is joined and left."""
    world = World(rank=0, local_rank=0, size=1, launcher="none")
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(Path(folder))
        with joined(world, timeout_seconds=60, threads=1):
            seed_all(config.run.seed)
            return trace(config)


def main() -> None:
    """Print the tour, or write it into its page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    parts = take_tour()
    if arguments.write:
        write_parts(PAGE, {name: code_block(text) for name, text in parts.items()})
    else:
        print("\n\n".join(f"== {name}\n{text}" for name, text in parts.items()))


if __name__ == "__main__":
    main()
