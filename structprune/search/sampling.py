"""What both searches ask of Optuna: silence, and limits told in a way that its version 4 and its version 5 know."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

LACKING = "lacking"


@contextmanager
def quiet(optuna: Any) -> Generator[None]:
    """Without Optuna's log of each trial and its remarks that parts of it are new; afterwards its log is as it was."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def constrain(trial: Any, lacking: float) -> None:
    """Tell a trial how much it lacks to be feasible; 0 or less if it is."""
    if hasattr(trial, "set_constraint"):
        trial.set_constraint(LACKING, lacking)
    else:
        trial.set_user_attr(LACKING, lacking)


def constraints(optuna: Any) -> dict[str, Any]:
    """What a sampler is given so that it reads them: a function before Optuna 5, nothing from then on."""
    if hasattr(optuna.trial.Trial, "set_constraint"):
        return {}
    return {"constraints_func": lambda trial: (trial.user_attrs.get(LACKING, 0.0),)}
