"""What test files of small models share, and those that measure on a double of a device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from fusepress.targets import remote
from tests.device_double import DeviceDouble, Server, served

# an example takes as long as the machine lets it: hypothesis's own deadline of 200 ms failed on a busy one
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads of so small a model only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """OpenSSH's server on loopback."""
    folder = tmp_path_factory.mktemp("server")
    with served(folder, DeviceDouble(folder / "nobody")) as found:
        yield found


@pytest.fixture
def double(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceDouble]:
    """A new device that the server's sessions are on."""
    monkeypatch.setattr(remote, "LOCAL_LOCKS", tmp_path / "locks")
    found = DeviceDouble(tmp_path / "a device")
    server.use(found)
    yield found
    found.end_jobs()
