"""What the gates did: counts per layer and head, as text, dictionary, pictures and a page."""

from patchattn.report.counts import LayerCounts
from patchattn.report.drafts import DraftCounts
from patchattn.report.report import GateReport
from patchattn.report.savings import HeadShape, Savings
from patchattn.report.timeline import Stretches, Timeline

__all__ = ["DraftCounts", "GateReport", "HeadShape", "LayerCounts", "Savings", "Stretches", "Timeline"]
