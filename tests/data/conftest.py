"""The folder of pictures that the tests of the input pipeline read."""

from pathlib import Path

import pytest
from pictures import encoded, noise, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of 8x8 colour images, 11 and 6, all different."""
    for i in range(17):
        write(tmp_path / "pics" / ("ant", "bee")[i > 10] / f"{i:02}.png", encoded(noise(i)))
    return tmp_path / "pics"
