"""Depth: whole branches and blocks, located in a trace and taken out of a model."""

from structprune.depth.choosing import choose
from structprune.depth.finding import branches
from structprune.depth.records import Branch
from structprune.depth.removal import Removal, remove_branches

__all__ = ["Branch", "Removal", "branches", "choose", "remove_branches"]
