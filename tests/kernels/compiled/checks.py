"""What every kernel that streams contiguous data is held to on every target."""

from lit_align_kernels.audit.compiled import compile_audit


def checked_streams(case, target):
    """The report of a case: no spill, no atomic, every access sorted, 80 % of the stream wide."""
    report = compile_audit(case, target)
    place = f"{report.kernel} {case.name} {target}: {report}"
    assert report.spills == 0 and report.fits and report.atomics == 0, place
    assert report.accesses["stream"] and "untagged" not in report.accesses, place
    assert report.wide_share("stream") >= 0.8, place
    return report
