"""What `make gpu-report` prints of decode and prefill against the device's own limits. A few minutes on one GPU."""

from __future__ import annotations

import pytest
import torch

from ..measure.decode_bound import SHAPES, Bench, report  # noqa: TID252  # tests are no package


@pytest.mark.timeout(600)
def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.mem_get_info(0)[0] < 40 << 30:
        pytest.skip("an 8B-shaped model and its pages want 40 GiB")
    bench = Bench(SHAPES["8b"], torch.device("cuda:0"), 8192 + 256)
    with capsys.disabled():
        print()
        for line in report(bench, (1, 32, 128), (1024, 8192)):
            print(line, flush=True)
