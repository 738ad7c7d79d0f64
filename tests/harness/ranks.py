"""Processes that form a gloo group, kept alive between tests.

A job is a function of `harness.distributed_jobs`, or "module.function" of another module of `harness`.
"""

from __future__ import annotations

import importlib
import os
import traceback
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

TIMEOUT = 60.0  # seconds that a rank waits for another, and that a test waits for a rank


class Ranks:
    """Gloo group of `size` processes with one thread each."""

    def __init__(self, size: int, timeout: float = TIMEOUT) -> None:
        self.size = size
        self._folder = TemporaryDirectory()
        context = get_context("spawn")
        self._pipes, self.processes = [], []
        for rank in range(size):
            own, other = context.Pipe()
            arguments = (rank, size, str(Path(self._folder.name) / "store"), other, timeout)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            other.close()
            self._pipes.append(own)
            self.processes.append(process)

    def run(self, job: str, *arguments: Any) -> list[Any]:
        """Run a job on every rank and return the results. If a rank raises, its result is the exception."""
        for pipe in self._pipes:
            pipe.send((job, arguments))
        return [self._receive(rank) for rank in range(self.size)]

    def _receive(self, rank: int) -> Any:
        if not self._pipes[rank].poll(2 * TIMEOUT):
            raise TimeoutError(f"rank {rank} does not answer")
        try:
            return self._pipes[rank].recv()
        except EOFError:
            return RuntimeError("the process has ended")

    def results(self, job: str, *arguments: Any) -> list[Any]:
        """Run a job on every rank and return the results. Raise the first exception."""
        found = self.run(job, *arguments)
        for rank, result in enumerate(found):
            if isinstance(result, BaseException):
                raise AssertionError(f"rank {rank}") from result
        return found

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def serve(rank: int, size: int, store: str, pipe: Any, timeout: float) -> None:
    """Run jobs until the pipe closes."""
    os.environ.update(OMP_NUM_THREADS="1", ANYATTN_NUM_THREADS="1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    limit = timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit)
    while True:
        try:
            job, arguments = pipe.recv()
        except EOFError:
            return
        try:
            module, _, name = job.rpartition(".")
            jobs = importlib.import_module(f"harness.{module or 'distributed_jobs'}")
            result = getattr(jobs, name)(*arguments)
        except Exception as error:
            error.add_note(traceback.format_exc()) if hasattr(error, "add_note") else None
            result = error
        pipe.send(result)
