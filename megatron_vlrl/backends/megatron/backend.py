"""The megatron backend: Qwen3-VL spread by megatron-core over tensor, pipeline and data ranks, on CPU or CUDA."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray
from torch import Tensor

from megatron_vlrl.backends import BackendOptions
from megatron_vlrl.backends.layout import check_layout
from megatron_vlrl.backends.megatron import cpu, state
from megatron_vlrl.backends.megatron.configs import Precision, text_config, vision_config
from megatron_vlrl.backends.megatron.groups import initialise
from megatron_vlrl.backends.megatron.model import Qwen3VLStage
from megatron_vlrl.backends.megatron.names import rules
from megatron_vlrl.backends.megatron.optimizer import (
    apply_update,
    build_optimizer,
    ddp_config,
    freeze,
    gather_gradients,
)
from megatron_vlrl.backends.megatron.overlap import Overlap
from megatron_vlrl.backends.megatron.pipeline import VaryingShapeP2P, backward_group
from megatron_vlrl.backends.megatron.reference import Reference
from megatron_vlrl.backends.megatron.weights import WeightMap
from megatron_vlrl.backends.protocol import OptimizerStep, Saving, TokenLoss, TokenScores, UpdateResult
from megatron_vlrl.models.hf_files import HFWeights
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
from megatron_vlrl.models.qwen3_vl.names import as_stored, hf_shapes
from megatron_vlrl.packing import Microbatch, filler_group, pack
from megatron_vlrl.parallel.collectives import broadcast_object, gather_objects, gather_rows, sum_over
from megatron_vlrl.parallel.dims import ParallelDims
from megatron_vlrl.parallel.logprob import head_log_probs

# What the loss function hands to megatron-core's schedule: loss, a token count that we do not use, and a report.
_LossOutput = tuple[Tensor, Tensor, dict[str, Any]]


class MegatronBackend:
    """See `backends.protocol.Backend`."""

    def __init__(self, options: BackendOptions) -> None:
        """Build the model's stage on this rank, load its weights, make the optimizer; collective."""
        cpu.install()
        parallel, spec = options.parallel, Qwen3VLSpec.load(options.folder)
        dims = ParallelDims(
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            data=parallel.data,
            sequence=parallel.sequence,
            expert=parallel.expert,
            virtual=parallel.virtual_pipeline,
        )
        check_layout(spec, dims)
        self.options, self.spec = options, spec
        self.groups, process_groups = initialise(dims, parallel.timeout_seconds)
        tensor_parallel.model_parallel_cuda_manual_seed(options.seed)
        precision = Precision(dtype=getattr(torch, options.model.dtype))
        text = text_config(spec, dims, precision, parallel.recompute)
        with cpu.on_device():
            vision = vision_config(spec, dims, precision, recompute=parallel.recompute_vision)
            self.chunks = [Qwen3VLStage(spec, text, vision, process_groups, chunk=n) for n in range(dims.virtual)]
            table = rules(spec)
            source = HFWeights(options.folder)
            shapes = as_stored(hf_shapes(spec), {name: source.shape(name) for name in source.names})
            self.weights = WeightMap.build(table, shapes, self.chunks, self.groups)
            self.weights.load(source)
            freeze(self.weights.parameters, table, options.model.freeze)
            distributed, overlap = options.optimizer.distributed, parallel.overlap
            ddp = ddp_config(distributed=distributed, overlap=overlap)
            self.wrapped = [
                DistributedDataParallel(text, ddp, chunk, disable_bucketing=number > 0)
                for number, chunk in enumerate(self.chunks)
            ]
            bf16 = precision.dtype == torch.bfloat16
            self.optimizer = build_optimizer(
                self.wrapped, self.weights.parameters, table, options.optimizer, bf16=bf16, overlap=overlap
            )
            self._overlap = Overlap(self.wrapped, gather=distributed) if overlap else None
        text.finalize_model_grads_func = partial(_finalize_sums, self._overlap)
        if overlap:
            hold = [chunk.no_sync for chunk in self.wrapped]
            text.no_sync_func = hold if len(hold) > 1 else hold[0]
        self._schedule = get_forward_backward_func()
        self._p2p = VaryingShapeP2P(process_groups.pp, backward_group(process_groups.pp), text)
        self._process_groups = process_groups
        self._multiple = dims.pipeline if dims.virtual > 1 else 1  # of microbatches in a schedule
        self._banned = self._local_columns(options.sampling.banned_token_ids)
        self._reference: Reference | None = None

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes logits."""
        return self.groups.pipeline.rank == self.groups.pipeline.size - 1

    def load_hf(self, folder: Path) -> None:
        """Replace the weights; the optimizer's state stays."""
        self._complete_weights()
        self.weights.load(HFWeights(folder))
        self.optimizer.reload_model_params()  # where it has copies of higher precision

    def hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors on every rank, in a fixed order."""
        self._complete_weights()
        return self.weights.gather(lambda parameter: parameter)

    def hf_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The gradients that the last update used, after clipping (which is in place)."""
        gather_gradients(self.wrapped)
        return self.weights.gather(lambda parameter: getattr(parameter, "main_grad", torch.zeros_like(parameter)))

    def score(self, microbatches: Sequence[Microbatch], *, reference: bool = False) -> list[TokenScores]:
        """One forward pass without gradient."""

        def report(batch: Microbatch, log_probs: Tensor, entropies: Tensor) -> _LossOutput:
            scores = TokenScores(log_probs=log_probs.cpu(), entropies=entropies.cpu())
            return log_probs.sum(), _ONE, {"scores": scores}

        with torch.no_grad(), self._kept_reference().in_use() if reference else nullcontext():
            reports = self._run(microbatches, report, forward_only=True)
        last = self.groups.pipeline.size - 1
        scores: list[TokenScores] = broadcast_object([r["scores"] for r in reports], self.groups.pipeline, last)
        return scores

    def keep_reference(self, *, moving: bool) -> None:
        """See `reference.Reference`."""
        self._complete_weights()
        self._reference = None  # two of them might not fit
        self._reference = Reference(self.weights.parameters, moving=moving)

    def move_reference(self, decay: float) -> None:
        """See `reference.Reference.move`."""
        self._complete_weights()
        self._kept_reference().move(decay)

    def train_step(
        self, microbatches: Sequence[Microbatch], token_loss: TokenLoss, step: OptimizerStep
    ) -> UpdateResult:
        """One update from the sum of the microbatches' losses over all data ranks."""

        def loss(batch: Microbatch, log_probs: Tensor, entropies: Tensor) -> _LossOutput:
            value, report = token_loss(batch, log_probs, entropies)
            # What is reported outlives the backward pass, and must not keep its graph alive.
            sums = {name: part.detach() for name, part in {"loss": value, **report.sums}.items()}
            return value, _ONE, {"sums": sums, "maxima": {name: top.detach() for name, top in report.maxima.items()}}

        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums, maxima = self._total(self._run(microbatches, loss, forward_only=False))
        norm = math.nan
        skipped: str | None = "non-finite loss"
        if np.isfinite(sums["loss"]):
            with cpu.on_device():
                norm, updated = apply_update(self.optimizer, step)
            skipped = None if updated else "non-finite gradient"
        if self._overlap:
            self._overlap.gather_parameters()
        return UpdateResult(sums=sums, maxima=maxima, grad_norm=norm, skipped=skipped)

    def save(self, folder: Path, *, asynchronous: bool = False) -> Saving | None:
        """See `state.save`."""
        self._complete_weights()
        with cpu.on_device():
            return state.save(
                folder, self.chunks, self.optimizer, self.groups, self._moving_reference(), asynchronous=asynchronous
            )

    def load(self, folder: Path) -> None:
        """See `state.load`."""
        self._complete_weights()
        with cpu.on_device():
            state.load(folder, self.chunks, self.optimizer, self.groups, self._moving_reference())

    def close(self) -> None:
        """Give megatron-core's groups back."""
        parallel_state.destroy_model_parallel()

    def _run(self, microbatches: Sequence[Microbatch], loss: Any, *, forward_only: bool) -> list[dict[str, Any]]:
        """megatron-core's schedule over the microbatches; what `loss` reported, on the last stage only.

        Interleaved stages need a multiple of the number of ranks in the pipeline, and ranks that share experts as many
        as each other: what is missing is filled up.
        """
        most = max(gather_objects(len(microbatches), self.groups.expert))
        missing = -(-most // self._multiple) * self._multiple - len(microbatches)
        filler = pack([filler_group()], multiple=self.groups.tensor.size)
        batches = [*microbatches, *[filler] * missing]

        def forward(batches: Iterator[Microbatch], model: Any) -> tuple[Tensor, Any]:
            batch = next(batches)
            output = model(batch)

            def finish(hidden: Tensor) -> _LossOutput:
                self._complete_weights()  # the head's are read outside of its module
                log_probs, entropies = head_log_probs(
                    hidden[:, 0],
                    self.chunks[-1].language_model.head_weight(),
                    batch.source,
                    batch.target_ids,
                    banned=self._banned,
                    temperatures=batch.temperatures,
                    group=self.groups.tensor,
                )
                output: _LossOutput = loss(batch, log_probs, entropies) if batch is not filler else _nothing(log_probs)
                return output

            return output, finish

        with cpu.on_device():
            reports: list[dict[str, Any]] = self._schedule(
                forward_step_func=forward,
                data_iterator=[iter(batches) for _ in self.wrapped],
                model=self.wrapped,
                num_microbatches=len(batches),
                seq_length=1,  # real lengths are sent between stages (variable_seq_lengths)
                micro_batch_size=1,
                forward_only=forward_only,
                p2p_communicator=self._p2p,
                pg_collection=self._process_groups,
            )
        return reports[: len(microbatches)]

    def _complete_weights(self) -> None:
        """Before weights are read outside of their module's call: wait for what other data ranks updated."""
        if self._overlap:
            self._overlap.wait_for_parameters()

    def _kept_reference(self) -> Reference:
        assert self._reference is not None, "no reference is kept: call keep_reference first"
        return self._reference

    def _moving_reference(self) -> Reference | None:
        return self._reference if self._reference is not None and self._reference.moving else None

    def _total(
        self, reports: Sequence[Mapping[str, Mapping[str, Tensor]]]
    ) -> tuple[dict[str, NDArray[np.float64]], dict[str, float]]:
        """Sums and maxima of the reports over microbatches and data ranks, on every rank."""
        totals = None
        if self.is_last_stage:
            sums, maxima = ([report[kind] for report in reports] for kind in ("sums", "maxima"))
            local = {name: sum(part[name].double().cpu().numpy() for part in sums) for name in sums[0]}
            whole = sum_over(np.concatenate([np.ravel(value) for value in local.values()]), self.groups.data)
            ends = np.cumsum([np.size(value) for value in local.values()])[:-1]
            greatest = np.array([max(float(part[name]) for part in maxima) for name in maxima[0]])
            everyone = gather_rows(greatest[None], self.groups.data).max(axis=0)
            totals = (
                {
                    name: part.reshape(np.shape(local[name]))
                    for name, part in zip(local, np.split(whole, ends), strict=True)
                },
                dict(zip(maxima[0], everyone.tolist(), strict=True)),
            )
        result: tuple[dict[str, NDArray[np.float64]], dict[str, float]] = broadcast_object(
            totals, self.groups.pipeline, self.groups.pipeline.size - 1
        )
        return result

    def _local_columns(self, ids: Sequence[int]) -> Tensor:
        """Places of global token ids in this rank's slice of the vocabulary."""
        width = self.spec.text.vocab_size // self.groups.tensor.size
        start = self.groups.tensor.rank * width
        return torch.tensor([i - start for i in ids if start <= i < start + width], dtype=torch.int64)


_ONE = torch.tensor(1, dtype=torch.int)


def _nothing(log_probs: Tensor) -> _LossOutput:
    """The loss of a microbatch that only fills a pipeline."""
    return 0.0 * log_probs.sum(), _ONE, {}


def _finalize_sums(overlap: Overlap | None, model: Any, _num_tokens: Tensor | None, **kwargs: Any) -> None:
    """Reduce gradients without dividing by a token count: the loss carries its own denominators."""
    if overlap:
        overlap.start_rest()
    finalize_model_grads(model, None, **kwargs)
