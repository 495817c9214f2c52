"""Real gloo processes for tests: one helper, with a time limit that prints every rank's stack."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

# Imported once by the fork server: every rank is a fork of it.
PRELOAD = [
    "torch",
    "torch.distributed",
    "scipy.special",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "transformers.models.auto.tokenization_auto",
    "megatron_vlrl.backends.megatron.backend",
]


def _rank_main(fn: Callable[..., Any], args: tuple[Any, ...], rank: int, world: int, folder: str) -> None:
    with open(Path(folder, f"rank{rank}.log"), "w", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), OMP_NUM_THREADS="1")
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        store = dist.FileStore(str(Path(folder, "store")), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
        try:
            result = fn(*args)
            Path(folder, f"rank{rank}.pkl").write_bytes(pickle.dumps(result))
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            traceback.print_exc()
            log.flush()
            os._exit(1)


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call `fn(*args)` in `world` processes joined by gloo; return what each returned (picklable), by rank.

    `fn` is a function of a test module. Inside it torch.distributed is initialised. A failing rank, or one that
    runs past `timeout` seconds, fails the test with every rank's output and stack.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank_main, args=(fn, args, r, world, folder)) for r in range(world)]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout
        while any(p.is_alive() for p in ranks) and time.monotonic() < deadline:
            if any(p.exitcode not in (None, 0) for p in ranks):
                deadline = min(deadline, time.monotonic() + 5)
            time.sleep(0.01)
        late = [p for p in ranks if p.is_alive()]
        for process in late:
            os.kill(process.pid, signal.SIGUSR1)
        if late:
            time.sleep(0.3)
        for process in late:
            process.kill()
        for process in ranks:
            process.join()
        if late or any(p.exitcode for p in ranks):
            logs = "\n".join(
                f"--- rank {r} (exit {p.exitcode})\n{Path(folder, f'rank{r}.log').read_text()}"
                for r, p in enumerate(ranks)
                if Path(folder, f"rank{r}.log").exists()
            )
            reason = f"ranks still running after {timeout} s" if late else "a rank failed"
            raise AssertionError(f"{reason}\n{logs}")
        results = [pickle.loads(Path(folder, f"rank{r}.pkl").read_bytes()) for r in range(world)]
        sys.stdout.write("".join(Path(folder, f"rank{r}.log").read_text() for r in range(world)))
        return results
