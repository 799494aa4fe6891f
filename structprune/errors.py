"""The exceptions of structprune.

Every message says what went wrong, where (module path, operation, source line) and what to do about it.
"""

from __future__ import annotations


class StructpruneError(Exception):
    """Base of all errors that the library raises on purpose."""


class TraceError(StructpruneError):
    """The model runs, but its forward cannot be recorded as a graph of operations."""


class RuleError(StructpruneError):
    """A rule for an operation is missing, registered twice, or contradicts the tensors that it was given."""


class PlanError(StructpruneError, ValueError):
    """What is asked for cannot be planned: a bad ratio, an unknown layer, bad indices, every channel gone."""


class UnsupportedModelError(PlanError):
    """A model of this kind (sharded, scripted, packed, not initialised) cannot be pruned; the message says what can."""


class UnknownLayerError(PlanError, KeyError):
    """No module or parameter of the model has this name, or the module takes no part in the forward."""

    def __str__(self) -> str:
        """Show the message as it is; ``KeyError`` alone would show its ``repr``."""
        return str(self.args[0]) if self.args else ""


class PinnedError(PlanError):
    """The channels asked for may not be removed; the message gives the reason."""


class SurgeryError(StructpruneError):
    """A plan does not fit the model that it is applied to; the model is left as it was."""


class VerificationError(StructpruneError):
    """The pruned network does not compute what the original computes with those channels switched off."""


class LoadError(StructpruneError):
    """A saved model is incomplete, damaged, of a later version, or does not fit the model that it is loaded into."""


class ExportError(StructpruneError):
    """The exported file is invalid or computes something else than the model."""


class BackendError(StructpruneError, ValueError):
    """A backend cannot run here: it is not for this device, or lacks a compiler or a provider."""


class MissingExtraError(StructpruneError, ImportError):
    """An optional dependency is needed; the message says which extra installs it."""


class RecoveryError(StructpruneError):
    """A pruned model cannot be recovered: it does not belong to the original, or the data does not fit it."""
