import pytest

from lit_align_kernels.audit import liger, table


@pytest.mark.skipif(not liger.is_installed(), reason="liger-kernel is not installed")
def test_liger_reads_its_logits_twice():
    (case,) = liger.traffic_cases()
    report = table.traffic_audit(case)
    assert report.out_of_bounds == 0
    assert 1.49 < report.moved_bytes / report.minimum_bytes < 1.51
