"""The nouns of a step in; the lines of text that the tour shows of them out. Numbers are rounded so that another
processor, which adds in another order, prints the same ones."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vlrl.backends.protocol import TokenScores, UpdateResult
from megatron_vlrl.data.manifest import load, load_index
from megatron_vlrl.data.objects import open_store
from megatron_vlrl.packing import Microbatch
from megatron_vlrl.train.minibatches import TrainGroup
from megatron_vlrl.types import AdvantageResult, Prompt, RewardBreakdown, RewardTable, RolloutGroup, Sample, StepStats


def aligned(rows: Iterable[tuple[str, object]]) -> str:
    """One line for each (name, value)."""
    table = [(name, str(value)) for name, value in rows]
    width = max(len(name) for name, _ in table)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in table)


def listed(values: Iterable[Any], most: int = 60) -> str:
    """All values, or the first and last of more than `most`."""
    texts = [str(value) for value in values]
    if len(texts) > most:
        texts = [*texts[: most // 2], "...", *texts[-most // 2 :]]
    return " ".join(texts)


def span(place: tuple[int, int]) -> str:
    """A half-open range of places."""
    return f"places {place[0]} to {place[1] - 1}"


def of_shard(folder: Path, sample: Sample) -> str:
    """Where the sample lies in its tar file, and the members there."""
    store = open_store(folder)
    manifest, _ = load(store)
    index = load_index(store, manifest)
    number = next(i for i in range(len(index)) if index.key(i) == sample.key)
    shard = manifest.shards[int(index.shard[number])].name
    start, size = int(index.offset[number]), int(index.size[number])
    with tarfile.open(folder / shard) as tar:
        members = [member.name for member in tar if start <= member.offset < start + size]
    return aligned(
        [
            ("manifest", f"{manifest.samples} samples in {len(manifest.shards)} shards: {dict(manifest.tasks)}"),
            ("index", f"row {number}: {shard}, {size} bytes from {start}"),
            *(("member", name) for name in members),
        ]
    )


def of_sample(sample: Sample) -> str:
    """The question as stored."""
    return aligned(
        [
            ("key, task", f"{sample.key}, {sample.task}"),
            ("position", sample.position),
            *(("message", f"{message.role}: {message.content!r}") for message in sample.messages),
            *(("image", f"encoded; it begins with {image[:4]!r}") for image in sample.images),
            ("answer", repr(sample.answer)),
        ]
    )


def of_prompt(prompt: Prompt, image_token: int) -> str:
    """Token ids, positions and patches."""
    marks = ["#" if token == image_token else token for token in prompt.token_ids]
    tokens = len(prompt.token_ids)
    return aligned(
        [
            ("token_ids", f"{tokens}, # an image token: {listed(marks)}"),
            *(
                (f"positions, {name}", listed(row))
                for name, row in zip(("time", "height", "width"), prompt.positions, strict=True)
            ),
            *(
                ("image", f"grid {grid}, {patches.shape[0]} patches of {patches.shape[1]} numbers")
                for grid, patches in zip(prompt.grids, prompt.patches, strict=True)
            ),
        ]
    )


def of_engine(group: RolloutGroup, rewards: Sequence[RewardBreakdown], trainer: NDArray[np.float32]) -> str:
    """What the model wrote by itself, and how far the trainer's log-probs are from the engine's."""
    engine = np.concatenate([rollout.log_probs for rollout in group.rollouts])
    close = float(abs(trainer - engine).max()) < 1e-4
    return aligned(
        [
            *(
                (f"rollout {i}", f"{len(r.token_ids)} tokens, ends by {r.finish_reason}, reward {reward.total:.1f}")
                for i, (r, reward) in enumerate(zip(group.rollouts, rewards, strict=True))
            ),
            ("log-probs", f"engine and trainer {'agree' if close else 'DIFFER'} (largest difference under 1e-4)"),
        ]
    )


def of_group(group: RolloutGroup) -> str:
    """Each answer with its tokens and their log-probs."""
    rows: list[tuple[str, object]] = []
    for number, rollout in enumerate(group.rollouts):
        rows += [
            (f"rollout {number}", rollout.text),
            ("token_ids", f"{len(rollout.token_ids)}: {listed(rollout.token_ids)}"),
            ("log_probs", listed(f"{value:.2f}" for value in rollout.log_probs)),
        ]
    return aligned(rows)


def of_rewards(rewards: Sequence[RewardBreakdown]) -> str:
    """The sum behind each total."""

    def terms(reward: RewardBreakdown) -> str:
        return " + ".join(f"{weight:g} * {name} {reward.components[name]:g}" for name, weight in reward.weights.items())

    return aligned((f"rollout {i}", f"{terms(reward)} = {reward.total:g}") for i, reward in enumerate(rewards))


def of_table(table: RewardTable, result: AdvantageResult) -> str:
    """The rows that every rank holds, with their advantages."""
    lines = [f"{'position':>8} {'rollout':>7} {'task':>6} {'total':>6} {'length':>6} {'advantage':>9}"]
    for i, task in enumerate(table.task):
        lines.append(
            f"{table.position[i]:>8} {table.rollout[i]:>7} {table.task_names[task]:>6} {table.total[i]:>6.2f} "
            f"{table.length[i]:>6} {result.values[i]:>+9.3f}"
        )
    return "\n".join(lines)


def of_minibatch(members: Sequence[TrainGroup]) -> str:
    """The weight of each response's tokens."""
    responses = sum(len(member.group.rollouts) for member in members)
    rows: list[tuple[str, object]] = [("responses", f"{responses} with a reward, over all ranks")]
    for member in members:
        for number, (rollout, weight) in enumerate(zip(member.group.rollouts, member.weights, strict=True)):
            length = len(rollout.token_ids)
            fraction = f"1 / ({responses} * {length})"
            rows.append((f"rollout {number}", f"{length} tokens, each of weight {weight:.4f} = {fraction}"))
    return aligned(rows)


def of_row(row: Microbatch) -> str:
    """Where prompt and answers lie in the packed row, and which tokens are predicted from where."""
    [segment] = row.segments
    return aligned(
        [
            ("input_ids", f"{len(row.input_ids)} tokens"),
            ("prompt", span(segment.prompt)),
            *((f"response {i}", span(place)) for i, place in enumerate(segment.responses)),
            ("logit_rows", f"{len(row.logit_rows)}: {listed(row.logit_rows.tolist())}"),
            ("source", f"{len(row.source)}: {listed(row.source.tolist())}"),
            ("target_ids", f"{len(row.target_ids)}: {listed(row.target_ids.tolist())}"),
        ]
    )


def of_update(scores: TokenScores, update: UpdateResult, lr: float) -> str:
    """Log-probs and entropies before the update, its loss and its gradient."""
    return aligned(
        [
            ("log-probs", f"{len(scores.log_probs)} tokens, mean {scores.log_probs.mean():.2f}"),
            ("entropies", f"mean {scores.entropies.mean():.2f} nats"),
            ("loss", f"{abs(float(update.sums['loss'])):.3f}"),  # 0 or -0: without its sign
            ("clipped", f"{update.sums['clip_fraction'].sum():.0f} of {update.sums['tokens'].sum():.0f} tokens"),
            ("gradient norm", f"{update.grad_norm:.2f}"),
            ("learning rate", f"{lr:g}"),
            ("skipped", "no" if update.skipped is None else update.skipped),
        ]
    )


def of_weights(weights: Sequence[tuple[str, int]], changes: Sequence[float]) -> str:
    """What was handed over, (name, count of numbers) each, and how the update changed each answer's log-prob."""
    return aligned(
        [
            ("tensors", f"{len(weights)}, {sum(count for _, count in weights) / 1e6:.2f} M numbers"),
            ("first", weights[0][0]),
            ("last", weights[-1][0]),
            *((f"rollout {i}", f"log-prob of the whole answer {change:+.1f}") for i, change in enumerate(changes)),
        ]
    )


def of_stats(stats: StepStats, task: str) -> str:
    """Some of the step's means, each with what it counted."""
    names = (
        f"reward/{task}",
        f"accuracy/{task}",
        f"uniform/{task}",
        "response_length",
        "entropy",
        "clip_fraction",
        "grad_norm",
    )
    return aligned((name, f"{stats.means[name].value:.2f}, over {stats.means[name].count:g}") for name in names)
