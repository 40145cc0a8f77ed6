"""Arrays that processes share in a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.steps import shared_arrays


def test_a_folder_that_not_every_host_has_is_an_error(tmp_path: Path) -> None:
    shared_arrays._write(tmp_path, 0, (np.arange(3),))
    assert shared_arrays._map(tmp_path, 0, 1)[0].tolist() == [0, 1, 2]
    shutil.rmtree(tmp_path)
    with pytest.raises(ClipcidError, match="not every host has it"):
        shared_arrays._map(tmp_path, 0, 1)
