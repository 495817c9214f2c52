"""The same step by transformers on padded rows, one prompt copy for each response: what every layout must equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from megatron_vlrl.backends import BackendOptions
from megatron_vlrl.backends.protocol import OptimizerStep, TokenReport
from megatron_vlrl.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_vlrl.models.qwen3_vl.render import Renderer
from megatron_vlrl.packing import Microbatch, Targets, pack
from megatron_vlrl.types import Rollout, RolloutGroup, Sampling
from tests.tiny import sample

if TYPE_CHECKING:
    from transformers import Qwen3VLForConditionalGeneration

    from megatron_vlrl.backends.megatron.backend import MegatronBackend

IMAGES = [[(96, 64), (64, 96)], [], [(128, 64)], [(64, 64)], []]
LENGTHS = [[5, 1, 9, 5], [4, 7, 2, 1], [6, 6, 3], [3, 8], [2, 5, 4, 4, 1]]
MICROBATCHES = [[0, 1, 2], [3, 4]]
CLIP = (0.8, 1.28)
ENTROPY_WEIGHT = 0.05
TEMPERATURES = (0.7, 1.0, 1.6)  # of the groups, in turn


def make_groups(
    renderer: Renderer,
    images: Sequence[Sequence[tuple[int, int]]] = IMAGES,
    lengths: Sequence[Sequence[int]] = LENGTHS,
    tasks: Sequence[str] = ("count",) * len(LENGTHS),
) -> list[RolloutGroup]:
    """Groups with these image sizes and response lengths, and TEMPERATURES.

    Each group's last response begins as its first does.

    By default five: two, no, one, one, no images; ragged responses, some of a single token.
    """
    random = np.random.default_rng(3)
    groups = []
    for position, (sizes, counts, task) in enumerate(zip(images, lengths, tasks, strict=True)):
        prompt = renderer.render(sample(position, sizes, task=task))
        answers = [random.integers(20, 300, size=n).tolist() for n in counts]
        answers[-1][0] = answers[0][0]
        rollouts = tuple(
            Rollout(
                token_ids=tuple(ids),
                log_probs=np.zeros(len(ids), np.float32),
                temperature=TEMPERATURES[position % len(TEMPERATURES)],
                text="",
                finish_reason="stop",
                weight_version=0,
            )
            for ids in answers
        )
        groups.append(RolloutGroup(prompt=prompt, rollouts=rollouts))
    return groups


@dataclass(frozen=True)
class Reference:
    """Per-token log-probs and entropies of every response in order, the loss, and gradients by Hugging Face name."""

    log_probs: Tensor
    entropies: Tensor
    old: Tensor
    advantages: Tensor
    weights: Tensor
    loss: Tensor
    loss_scale: Tensor
    gradients: Mapping[str, Tensor]


def objective(log_probs: Tensor, entropies: Tensor, old: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """Each token's share of the loss: clipped ratio and an entropy term, weighted by global denominators."""
    ratio = (log_probs - old).exp()
    surrogate = torch.min(ratio * advantages, ratio.clamp(*CLIP) * advantages)
    return weights * (-surrogate + ENTROPY_WEIGHT * entropies)


def renderer_and_sampling(folder: Path) -> tuple[Renderer, Sampling]:
    """A distribution with banned tokens."""
    renderer = Renderer(folder, 4096)
    sampling = Sampling(
        n=1,
        temperature=1.0,
        max_new_tokens=8,
        stop_token_ids=renderer.stop_token_ids,
        banned_token_ids=renderer.banned_token_ids,
    )
    return renderer, sampling


def hf_scores(
    folder: Path, groups: Sequence[RolloutGroup], sampling: Sampling
) -> tuple[Tensor, Tensor, Qwen3VLForConditionalGeneration]:
    """`scores_of` the model in `folder`, and the model."""
    model = hf_model(folder)
    return *scores_of(model, groups, sampling), model


def hf_model(folder: Path) -> Qwen3VLForConditionalGeneration:
    """In float64, so that what a layout is measured against has no rounding of its own."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        folder, attn_implementation="sdpa", experts_implementation="eager"
    )
    return model.double().train()


def scores_of(
    model: Qwen3VLForConditionalGeneration, groups: Sequence[RolloutGroup], sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, with gradient, of padded rows through transformers.

    Positions are those of its own get_rope_index; a row's logits are divided by its rollout's temperature.
    """
    rows = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
    longest = max(len(prompt.token_ids) + len(rollout.token_ids) for prompt, rollout in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, rollout) in enumerate(rows):
        tokens = [*prompt.token_ids, *rollout.token_ids]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    types = (ids == model.config.image_token_id).int() + 2 * (ids == model.config.video_token_id).int()
    prompts = [prompt for prompt, _ in rows]
    grids, patches = {}, {}
    for name, pixels, videos in (("image", "pixel_values", False), ("video", "pixel_values_videos", True)):
        wanted = [(p, i) for p in prompts for i in range(len(p.grids)) if (i in p.video_grids) == videos]
        if wanted:
            grids[f"{name}_grid_thw"] = torch.tensor([p.grids[i] for p, i in wanted])
            patches[pixels] = torch.cat([torch.from_numpy(p.patches[i]) for p, i in wanted]).double()
    positions, _ = model.model.get_rope_index(ids, types, **grids, attention_mask=mask)
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        **patches,
        **grids,
        mm_token_type_ids=types,
        use_cache=False,
    ).logits
    logits = logits / torch.tensor([rollout.temperature for _, rollout in rows]).double()[:, None, None]
    logits = logits.index_fill(2, torch.tensor(sampling.banned_token_ids), -1e30)
    log_softmax = logits.log_softmax(-1)
    picked, entropy = [], []
    for row, (prompt, rollout) in enumerate(rows):
        start = len(prompt.token_ids) - 1
        part = log_softmax[row, start : start + len(rollout.token_ids)]
        picked.append(part.gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0])
        entropy.append(-(part.exp() * part).sum(-1))
    return torch.cat(picked), torch.cat(entropy)


def hf_reference(folder: Path, groups: Sequence[RolloutGroup], sampling: Sampling) -> Reference:
    """The loss of one step and its gradients on the scores of `hf_scores`."""
    log_probs, entropies, model = hf_scores(folder, groups, sampling)
    lengths = torch.tensor([len(rollout.token_ids) for group in groups for rollout in group.rollouts])
    generator = torch.Generator().manual_seed(5)
    old = (log_probs.detach() + 0.3 * torch.randn(log_probs.shape, generator=generator)).float()
    advantages = torch.randn(len(lengths), generator=generator).repeat_interleave(lengths)
    weights = (torch.rand(log_probs.shape, generator=generator) + 0.5) / len(log_probs)
    shares = objective(log_probs, entropies, old, advantages, weights)
    shares.sum().backward()
    return Reference(
        log_probs=log_probs.detach(),
        entropies=entropies.detach(),
        old=old,
        advantages=advantages,
        weights=weights,
        loss=shares.detach().sum(),
        loss_scale=shares.detach().abs().sum(),
        gradients=gradients_of(model),
    )


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """By name; 0 where a parameter took no part."""
    return {
        name: parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        for name, parameter in model.named_parameters()
    }


def relative(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over norm of the value."""
    return float((got - expected).norm() / expected.norm().clamp_min(1e-9))


def make_microbatches(
    groups: Sequence[RolloutGroup], reference: Reference, cuts: Sequence[Sequence[int]], multiple: int
) -> list[Microbatch]:
    """Pack groups as `cuts` says and give each token its part of the reference's loss."""
    sizes = [sum(len(rollout.token_ids) for rollout in group.rollouts) for group in groups]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    batches = []
    for cut in cuts:
        places = torch.cat([torch.arange(starts[index], starts[index + 1]) for index in cut])
        weights = reference.weights[places]
        targets = Targets(
            rollout_log_probs=reference.old[places],
            old_log_probs=reference.old[places],
            advantages=reference.advantages[places],
            weights=weights,
            entropy_weights=ENTROPY_WEIGHT * weights,
            kl_weights=torch.zeros(len(places)),
            task=torch.zeros(len(places), dtype=torch.long),
            counted=torch.ones(len(places)),
            fresh=torch.ones(len(places)),
        )
        batches.append(pack([groups[index] for index in cut], multiple=multiple).with_targets(targets))
    return batches


def token_loss(batch: Microbatch, log_probs: Tensor, entropies: Tensor) -> tuple[Tensor, TokenReport]:
    """`objective` on a microbatch."""
    targets = batch.targets
    assert targets is not None
    shares = objective(log_probs, entropies, targets.old_log_probs, targets.advantages, targets.weights)
    return shares.sum(), TokenReport(
        sums={"tokens": torch.tensor(float(len(log_probs)))}, maxima={"top": log_probs.max()}
    )


def backend_options(
    folder: Path, sampling: Sampling, *, distributed: bool = False, eps: float = 1e-8, **parallel: object
) -> BackendOptions:
    """Options of an AdamW run at fp32. distributed: its state is cut over the data ranks."""
    return BackendOptions(
        folder=folder,
        model=ModelConfig(path=str(folder)),
        parallel=replace(ParallelConfig(), **parallel),
        optimizer=OptimizerConfig(lr=1e-3, distributed=distributed, eps=eps),
        sampling=sampling,
        seed=0,
    )


def at_rate(lr: float, *, clip_norm: float = 0.0) -> OptimizerStep:
    """A step without weight decay, by default without clipping too."""
    return OptimizerStep(lr=lr, clip_norm=clip_norm, weight_decay=0.0)


def local_state(backend: MegatronBackend) -> dict[str, Tensor]:
    """Copies of this rank's shards of weights and of AdamW's moments and steps, by the whole model's names."""
    moments = {}
    for part in getattr(backend.optimizer, "chained_optimizers", [backend.optimizer]):
        moments |= part.optimizer.state if part.optimizer is not None else {}
    state = {}
    for name, parameter in backend.weights.parameters.items():
        state[name] = parameter.detach().clone()
        for key, value in moments.get(parameter, {}).items():
            state[f"{name} {key}"] = torch.as_tensor(value).clone()
    return state
