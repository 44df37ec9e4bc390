"""Audits: how much privacy a mechanism loses at least, measured, to hold against its claim."""

from veilspan.accounting.audit.norm_ratios import NormRatioAudit, audit_norm_ratios
from veilspan.accounting.audit.one_run import OneRunAudit, audit_one_run
from veilspan.accounting.audit.white_box import WhiteBoxAudit, audit_white_box
from veilspan.accounting.audit.whole_runs import WholeRunsAudit, audit_whole_runs

__all__ = [
    "NormRatioAudit",
    "OneRunAudit",
    "WhiteBoxAudit",
    "WholeRunsAudit",
    "audit_norm_ratios",
    "audit_one_run",
    "audit_white_box",
    "audit_whole_runs",
]
