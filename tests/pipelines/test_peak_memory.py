import sys

import numpy as np
import pytest

from lit_align import peak_memory
from lit_align.peak_memory import PeakMemory


@pytest.mark.skipif(sys.platform != "linux", reason="resets Linux's high-water mark")
def test_the_peak_belongs_to_the_block():
    with PeakMemory() as first:
        np.ones(2**26 // 8 * 4)  # 256 MiB
    with PeakMemory() as second:
        pass
    if second.scope == "process":
        pytest.skip("this machine does not let the mark be reset")
    assert first.scope == "stage"
    assert 200 < first.mib - second.mib < 400


def test_falls_back_to_the_peak_of_the_process_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(peak_memory, "CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    with PeakMemory() as peak:
        pass
    assert (peak.scope, peak.mib is None) == (
        ("unknown", True) if sys.platform == "win32" else ("process", False)
    )
    if peak.mib is not None:
        assert peak.mib > 10
