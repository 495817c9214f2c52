"""What megatron-core 0.16 needs to run without CUDA: six small shims, inert where CUDA exists.

S1 `torch.cuda.current_device()` is called throughout: it answers the CPU device.
S2 `device="cuda"` literals, `.cuda()` and 'torch.cuda.FloatTensor' type names: a TorchFunctionMode, entered
   around model build, forward-backward and optimizer step only (`on_device`).
S3 the CUDA random-state tracker: a subclass over the CPU generator.
S4 `torch.cuda.synchronize()`: does nothing.
S5 the dispatcher of tokens to experts copies its counts to the host on a CUDA stream: it does without.
S6 gloo gathers and scatters parts of one size only; tokens of experts that are cut over tensor ranks come in any.
Each has a canary test that fails when megatron-core no longer needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import megatron.core.tensor_parallel.mappings as mcore_mappings
import megatron.core.tensor_parallel.random as mcore_random
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_gather_equal = mcore_mappings._gather_along_first_dim
_scatter_equal = mcore_mappings._reduce_scatter_along_first_dim


def _names_cuda(device: Any) -> bool:
    return device is not None and not isinstance(device, int) and torch.device(device).type == "cuda"


class CudaLiteralsToCpu(TorchFunctionMode):
    """S2: tensors asked for on "cuda" are made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Redirect the call; everything else passes through."""
        kwargs = kwargs or {}
        if _names_cuda(kwargs.get("device")):
            kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"} | {"device": _CPU}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


class CpuRngTracker(mcore_random.CudaRNGStatesTracker):
    """S3: named random states over the CPU generator."""

    def add(self, name: str, seed: int) -> None:
        """Start the state `name` from `seed`."""
        self._is_initialized = True
        if seed in self.seeds_ or name in self.states_:
            raise ValueError(f"random state {name!r} or seed {seed} exists already")
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def fork(self, name: str = mcore_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        """Draw from the state `name` inside the block."""
        outer = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer)


def _counts_on_host(dispatcher: Any, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
    """S5: the counts are on the host already; the collectives want them as plain numbers."""
    if point == dispatcher.cuda_dtoh_point and isinstance(dispatcher.input_splits, Tensor):
        dispatcher.input_splits = dispatcher.input_splits.tolist()
        dispatcher.output_splits = dispatcher.output_splits.tolist()
    return tokens_per_expert


def _gather_parts(
    part: Tensor, group: dist.ProcessGroup, sizes: list[int] | None = None, use_global_buffer: bool = False
) -> Tensor:
    """S6: every rank's rows, one after the other, of `sizes`."""
    if sizes is None or group.size() == 1:
        return _gather_equal(part, group, sizes, use_global_buffer)
    padded = torch.cat([part, part.new_zeros(max(sizes) - len(part), *part.shape[1:])])
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([one[:size] for one, size in zip(parts, sizes, strict=True)])


def _scatter_sum(
    whole: Tensor, group: dist.ProcessGroup, sizes: list[int] | None = None, use_global_buffer: bool = False
) -> Tensor:
    """S6: this rank's rows, of `sizes`, of the sum over ranks."""
    if sizes is None or group.size() == 1:
        return _scatter_equal(whole, group, sizes, use_global_buffer)
    total = whole.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total.split(sizes)[group.rank()].contiguous()


def install() -> None:
    """Put S1, S3, S4, S5 and S6 in place; nothing happens where CUDA exists. May be called again."""
    if torch.cuda.is_available():
        return
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_args, **_kwargs: None
    mcore_random.CudaRNGStatesTracker = CpuRngTracker
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = "none"  # or its constructor makes one
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = _counts_on_host
    mcore_mappings._gather_along_first_dim = _gather_parts
    mcore_mappings._reduce_scatter_along_first_dim = _scatter_sum
    mcore_random._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)


def on_device() -> AbstractContextManager[Any]:
    """The block in which megatron-core may build, run and update the model: S2 on a CPU, nothing elsewhere."""
    return nullcontext() if torch.cuda.is_available() else CudaLiteralsToCpu()
