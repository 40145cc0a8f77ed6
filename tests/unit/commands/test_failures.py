"""What is said of errors that no step foresees."""

from __future__ import annotations

import resource

import pytest
import torch
from conftest import limited

from clipcid_cli.commands.failures import explain


def test_a_batch_larger_than_files_may_be_is_no_bug() -> None:
    with limited(resource.RLIMIT_FSIZE, 4096), pytest.raises(RuntimeError) as raised:
        torch.zeros(10_000).share_memory_()
    failure = explain(raised.value)
    assert failure.message.endswith("through shared memory (/dev/shm): File too large.")
    assert failure.fix == "Allow larger files: ulimit -f unlimited; or use --workers 0 or a smaller --batch-size."
