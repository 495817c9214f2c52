"""OpenVLThinkerV2's six domains as tasks: each has questions of several problem types, judged by `meta.problem_type`.

With `PYTHONPATH=examples` a sample's task is `domains:math`, or another name at the end. Lengths and entropies are
shaped by these; rollouts are ranked by the metadata field `problem_type`, where `algorithm.advantage.task_key` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from problem_types import PROBLEM_TYPES

from megatron_vlrl.config.names import unknown_name


def by_problem_type(answer: str, gold: Any, meta: Mapping[str, Any]) -> float:
    """The accuracy that the question's problem type says; DataError for a gold that this type could not judge by."""
    kind = str(meta.get("problem_type"))
    if kind not in PROBLEM_TYPES:
        raise unknown_name(kind, PROBLEM_TYPES, "meta.problem_type")
    PROBLEM_TYPES[kind].check_gold(gold)
    return PROBLEM_TYPES[kind].accuracy(answer, gold, meta)


general_vqa = math = chart = ocr = grounding = spatial = by_problem_type
