"""Every setting of a run, with its unit and default. The set of keys is closed and frozen by a test.

A YAML file gives these names nested as written here; `section.key=value` on the command line overrides one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Name, folder and seed of a run."""

    name: str = "run"  # a label, kept in config.yaml
    folder: str = "runs/run"  # everything that the run writes lies under it
    seed: int = 0  # of data order, sampling and whatever else is drawn
    resume: str = (
        "never"  # never (a new folder) | auto (the last good checkpoint of this folder, if any) | a checkpoint folder
    )
    threads: int = 1  # CPU threads of a process; part of what makes a resumed run bit-identical


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which weights, held by which backend."""

    path: str = ""  # a Hugging Face folder: config, weights, tokenizer, processor
    backend: str = "megatron"  # a name in backends.BACKENDS
    provider: Literal["local"] = "local"  # which layers the megatron backend is built of
    dtype: Literal["float32", "bfloat16"] = "float32"
    freeze: tuple[str, ...] = ()  # globs over Hugging Face parameter names


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees; their product is the number of processes."""

    tensor: int = 1  # ranks that share every layer
    pipeline: int = 1  # ranks that each hold some of the layers
    data: int = 1  # replicas, each with its own prompts
    sequence: bool = True  # sequence parallel where tensor > 1
    virtual_pipeline: int = 1  # chunks of layers that each pipeline rank holds, interleaved
    expert: int = 1  # ranks that share the experts of a mixture-of-experts model; divides data
    timeout_seconds: float = 120.0  # of one collective
    recompute: Literal["none", "selective", "full"] = "none"  # of the language model's layers
    recompute_vision: bool = False  # whole layers of the vision tower
    overlap: bool = False  # reduce gradients (and gather parameters) while the backward (forward) pass goes on


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where samples come from."""

    train: str = ""  # folder or s3:// prefix of webdataset shards with a manifest
    weights: Mapping[str, float] = field(default_factory=dict)  # mixture by task; empty: all tasks alike
    prompts_per_step: int = 8  # over all data-parallel ranks
    max_prompt_tokens: int = 4096  # vision tokens included
    max_bad_samples: int = 100  # skipped, counted and logged up to here; then the run stops


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How answers are written."""

    engine: str = "transformers"  # a name in rollout.ENGINES
    samples_per_prompt: int = 8  # G
    temperature: float = 1.0  # of sampling, and of the log-probs that are trained
    max_new_tokens: int = 256  # the stop token included
    batch_prompts: int = 64  # prompts in one engine call


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """How named components become one total: (1 - format - length) * accuracy + format * format + length * length."""

    format_weight: float = 0.1  # share of the format component
    length_weight: float = 0.0  # share of the length component, for tasks with a band
    # task -> min, low, high, max tokens
    length_bands: Mapping[str, tuple[float, float, float, float]] = field(default_factory=dict)
    length_unit: Literal["token", "char"] = "token"  # what bands count
    length_only_if_correct: bool = False  # no length reward below accuracy 0.5
    # component -> step: in the total, its values are rounded to multiples, as ranks see any difference, however small
    quantize: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """Rewards to advantages. `options` go to the function of that kind, which checks them."""

    kind: str = "g2rpo"  # a name in algorithms.ADVANTAGES
    options: Mapping[str, Any] = field(default_factory=dict)
    task_key: str = ""  # the metadata field by which rollouts are ranked together; empty: their task


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Dynamic filtering: groups that can teach nothing are dropped before the ranking, and others drawn instead."""

    rule: Literal["off", "std", "mean_band"] = "off"  # a name in algorithms.filtering.FILTERS, on the accuracy
    refill_rounds: int = 4  # further rounds of rollouts that a step may take to fill up


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The token objective. `options` go to the function of that kind, which checks them."""

    kind: str = "ppo_clip"  # a name in algorithms.losses.LOSSES
    options: Mapping[str, Any] = field(default_factory=dict)
    aggregation: Literal["sequence_mean", "token_mean", "constant"] = "sequence_mean"  # of the tokens' losses
    # weight of a token for what sampler and trainer differ in
    importance: Literal["none", "token_tis", "sequence_mask"] = "token_tis"
    importance_cap: float = 2.0  # token_tis: the greatest weight; sequence_mask: kept from 1 / cap to cap


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """Divergence from a reference policy, as a term of the loss; coefficient 0 turns it off."""

    coefficient: float = 0.0  # weight of the term in the loss
    by_task: Mapping[str, float] = field(default_factory=dict)  # task -> its own coefficient
    estimator: Literal["k1", "k2", "k3"] = "k3"
    # frozen: the weights of model.path; ema: these, moved towards the policy after every step
    reference: Literal["none", "frozen", "ema"] = "none"
    decay: float = 0.99  # ema: the share of the reference that a step keeps


@dataclass(frozen=True, kw_only=True)
class EntropyConfig:
    """Entropy shaping; coefficient 0 turns it off."""

    coefficient: float = 0.0  # weight of the term in the loss
    estimator: Literal["full", "nll", "score"] = "full"
    bands: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # task -> min, max in nats


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """What is optimised."""

    filter: FilterConfig = field(default_factory=FilterConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    entropy: EntropyConfig = field(default_factory=EntropyConfig)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 1e-6  # the greatest learning rate
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    distributed: bool = False  # cut the optimizer's state over the data ranks
    clip_norm: float = 1.0  # greatest norm of the whole gradient; 0: not clipped
    warmup_steps: int = 0  # steps of linear rise to lr
    decay: Literal["constant", "linear", "cosine"] = "linear"
    final_ratio: float = 0.1  # of lr, reached at train.steps
    # glob over Hugging Face names -> factor; the last match counts
    lr_scale: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How many steps, and how a step is cut."""

    steps: int = 100  # of reinforcement learning: rollouts, rewards, update
    minibatches: int = 1  # optimizer updates from one step's rollouts
    microbatch_tokens: int = 8192  # packed tokens of one forward pass; one group is never split


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and how many to keep."""

    every: int = 0  # steps; 0: only at the end
    keep: int = 2  # the newest ones
    asynchronous: bool = False  # write while training goes on


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Accuracy on shards, before, during or after training; never disturbs the run's random state."""

    data: str = ""  # folder or s3:// prefix of shards; empty: no evaluation
    per_task: int = 128  # items of each task, the first ones
    temperature: float = 0.0  # 0: greedy
    every: int = 0  # steps; 0: only before and after
    start: int = 0  # first step at which `every` counts
    stop_at: float = 0.0  # mean accuracy over the tasks at which training ends early; 0: never
    stop_at_each: float = 0.0  # and every task's accuracy is at least this


@dataclass(frozen=True, kw_only=True)
class ObserveConfig:
    """What a run shows and writes."""

    tensorboard: bool = True  # write event files
    progress: bool = True  # show a line a step
    rollouts_every: int = 10  # steps between the rollouts kept for the report; 0: only the first step's
    rollouts_kept: int = 5  # groups kept each time
    export: bool = True  # write hf/ at the end


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, whole. The resolved copy lies in the run's folder as config.yaml."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    # dotted key -> kind, a name in algorithms.schedules.SCHEDULES, and its arguments: what the key is at each step
    schedules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
