"""Log-probs of policy and reference in, an estimate of the divergence for each token out, to be part of the loss.

The samples are the policy's own. Each estimator's expectation is KL(policy || reference), or nearly so for k2
(J. Schulman, "Approximating KL Divergence", 2020: joschu.net/blog/kl-approx.html). A loss moves the policy by the
gradient, and the expectation of that is another one for each: see below.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_vlrl.algorithms.losses import MAX_LOG_RATIO, require_same_shape

Estimator = Callable[[Tensor, Tensor], Tensor]


def k1(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """log(policy / reference): unbiased, but of great variance; on policy, its gradient is 0 in expectation.

    Float[Tensor, "R"] each; log_probs and the result with gradient. ValueError for unequal shapes.
    """
    require_same_shape(log_probs, reference_log_probs)
    return log_probs - reference_log_probs


def k2(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """log(policy / reference)^2 / 2: slightly biased; on policy, its gradient is that of KL(policy || reference).

    Float[Tensor, "R"] each; log_probs and the result with gradient. ValueError for unequal shapes.
    """
    require_same_shape(log_probs, reference_log_probs)
    return (log_probs - reference_log_probs).square() / 2.0


def k3(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """x - 1 - log x, with x = reference / policy: unbiased, never negative; GRPO's (arXiv 2402.03300, eq. 4).

    On policy, its gradient is that of KL(reference || policy). Float[Tensor, "R"] each; log_probs and the result with
    gradient. ValueError for unequal shapes.
    """
    require_same_shape(log_probs, reference_log_probs)
    # Only upwards: far below, exp gives 0, and the gradient that pulls the policy back remains.
    log_ratio = (reference_log_probs - log_probs).clamp(max=MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio  # of near policies, where exp(x) - 1 would be rounding


ESTIMATORS: dict[str, Estimator] = {"k1": k1, "k2": k2, "k3": k3}
