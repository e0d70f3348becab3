"""A folder with checkpoints."""

from pathlib import Path

import pytest
from checkpoints import make_state, opened, save


@pytest.fixture
def two_steps(tmp_path: Path) -> Path:
    """The folder of a run with the checkpoints of steps 1 and 2."""
    with opened(tmp_path) as manager:
        save(manager, 1, make_state(1))
        save(manager, 2, make_state(2))
    return tmp_path
