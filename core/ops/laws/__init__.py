"""Every op's declaration by name: `LAWS`."""

from __future__ import annotations

from sinuous.core.ops.laws import causal_conv1d, mlstm, selective_scan, ssd
from sinuous.core.ops.laws.declaration import Laws

LAWS: dict[str, Laws] = {module.LAWS.family.name: module.LAWS for module in (causal_conv1d, mlstm, selective_scan, ssd)}

__all__ = ["LAWS", "Laws"]
