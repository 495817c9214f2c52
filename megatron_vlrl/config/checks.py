"""What can be known of a Config before any model or data is opened: small checks, whose findings are told at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from megatron_vlrl.config.load import keys
from megatron_vlrl.config.locations import why_no_location
from megatron_vlrl.config.schema import Config
from megatron_vlrl.config.stepwise import why_not_stepwise
from megatron_vlrl.errors import ConfigError

# The smallest value of settings that only have a smallest value.
AT_LEAST: Mapping[str, float] = {
    "run.seed": 0,
    "run.threads": 1,
    "parallel.tensor": 1,
    "parallel.pipeline": 1,
    "parallel.data": 1,
    "parallel.virtual_pipeline": 1,
    "parallel.expert": 1,
    "data.prompts_per_step": 1,
    "data.max_prompt_tokens": 1,
    "data.max_bad_samples": 0,
    "rollout.samples_per_prompt": 1,
    "rollout.max_new_tokens": 1,
    "rollout.batch_prompts": 1,
    "algorithm.loss.importance_cap": 1,
    "algorithm.kl.coefficient": 0,
    "algorithm.entropy.coefficient": 0,
    "algorithm.filter.refill_rounds": 0,
    "optimizer.lr": 0,
    "optimizer.weight_decay": 0,
    "optimizer.clip_norm": 0,
    "optimizer.warmup_steps": 0,
    "train.steps": 1,
    "train.minibatches": 1,
    "train.microbatch_tokens": 1,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "evaluate.per_task": 1,
    "evaluate.temperature": 0,
    "evaluate.every": 0,
    "evaluate.start": 0,
    "observe.rollouts_every": 0,
    "observe.rollouts_kept": 0,
}

# Settings that must be over 0.
POSITIVE = (
    "parallel.timeout_seconds",
    "rollout.temperature",
    "optimizer.eps",
)

# Settings that are shares: 0 to 1.
SHARES = (
    "reward.format_weight",
    "reward.length_weight",
    "algorithm.kl.decay",
    "optimizer.final_ratio",
    "evaluate.stop_at",
    "evaluate.stop_at_each",
)


def value_of(config: Config, key: str) -> object:
    """The setting that a dotted key names."""
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _number(config: Config, key: str) -> float:
    value = value_of(config, key)
    assert isinstance(value, int | float), key
    return value


def smallest_values(config: Config) -> Iterator[str]:
    """Counts, rates and limits that cannot be lower."""
    for key, least in AT_LEAST.items():
        if _number(config, key) < least:
            yield f"{key} is {_number(config, key)}; use {least} or more"
    for key in POSITIVE:
        if _number(config, key) <= 0:
            yield f"{key} is {_number(config, key)}; use a value over 0"


def shares(config: Config) -> Iterator[str]:
    """Settings between 0 and 1."""
    for key in SHARES:
        if not 0 <= _number(config, key) <= 1:
            yield f"{key} is {_number(config, key)}; use a value from 0 to 1"


def names_given(config: Config) -> Iterator[str]:
    """Words that may not be empty."""
    for key in ("run.name", "run.folder", "run.resume", "model.backend", "rollout.engine"):
        if not value_of(config, key):
            yield f"{key} is empty; leave it out for its default, or give one"


def places_of_shards(config: Config) -> Iterator[str]:
    """Folders and URLs of shards are such as can be read, and hold no credentials."""
    for key, where in (("data.train", config.data.train), ("evaluate.data", config.evaluate.data)):
        if problem := why_no_location(where):
            yield f"{key}: {problem}"


def prompts_over_ranks(config: Config) -> Iterator[str]:
    """Every data-parallel rank gets the same number of prompts, and every minibatch at least one of them."""
    prompts, data, parts = config.data.prompts_per_step, config.parallel.data, config.train.minibatches
    if min(prompts, data, parts) < 1:
        return  # said by smallest_values
    if prompts % data:
        yield (
            f"data.prompts_per_step={prompts} is not divisible by parallel.data={data}; "
            f"use {prompts - prompts % data or data} or {prompts - prompts % data + data}"
        )
    elif parts > prompts // data:
        yield (
            f"train.minibatches={parts} is more than the {prompts // data} prompts that each rank has in a step "
            f"(data.prompts_per_step={prompts} / parallel.data={data}); use {prompts // data} or fewer"
        )


def mixture(config: Config) -> Iterator[str]:
    """Weights of the tasks: none negative, not all zero."""
    weights = config.data.weights
    for task, weight in weights.items():
        if weight < 0:
            yield f"data.weights.{task} is {weight}; use 0 or more"
    if weights and not any(weights.values()):
        yield "data.weights are all 0; give one task a weight, or leave the section out to mix all alike"


def reward_weights(config: Config) -> Iterator[str]:
    """Accuracy keeps what format and length leave."""
    fmt, length = config.reward.format_weight, config.reward.length_weight
    if fmt + length > 1:
        yield (
            f"reward.format_weight={fmt} and reward.length_weight={length} add up to {fmt + length:g}; "
            "lower one so that the sum is at most 1, as accuracy has the rest"
        )
    if length > 0 and not config.reward.length_bands:
        yield f"reward.length_weight is {length} but reward.length_bands is empty; give bands by task, or weight 0"


def length_bands(config: Config) -> Iterator[str]:
    """0 <= min <= low <= high <= max."""
    for task, band in config.reward.length_bands.items():
        if list(band) != sorted(band) or band[0] < 0:
            yield f"reward.length_bands.{task} is {list(band)}; write min, low, high, max in ascending order from 0"


def kl(config: Config) -> Iterator[str]:
    """No negative coefficient, and a reference policy where there is one over 0."""
    term = config.algorithm.kl
    for task, coefficient in term.by_task.items():
        if coefficient < 0:
            yield f"algorithm.kl.by_task.{task} is {coefficient}; use 0 or more"
    highest = max(term.coefficient, *term.by_task.values(), 0.0)
    if highest > 0 and term.reference == "none":
        yield (
            f"algorithm.kl has a coefficient of {highest} but algorithm.kl.reference is 'none'; "
            "use reference 'frozen' or 'ema', or coefficient 0"
        )


def quantize(config: Config) -> Iterator[str]:
    """Steps over 0, of components that there are."""
    for component, step in config.reward.quantize.items():
        if component not in ("accuracy", "format", "length"):
            yield f"reward.quantize has {component!r}; the components are accuracy, format and length"
        if step <= 0:
            yield f"reward.quantize.{component} is {step}; use a step over 0, or leave it out"


def sampler(config: Config) -> Iterator[str]:
    """Demonstrations were drawn from no policy, so nothing can correct for one."""
    importance = config.algorithm.loss.importance
    if config.rollout.engine == "demonstrations" and importance != "none":
        yield (
            f"rollout.engine=demonstrations has no sampler's log-probs, but algorithm.loss.importance={importance} "
            "needs them; set it to none"
        )


def entropy_bands(config: Config) -> Iterator[str]:
    """0 <= min <= max, and some where the term is on."""
    entropy = config.algorithm.entropy
    for task, (low, high) in entropy.bands.items():
        if not 0 <= low <= high:
            yield f"algorithm.entropy.bands.{task} is [{low}, {high}]; write min, max in ascending order from 0"
    if entropy.coefficient > 0 and not entropy.bands:
        yield (
            f"algorithm.entropy.coefficient is {entropy.coefficient} but algorithm.entropy.bands is empty; "
            "give bands by task, or coefficient 0"
        )


def optimizer(config: Config) -> Iterator[str]:
    """Betas of AdamW, and factors of the learning rate."""
    for beta in config.optimizer.betas:
        if not 0 <= beta < 1:
            yield f"optimizer.betas has {beta}; use values from 0 up to but not including 1"
    for pattern, factor in config.optimizer.lr_scale.items():
        if factor < 0:
            yield f"optimizer.lr_scale.{pattern} is {factor}; use 0 or more (0 keeps the learning rate at 0)"


def schedules(config: Config) -> Iterator[str]:
    """Only for settings that a step reads anew, and each of a kind."""
    for key, schedule in config.schedules.items():
        if why := why_not_stepwise(key):
            yield why
        elif not isinstance(schedule.get("kind"), str):
            kind = schedule.get("kind")
            yield f"schedules.{key} has kind {kind!r}; name one, as in {{kind: linear, start: 1, end: 0}}"


def early_stop(config: Config) -> Iterator[str]:
    """Stopping early by accuracy needs evaluations during training."""
    evaluate = config.evaluate
    if (evaluate.stop_at or evaluate.stop_at_each) and not (evaluate.data and evaluate.every):
        yield (
            f"evaluate.stop_at={evaluate.stop_at} and evaluate.stop_at_each={evaluate.stop_at_each} need evaluations "
            f"during training, but evaluate.data={evaluate.data!r} and evaluate.every={evaluate.every}; set both"
        )


CHECKS: tuple[Callable[[Config], Iterator[str]], ...] = (
    smallest_values,
    shares,
    names_given,
    places_of_shards,
    prompts_over_ranks,
    mixture,
    reward_weights,
    length_bands,
    kl,
    quantize,
    sampler,
    entropy_bands,
    optimizer,
    schedules,
    early_stop,
)


def tasks_not_there(config: Config, tasks: Collection[str]) -> Iterator[str]:
    """Settings by task of tasks that the data does not have: no error, as data sets may share settings, but said."""
    by_task: Mapping[str, Collection[str]] = {
        "reward.length_bands": config.reward.length_bands,
        "algorithm.entropy.bands": config.algorithm.entropy.bands,
        "algorithm.kl.by_task": config.algorithm.kl.by_task,
    }
    for key, named in by_task.items():
        missing = sorted(set(named) - set(tasks))
        if missing:
            yield f"{key} names {', '.join(missing)}, of which the data has nothing; its tasks are {', '.join(tasks)}"


def check(config: Config) -> None:
    """Raise one ConfigError with every sentence of every check; none means that the settings fit each other."""
    _raise([sentence for one in CHECKS for sentence in one(config)])


def require(config: Config, *wanted: str) -> None:
    """Raise ConfigError for the settings of `wanted` that are empty: what one command cannot do without."""
    for key in wanted:
        assert key in keys(), key
    _raise([f"{key} is empty; this command needs it: give {key}=..." for key in wanted if not value_of(config, key)])


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError("this configuration cannot run:" + "".join(f"\n- {problem}" for problem in problems))
