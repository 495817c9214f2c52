"""A program: vLLM loads folders, and says how likely it finds prompts and the answers that it samples to them.

    python -m tests.vllm_score REQUEST.json RESULT.json

Its own process, because vLLM in a process reseeds its random generators and takes over its threads.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def main(request_file: str, result_file: str) -> None:
    """Request: folders; prompts with text and image files; seed, samples, tokens, allowed. Result: a list a folder."""
    os.environ.update(SETTINGS)
    from PIL import Image
    from vllm import SamplingParams

    request = json.loads(Path(request_file).read_text())
    sampling = SamplingParams(
        n=request["samples"],
        seed=request["seed"],
        max_tokens=request["tokens"],
        allowed_token_ids=request["allowed"],
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=0,
        detokenize=False,
    )
    prompts = [
        {
            "prompt": prompt["text"],
            "multi_modal_data": {"image": [Image.open(path) for path in prompt["images"]]} if prompt["images"] else {},
        }
        for prompt in request["prompts"]
    ]
    found = [score(folder, prompts, sampling) for folder in request["folders"]]
    Path(result_file).write_text(json.dumps(found))


def score(folder: str, prompts: list[dict[str, Any]], sampling: Any) -> list[dict[str, Any]]:
    """Of each prompt: its token ids, their log-probs from the second on, and answers with theirs."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=2**26,
        limit_mm_per_prompt={"image": 2, "video": 0},
        logprobs_mode="raw_logprobs",
        max_model_len=512,
        max_num_seqs=16,
    )
    found = [
        {
            "ids": list(output.prompt_token_ids),
            "log_probs": of_tokens(output.prompt_token_ids[1:], output.prompt_logprobs[1:]),
            "answers": [
                {"ids": list(each.token_ids), "log_probs": of_tokens(each.token_ids, each.logprobs)}
                for each in output.outputs
            ],
        }
        for output in engine.generate(prompts, sampling, use_tqdm=False)
    ]
    del engine
    cleanup_dist_env_and_memory()
    return found


def of_tokens(ids: list[int], log_probs: list[dict[int, Any]]) -> list[float]:
    """The log-prob of each token among those that vLLM gives for its place."""
    return [place[token].logprob for token, place in zip(ids, log_probs, strict=True)]


if __name__ == "__main__":
    main(*sys.argv[1:])
