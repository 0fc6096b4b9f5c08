"""Several compressors at several byte budgets on the same data: who ends more accurate at equal bytes.

`plan` says which runs that takes, `runner` runs what is missing, `results` makes one document of what they left. Tables
and figures are made from that document alone, in `tofu.reporting.report.compare`.
"""

from server.comparison import run_comparison
from tofu.reporting.compare.plan import Comparison

__all__ = ["Comparison", "run_comparison"]
