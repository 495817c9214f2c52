"""The RL loop: one step reads top to bottom, one line a stage. The only place that wires the stages together."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from megatron_vlrl.algorithms import check_options
from megatron_vlrl.algorithms.losses import check_loss_options
from megatron_vlrl.algorithms.scheduled import Scheduled
from megatron_vlrl.backends import BackendOptions, build_backend
from megatron_vlrl.backends.protocol import Saving
from megatron_vlrl.checkpoint.export import export_model
from megatron_vlrl.checkpoint.state import STATE_FILE, RunState, differences, summary
from megatron_vlrl.checkpoint.store import CheckpointStore
from megatron_vlrl.checkpoint.waiting import read_waiting, write_waiting
from megatron_vlrl.config.checks import tasks_not_there
from megatron_vlrl.config.load import dump
from megatron_vlrl.config.schema import Config
from megatron_vlrl.data.loader import PromptLoader, check_bad_samples
from megatron_vlrl.data.stream import SampleStream
from megatron_vlrl.models.qwen3_vl.cost import group_cost, unit_costs
from megatron_vlrl.models.qwen3_vl.render import Renderer
from megatron_vlrl.observe.clock import Clock
from megatron_vlrl.observe.recorder import Recorder
from megatron_vlrl.observe.report import write_report
from megatron_vlrl.observe.summary import summary_table
from megatron_vlrl.parallel.collectives import barrier, union_over
from megatron_vlrl.rollout.buffer import GroupBuffer, Intake
from megatron_vlrl.rollout.distribute import generate_groups
from megatron_vlrl.rollout.engines import make_engine
from megatron_vlrl.rollout.evaluate import Evaluation
from megatron_vlrl.rollout.held_out import HeldOut
from megatron_vlrl.rollout.sampling import sampling_for
from megatron_vlrl.runtime.launch import world_from_env
from megatron_vlrl.runtime.process import joined
from megatron_vlrl.runtime.seed import seed_all
from megatron_vlrl.tasks.reward import reward_group
from megatron_vlrl.train.divide import divide
from megatron_vlrl.train.estimate import estimate
from megatron_vlrl.train.minibatches import rows_of
from megatron_vlrl.train.rewards import gather_table, score_groups
from megatron_vlrl.train.statistics import step_means, step_scalars, why_skipped
from megatron_vlrl.train.update import Updater, optimizer_step
from megatron_vlrl.types import StepStats

_log = logging.getLogger(__name__)
CONFIG_FILE = "config.yaml"


def train(config: Config) -> str:
    """Train as `config` says; the table that ends the run (rank 0's). Every rank of the job calls it."""
    Scheduled(config).check(_check_algorithm)
    world = world_from_env(os.environ)
    with joined(world, timeout_seconds=config.parallel.timeout_seconds, threads=config.run.threads):
        seed_all(config.run.seed)
        return Run(config).train()


class Run:
    """The stages of one run, built once."""

    def __init__(self, config: Config) -> None:
        self.config, self.folder = config, Path(config.run.folder)
        self.scheduled = Scheduled(config)
        self.renderer = Renderer(Path(config.model.path), config.data.max_prompt_tokens)
        self.sampling = sampling_for(config.rollout, self.renderer, seed=config.run.seed)
        self.backend = build_backend(BackendOptions.of(config, self.sampling))
        self.groups = self.backend.groups
        if (reference := config.algorithm.kl.reference) != "none":
            self.backend.keep_reference(moving=reference == "ema")
        self.engine = make_engine(config, self.renderer)
        data = self.groups.data
        stream = SampleStream(
            config.data.train, seed=config.run.seed, weights=config.data.weights, rank=data.rank, world=data.size
        )
        self.tasks = stream.tasks
        for note in tasks_not_there(config, self.tasks) if self.groups.is_main else ():
            _log.warning(note)
        self.loader = PromptLoader(stream, self.renderer.render)
        self.cost = partial(group_cost, unit=unit_costs(self.renderer.spec))
        tokens = config.train.microbatch_tokens
        self.updater = Updater(backend=self.backend, task_names=self.tasks, microbatch_tokens=tokens, cost=self.cost)
        self.store = CheckpointStore(self.folder / "checkpoints", keep=config.checkpoint.keep, world=self.groups.world)
        self.buffer, self.updates, self.finished = GroupBuffer(), 0, False
        self.bad: dict[str, str] = {}  # samples skipped so far, over all data ranks: key -> why
        self.advantage_state: Mapping[str, Any] = {}
        self.done = self._resume()
        self.recorder = self._open_recorder() if self.groups.is_main else None
        self.held_out = HeldOut(config, self.renderer, self.groups, self.engine)

    def train(self) -> str:
        """All steps, evaluation before and after, then export and report."""
        config = self.config
        if self.done == 0:
            self._evaluate("before")
        if self.engine.needs_weights:
            self.engine.update_weights(self.backend.hf_weights(), self.done)
        while self.done < config.train.steps and not self.finished:
            stats = self.step()
            if self.recorder:
                self.recorder.step(stats)
            last = self.done == config.train.steps
            if not last and _due(self.done, config.evaluate.every, config.evaluate.start):
                self.finished = self._evaluate("during").reaches(config.evaluate.stop_at, config.evaluate.stop_at_each)
            if not (last or self.finished) and _due(self.done, config.checkpoint.every):
                self._save()
            if last or self.finished:
                self._evaluate("after")
                self._save()
        return self._finish()

    def step(self) -> StepStats:
        """One step of reinforcement learning."""
        settings, clock = self.scheduled.at(self.done), Clock()
        algorithm, data = settings.algorithm, self.groups.data
        intake = self._take_in(settings, clock)
        with clock("advantage"):
            batch = self.buffer.take(settings.data.prompts_per_step)
            table = gather_table(batch, data, self.tasks, task_key=algorithm.advantage.task_key)
            result = estimate(table, algorithm.advantage, self.advantage_state)
            self.advantage_state = result.state
        with clock("balance"):
            division = divide(batch, table, result, settings, step=self.done, cost=self.cost, data=data)
        with clock("score"):
            version = self.done if self.engine.needs_weights else None  # of the weights that wrote fresh rollouts
            minibatches = self.updater.prepare(division.updates, algorithm, version)
        with clock("update"):
            step = optimizer_step(settings, self.done)
            updates = [self.updater.update(minibatch, algorithm, step) for minibatch in minibatches]
            if algorithm.kl.reference == "ema":
                self.backend.move_reference(algorithm.kl.decay)
        self.done, self.updates = self.done + 1, self.updates + sum(u.skipped is None for u in updates)
        with clock("sync"):
            if self.engine.needs_weights:
                self.engine.update_weights(self.backend.hf_weights(), self.done)
        self.store.poll()
        if self.recorder:
            self.recorder.rollouts(self.done, batch, [result.values[rows_of(table, one.group)] for one in batch])
        scheduled = {f"schedule/{key}": value for key, value in self.scheduled.values(self.done - 1).items()}
        scalars = intake.scalars() | division.shares.scalars() | step_scalars(table, result, updates)
        counts = {"lr": step.lr, "updates": float(self.updates), "bad_samples": float(len(self.bad))}
        return StepStats(
            step=self.done,
            means=step_means(intake.tables, table, result, updates, settings.reward),
            scalars=counts | scheduled | scalars,
            seconds=clock.seconds | {"save": self.store.take_blocked_seconds()},
            skipped=why_skipped(updates),
        )

    def _take_in(self, settings: Config, clock: Clock) -> Intake:
        """Rounds of prompts, rollouts and rewards, until enough groups wait to be trained."""
        intake = Intake(self.buffer, settings.algorithm.filter, settings.data.prompts_per_step)
        sampling = sampling_for(settings.rollout, self.renderer, seed=settings.run.seed)
        reward = partial(reward_group, config=settings.reward)
        while count := intake.missing():
            with clock("load"):
                prompts = self.loader.next(count)
                self.bad = union_over(self.loader.bad, self.groups.data)
                check_bad_samples(self.bad, settings.data.max_bad_samples)
            with clock("rollout"):
                groups = generate_groups(self.engine, prompts, sampling, self.groups.model)
            with clock("reward"):
                scored = score_groups(groups, reward, self.groups.model)
                intake.add(scored, gather_table(scored, self.groups.data, self.tasks))
        return intake

    def _evaluate(self, label: str) -> Evaluation:
        if not self.held_out:
            return Evaluation(tasks={}, examples=())
        if self.held_out.engine is not self.engine:
            self.held_out.engine.update_weights(self.backend.hf_weights(), self.done)
        result = self.held_out()
        if self.recorder:
            self.recorder.evaluation(self.done, label, result.scores(), self.held_out.sampling.temperature)
        return result

    def _save(self) -> None:
        record = RunState(
            step=self.done,
            updates=self.updates,
            cursor=self.loader.state() | {"bad": self.bad},
            algorithm={"finished": self.finished, "advantage": self.advantage_state},
            model=summary(self.renderer.spec),
            config=summary(self.config),
        ).to_dict()

        def write(folder: Path) -> Saving | None:
            saving = self.backend.save(folder, asynchronous=self.config.checkpoint.asynchronous)
            if self.groups.is_main:
                (folder / STATE_FILE).write_text(json.dumps(record), encoding="utf-8")
            write_waiting(folder, self.buffer.own, self.groups)
            return saving

        self.store.save(self.done, write, layout=asdict(self.groups.dims))

    def _resume(self) -> int:
        """Restore the checkpoint that `run.resume` asks for; the number of steps done."""
        folder = self.store.find(self.config.run.resume)
        if folder is None:
            return 0
        raw = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        state = RunState.from_dict(raw, model=summary(self.renderer.spec))
        self.backend.load(folder)
        if state.step == 0:  # converted weights: no run has been here
            return 0
        self.loader.restore(state.cursor)
        self.bad = dict(self.loader.bad)
        self.buffer.add(*read_waiting(folder, self.loader.at, self.groups.data))
        self.advantage_state = state.algorithm["advantage"]
        for change in differences(state.config, summary(self.config)):
            _log.warning("resuming with another setting: %s", change)
        self.updates, self.finished = state.updates, bool(state.algorithm["finished"])
        return state.step

    def _open_recorder(self) -> Recorder:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / CONFIG_FILE).write_text(dump(self.config), encoding="utf-8")
        return Recorder(
            self.folder, self.config.observe, tasks=self.tasks, total=self.config.train.steps, step=self.done
        )

    def _finish(self) -> str:
        """The last checkpoint, export, report, and the closing table."""
        self.store.poll(wait=True)
        if self.config.observe.export:
            export_model(self.backend, self.folder / "hf", Path(self.config.model.path))
        if self.recorder:
            self.recorder.close()
            write_report(self.folder)
        barrier(self.groups.world)
        self.engine.close()
        self.backend.close()
        return summary_table(self.folder) if self.groups.is_main else ""


def _check_algorithm(settings: Config) -> None:
    algorithm = settings.algorithm
    check_options(algorithm.advantage.kind, algorithm.advantage.options)
    check_loss_options(algorithm.loss.kind, algorithm.loss.options)


def _due(step: int, every: int, start: int = 0) -> bool:
    return every > 0 and step >= start and step % every == 0
