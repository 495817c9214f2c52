"""AdamW with the interface of Apex's and Transformer Engine's FusedAdam, for where neither is installed.

megatron-core keeps a torch.optim.AdamW's step in each parameter's state. Its DistributedOptimizer then loads one and
the same tensor for all of them (distrib_optimizer.py:825), which every parameter increments: no error, wrong steps.
Here the step lies in the parameter group, where Apex has it, and one code path serves every optimizer.
"""

from __future__ import annotations

from typing import Any

import megatron.core.optimizer as mcore_optimizer
import megatron.core.optimizer.distrib_optimizer as mcore_distributed
import torch
from torch import Tensor
from torch.optim.adamw import adamw


class FusedAdam(torch.optim.Optimizer):
    """torch's own AdamW arithmetic; state `exp_avg` and `exp_avg_sq` for each parameter, `step` for each group."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("this optimizer is AdamW; decoupled_weight_decay must be on")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # gradients are there already
        """Update every parameter that has a gradient; each group counts a step, with or without parameters here."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            states = [self._state_of(parameter) for parameter in parameters]
            # torch's function increments a step for each parameter; all have taken the same number.
            steps = [torch.tensor(float(group["step"])) for _ in parameters]
            group["step"] += 1
            if parameters:
                adamw(
                    parameters,
                    [parameter.grad for parameter in parameters],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    [],
                    steps,
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state.update(exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        return state


def install() -> None:
    """Have megatron-core use FusedAdam of this file where it found neither Transformer Engine nor Apex."""
    if mcore_optimizer.USING_PYTORCH_OPTIMIZER:
        mcore_optimizer.Adam = mcore_distributed.Adam = FusedAdam
        mcore_optimizer.USING_PYTORCH_OPTIMIZER = False
        mcore_distributed.HAVE_APEX_OR_TE = mcore_distributed.USING_APEX_OPTIMIZER = True
