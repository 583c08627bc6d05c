from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints.corpus import CORPUS
from tests.checkpoints.fuzzing import fuzz


@pytest.mark.parametrize("name", CORPUS)
def test_damaged_and_hostile_files_are_refused(tmp_path: Path, name: str) -> None:
    tally = fuzz(name, range(150), tmp_path)
    assert tally.failures == []
    assert tally.tries == 150
    assert tally.refused > 30
