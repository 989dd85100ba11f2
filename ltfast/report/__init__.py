"""`ltfast report`: curves, classes, groups, sharpness and loss geometry of runs as one self-contained HTML page."""

from ltfast.report.main import report

__all__ = ["report"]
