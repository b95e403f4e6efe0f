"""A cluster for all tests of this folder, and the run that the others are compared with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, NoCluster
from tests.slurm.jobs import Job, submit


@pytest.fixture(scope="session")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    try:
        cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    except NoCluster as reason:
        pytest.skip(f"No Slurm cluster can be started here: {reason}")
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def _login_node(_cluster: Cluster) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{_cluster.bin}:{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(autouse=True)
def cluster(_login_node: None) -> Iterator[None]:
    """Slurm's commands at hand, and no job left behind."""
    yield
    os.system(f"scancel --user={os.getuid()}")


@pytest.fixture(scope="session")
def whole(_login_node: None, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job that nothing interrupts: two nodes of a process each."""
    job = submit(tmp_path_factory.mktemp("whole") / "run", "--nodes", "2")
    job.wait_for_end()
    return job
