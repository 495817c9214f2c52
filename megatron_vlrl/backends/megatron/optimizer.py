"""AdamW through megatron-core: freezing and learning rates by Hugging Face name, clipping, the non-finite guard."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import nn

from megatron_vlrl.backends.megatron import adam
from megatron_vlrl.backends.megatron.names import EMBEDDING, HEAD, Rule
from megatron_vlrl.backends.protocol import OptimizerStep
from megatron_vlrl.config.schema import OptimizerConfig
from megatron_vlrl.errors import ConfigError

BUCKET_SIZE: int | None = None  # parameters that are reduced together where communication overlaps; None: mcore's own


def match_names(globs: Iterable[str], rules: Sequence[Rule], *, key: str) -> dict[str, str]:
    """Local parameter name -> the last glob that matches it. A glob that matches nothing is an error, and so is
    one that matches a part of a merged parameter (q, k and v are one matrix here)."""
    matched: dict[str, str] = {}
    for glob in globs:
        found = False
        for rule in rules:
            hits = [name for name in rule.hf if fnmatchcase(name, glob)]
            if hits and len(hits) < len(rule.hf):
                raise ConfigError(
                    f"{key}: {glob!r} matches {hits} but not all of {list(rule.hf)}, which are one parameter in this "
                    "backend; match all of them or none"
                )
            if hits:
                matched[rule.local] = glob
                found = True
        if not found:
            raise ConfigError(
                f"{key}: {glob!r} matches no parameter; names look like {rules[0].hf[0]!r}, {rules[-1].hf[0]!r}"
            )
    if EMBEDDING in matched and all(rule.local != HEAD for rule in rules):
        matched[HEAD] = matched[EMBEDDING]  # the last stage's copy of a tied table, or the two would drift apart
    return matched


def freeze(parameters: Mapping[str, nn.Parameter], rules: Sequence[Rule], globs: Sequence[str]) -> None:
    """Take the matching parameters out of training."""
    for name in match_names(globs, rules, key="model.freeze"):
        if name in parameters:
            parameters[name].requires_grad_(False)


def ddp_config(*, distributed: bool, overlap: bool) -> DistributedDataParallelConfig:
    """How gradients are summed over the data ranks; a distributed optimizer gets only its own part of them."""
    gather = distributed and overlap
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=overlap,
        overlap_param_gather=gather,
        align_param_gather=gather,  # a module waits for its own parameters and starts no other gather
        bucket_size=BUCKET_SIZE,
    )


def build_optimizer(
    wrapped: Sequence[DistributedDataParallel],
    parameters: Mapping[str, nn.Parameter],
    rules: Sequence[Rule],
    config: OptimizerConfig,
    *,
    bf16: bool,
    overlap: bool,
) -> MegatronOptimizer:
    """megatron-core's optimizer; each group's `lr_mult` and `wd_mult` are factors on what a step is taken with.

    `lr_mult` is among the keys by which megatron-core tells groups apart when it loads a checkpoint; `max_lr` is not.
    """
    adam.install()
    matched = match_names(config.lr_scale, rules, key="optimizer.lr_scale")
    factors = {id(parameters[name]): config.lr_scale[glob] for name, glob in matched.items() if name in parameters}

    def key(factor: float) -> ParamKey:
        predicate = ParamPredicate(name=f"lr_x{factor}", fn=lambda param: factors.get(id(param), 1.0) == factor)
        return ParamKey(predicate=predicate)

    unscaled_decay = ParamKey(predicate=ParamPredicate(name="vector", fn=lambda param: param.dim() == 1))
    overrides: dict[ParamKey, ParamGroupOverride] = {unscaled_decay: ParamGroupOverride(wd_mult=0.0)}
    for factor in sorted(set(config.lr_scale.values()) - {1.0}):
        overrides[key(factor)] = {"lr_mult": factor}
    options = MegatronOptimizerConfig(
        optimizer="adam",
        lr=1.0,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        bf16=bf16,
        use_distributed_optimizer=config.distributed,
        overlap_param_gather=config.distributed and overlap,
    )
    optimizer = get_megatron_optimizer(options, list(wrapped), config_overrides=overrides)
    if config.distributed:
        # Its shards are views of the weights on purpose; torch warns of that on every rank.
        text = r"The \.grad attribute of a Tensor that is not a leaf"
        warnings.filterwarnings("ignore", message=text, module="megatron.core.optimizer")
    for part in parts_of(optimizer):
        if part.init_state_fn is not None:
            part.init_state_fn(part.optimizer)  # zeros, so that a checkpoint of a run without an update is whole
    return optimizer


def parts_of(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that megatron-core chained together."""
    parts: list[MegatronOptimizer] = getattr(optimizer, "chained_optimizers", [optimizer])
    return parts


def apply_update(optimizer: MegatronOptimizer, step: OptimizerStep) -> tuple[float, bool]:
    """Clip and update as `step` says; (gradient norm over the whole model, whether finite).

    A non-finite norm leaves weights and optimizer untouched: the norm is the same on every rank, so all skip together.
    """
    for group in optimizer.param_groups:
        group["lr"] = step.lr * group["lr_mult"]
        group["weight_decay"] = step.weight_decay * group["wd_mult"]
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return norm, False
    for part in parts_of(optimizer):
        if step.clip_norm and part.get_parameters():
            clip_grad_by_total_norm_fp32(part.get_parameters(), step.clip_norm, norm)
    optimizer.step_with_ready_grads()
    return norm, True


def gather_gradients(wrapped: Sequence[DistributedDataParallel]) -> None:
    """Complete every `main_grad` where the optimizer is distributed: a data rank holds the sums of its part alone."""
    for chunk in wrapped:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)
