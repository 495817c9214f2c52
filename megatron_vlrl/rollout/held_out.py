"""The held-out samples of `evaluate.data`, asked of an engine as the run's settings say."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from megatron_vlrl.config.schema import Config
from megatron_vlrl.data.loader import held_out
from megatron_vlrl.models.qwen3_vl.render import Renderer
from megatron_vlrl.parallel.groups import ProcessGroups
from megatron_vlrl.rollout.engine import Engine
from megatron_vlrl.rollout.engines import judge_config, make_engine
from megatron_vlrl.rollout.evaluate import Evaluation, evaluate
from megatron_vlrl.rollout.sampling import sampling_for
from megatron_vlrl.tasks.reward import reward_group


class HeldOut:
    """Renders the samples once; calling it writes and scores an answer to each. Collective.

    engine: the run's. One that does not ask the policy is replaced by one that does, as `engine`.
    """

    def __init__(self, config: Config, renderer: Renderer, groups: ProcessGroups, engine: Engine | None = None) -> None:
        self.engine = engine if engine and engine.needs_weights else make_engine(judge_config(config), renderer)
        samples = held_out(config.evaluate.data, config.evaluate.per_task) if config.evaluate.data else []
        self._prompts = [renderer.render(sample) for sample in samples]
        sampling = sampling_for(config.rollout, renderer, seed=config.run.seed)
        self.sampling = replace(sampling, n=1, temperature=config.evaluate.temperature)
        self._reward = partial(reward_group, config=config.reward)
        self._groups = groups

    def __len__(self) -> int:
        """Held-out samples; 0 where the run evaluates nothing."""
        return len(self._prompts)

    def __call__(self) -> Evaluation:
        """The answers of the engine's weights as they are, scored."""
        return evaluate(self.engine, self._prompts, self.sampling, self._reward, self._groups)
