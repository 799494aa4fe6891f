"""What was measured and decided, as one HTML file and as figures for papers."""

from structprune.reporting.chain import Stage, plot_chain
from structprune.reporting.figures import plot_costs, plot_curve, plot_graph, plot_recovery, plot_widths
from structprune.reporting.page import report

__all__ = ["Stage", "plot_chain", "plot_costs", "plot_curve", "plot_graph", "plot_recovery", "plot_widths", "report"]
