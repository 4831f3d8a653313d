"""Checkpoints that several tests of the commands convert."""

from __future__ import annotations

from pathlib import Path

import pytest

from optstate.recipes import AdamW
from tests.support.converting import native


@pytest.fixture(scope="module")
def adamw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native(tmp_path_factory.mktemp("adamw"), lambda m: AdamW(m.named_parameters(), lr=1e-2))
