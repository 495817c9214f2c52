"""Whether a model can be cut as asked: said before anything is built, with every number that does not fit."""

from __future__ import annotations

from megatron_vlrl.errors import ConfigError
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
from megatron_vlrl.parallel.dims import ParallelDims


def check_layout(spec: Qwen3VLSpec, dims: ParallelDims) -> None:
    """Raise ConfigError naming everything of the model that the degrees do not divide."""
    dense = not all(spec.text.is_mixture(layer) for layer in range(spec.text.layers))
    divided = {
        "attention heads": spec.text.heads,
        "key/value heads": spec.text.kv_heads,
        "feed-forward width": spec.text.ffn_size if dense else 0,
        "width of an expert": spec.text.expert_ffn_size,
        "vocabulary rows": spec.text.vocab_size,
        "vision heads": spec.vision.heads,
        "vision feed-forward width": spec.vision.ffn_size,
    }
    wrong = [f"{count} {name}" for name, count in divided.items() if count % dims.tensor]
    problems = []
    if wrong:
        problems.append(
            f"parallel.tensor={dims.tensor} does not divide {', '.join(wrong)}; use a divisor of all, "
            "or pad the vocabulary rows of the model folder"
        )
    stages = dims.pipeline * dims.virtual
    if dims.virtual > 1 and dims.pipeline == 1:
        problems.append(f"parallel.virtual_pipeline={dims.virtual} interleaves pipeline stages, but there is one rank")
    if spec.text.layers % stages:
        problems.append(
            f"parallel.pipeline={dims.pipeline} x virtual_pipeline={dims.virtual} does not divide "
            f"{spec.text.layers} layers; use a product out of "
            f"{[n for n in range(1, spec.text.layers + 1) if spec.text.layers % n == 0]}"
        )
    problems += _expert_problems(spec, dims)
    if problems:
        raise ConfigError("; ".join(problems) + f" ({dims.product})")


def _expert_problems(spec: Qwen3VLSpec, dims: ParallelDims) -> list[str]:
    experts, each = spec.text.experts, spec.text.experts_per_token
    if not experts:
        return [f"parallel.expert={dims.expert} shares experts, but the model has none"] if dims.expert > 1 else []
    problems = []
    if experts % dims.expert:
        problems.append(f"parallel.expert={dims.expert} does not divide {experts} experts")
    if not 2 <= each <= experts:
        # Of one expert the weight is always 1, and megatron-core refuses it with this order of top-k and softmax.
        problems.append(f"the model routes a token to {each} of {experts} experts; 2 or more are trained")
    if dims.tensor > 1 and not dims.sequence:
        problems.append(
            f"parallel.tensor={dims.tensor} with experts needs parallel.sequence: megatron-core's dispatcher takes "
            "each tensor rank's tokens for its own"
        )
    return problems
