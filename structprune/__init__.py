"""structprune: trained PyTorch networks made smaller and faster by removing whole channels."""

from structprune import masks as masks
from structprune import search as search
from structprune import training as training
from structprune.api import plan, prune
from structprune.benchmarking import Benchmark, benchmark, layer_times
from structprune.coupling.costs import Cost, cost
from structprune.coupling.groups import Group, Member
from structprune.dependency_graph import DependencyGraph
from structprune.depth import Branch, Removal, branches, remove_branches
from structprune.depth import choose as choose_branches
from structprune.depth.plan import DepthPlan
from structprune.export.aotinductor import export_aotinductor
from structprune.export.language_models import GgufExport, Objection, export_gguf, serving_objections
from structprune.export.metadata import OnnxInfo, onnx_info
from structprune.export.mobile import export_executorch, export_litert
from structprune.export.onnx import OnnxExport, export_onnx
from structprune.export.onnx_model import onnx_model
from structprune.export.openvino import export_openvino
from structprune.export.tensorrt import export_tensorrt
from structprune.export.torch_files import torch_model
from structprune.export.verified import Export
from structprune.folders import prune_folder
from structprune.importance.weight import LnNorm, Random
from structprune.io import load, save
from structprune.latency.measure import Latency
from structprune.ops.op import register_op
from structprune.ops.op import register_op as register_rule
from structprune.ops.opaque import register_module_rule
from structprune.optimizers import remap_optimizer
from structprune.planning.plan import Plan
from structprune.planning.sensitivities import Sensitivity, sensitivity
from structprune.pruner import Pruner
from structprune.quantization.quantize import Quantized, quantize
from structprune.recovery.folding import fold
from structprune.recovery.recalibrate import recalibrate
from structprune.recovery.recover import recover
from structprune.recovery.report import RecoveryReport, recovery_report
from structprune.recovery.selection import Reconstruction
from structprune.reporting import (
    Stage,
    plot_chain,
    plot_costs,
    plot_curve,
    plot_graph,
    plot_recovery,
    plot_widths,
    report,
)
from structprune.search.library import Library, library
from structprune.search.optimize import Searching, optimize
from structprune.search.result import Optimized
from structprune.search.space import Space
from structprune.surgery.history import kept
from structprune.surgery.materialize import materialize_weights
from structprune.surgery.rotation import rotate_residual
from structprune.surgery.verify import Report, verify

__version__ = "0.1.0"

__all__ = [
    "Benchmark",
    "Branch",
    "Cost",
    "DependencyGraph",
    "DepthPlan",
    "Export",
    "GgufExport",
    "Group",
    "Latency",
    "Library",
    "LnNorm",
    "Member",
    "Objection",
    "OnnxExport",
    "OnnxInfo",
    "Optimized",
    "Plan",
    "Pruner",
    "Quantized",
    "Random",
    "Reconstruction",
    "RecoveryReport",
    "Removal",
    "Report",
    "Searching",
    "Sensitivity",
    "Space",
    "Stage",
    "benchmark",
    "branches",
    "choose_branches",
    "cost",
    "export_aotinductor",
    "export_executorch",
    "export_gguf",
    "export_litert",
    "export_onnx",
    "export_openvino",
    "export_tensorrt",
    "fold",
    "kept",
    "layer_times",
    "library",
    "load",
    "materialize_weights",
    "onnx_info",
    "onnx_model",
    "optimize",
    "plan",
    "plot_chain",
    "plot_costs",
    "plot_curve",
    "plot_graph",
    "plot_recovery",
    "plot_widths",
    "prune",
    "prune_folder",
    "quantize",
    "recalibrate",
    "recover",
    "recovery_report",
    "register_module_rule",
    "register_op",
    "register_rule",
    "remap_optimizer",
    "remove_branches",
    "report",
    "rotate_residual",
    "save",
    "sensitivity",
    "serving_objections",
    "torch_model",
    "verify",
]
