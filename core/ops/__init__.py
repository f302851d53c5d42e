"""Recurrences as registered operators, each with a thin public function of the same name."""

from __future__ import annotations

from sinuous.core.ops.additive_decay import additive_decay
from sinuous.core.ops.causal_conv1d import causal_conv1d
from sinuous.core.ops.dag_scan import dag_scan
from sinuous.core.ops.delta_rule import delta_rule
from sinuous.core.ops.dplr import dplr
from sinuous.core.ops.gla import gla
from sinuous.core.ops.grid_scan import grid_scan
from sinuous.core.ops.linear_scan import linear_scan
from sinuous.core.ops.longhorn import longhorn
from sinuous.core.ops.lti_conv import lti_conv
from sinuous.core.ops.mlstm import mlstm
from sinuous.core.ops.selective_scan import selective_scan
from sinuous.core.ops.slstm import slstm
from sinuous.core.ops.ssd import ssd

__all__ = [
    "additive_decay",
    "causal_conv1d",
    "dag_scan",
    "delta_rule",
    "dplr",
    "gla",
    "grid_scan",
    "linear_scan",
    "longhorn",
    "lti_conv",
    "mlstm",
    "selective_scan",
    "slstm",
    "ssd",
]
