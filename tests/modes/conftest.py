"""A trained run of the network of tests/mixing.py."""

from pathlib import Path

import mixing
import pytest

from cfd.modes import settings


@pytest.fixture
def mixing_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of a run at step 7 whose network is that of tests/mixing.py."""
    monkeypatch.setattr(settings, "network_of", lambda config: mixing.NETWORK)
    monkeypatch.setattr(settings, "open_run", mixing.opening(mixing.params()))
    return tmp_path
