"""Clipping by the norm of the whole gradient, as the settings say it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_vlrl.backends.megatron import cpu
from megatron_vlrl.backends.megatron.optimizer import apply_update
from tests.reference import at_rate


def updated(gradient: list[float], clip_norm: float) -> list[float]:
    """What plain gradient descent at learning rate 1 takes away from zeros."""
    cpu.install()
    weight = torch.nn.Parameter(torch.zeros(len(gradient)))
    weight.grad = torch.tensor(gradient)
    descent = torch.optim.SGD([{"params": [weight], "lr_mult": 1.0, "wd_mult": 1.0}], lr=0.0)
    optimizer = SimpleNamespace(
        param_groups=descent.param_groups,
        prepare_grads=lambda: False,
        get_grad_norm=weight.grad.norm,
        get_parameters=lambda: [weight],
        step_with_ready_grads=descent.step,
    )
    with cpu.on_device():
        norm, finite = apply_update(optimizer, at_rate(1.0, clip_norm=clip_norm))
    assert norm == pytest.approx(torch.tensor(gradient).norm().item())
    assert finite
    return (-weight).tolist()


@pytest.mark.parametrize(
    ("clip_norm", "step"),
    [(1.0, [0.6, 0.8]), (10.0, [3.0, 4.0]), (0.0, [3.0, 4.0])],
    ids=["clipped", "within", "off"],
)
def test_gradient_of_norm_five(clip_norm, step):
    assert updated([3.0, 4.0], clip_norm) == pytest.approx(step, rel=1e-5)
