"""Declarations of all ops by name: `LAWS`."""

from __future__ import annotations

from sinuous.core.ops.laws import (
    additive_decay,
    causal_conv1d,
    dag_scan,
    delta_rule,
    dplr,
    gla,
    grid_scan,
    linear_scan,
    longhorn,
    lti_conv,
    mlstm,
    selective_scan,
    slstm,
    ssd,
)
from sinuous.core.ops.laws.declaration import Laws

_MODULES = (
    additive_decay,
    causal_conv1d,
    dag_scan,
    delta_rule,
    dplr,
    gla,
    grid_scan,
    linear_scan,
    longhorn,
    lti_conv,
    mlstm,
    selective_scan,
    slstm,
    ssd,
)

LAWS: dict[str, Laws] = {module.LAWS.family.name: module.LAWS for module in _MODULES}

__all__ = ["LAWS", "Laws"]
