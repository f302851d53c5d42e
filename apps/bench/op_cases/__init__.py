"""Comparisons of `sinuous bench ops`: one case per op, each with our backends and the peers people use today."""

from __future__ import annotations

from sinuous.apps.bench.op_cases.cells import SLSTM
from sinuous.apps.bench.op_cases.channels import CAUSAL_CONV1D, LINEAR_SCAN, LONGHORN, SELECTIVE_SCAN
from sinuous.apps.bench.op_cases.contract import FASTEST, Case, Inputs, Peer, Prepared, Shape, backends, ours
from sinuous.apps.bench.op_cases.grids import DAG_SCAN, GRID_SCAN
from sinuous.apps.bench.op_cases.linear_systems import LTI_CONV
from sinuous.apps.bench.op_cases.matrix_states import ADDITIVE_DECAY, DELTA_RULE, DPLR, GLA, MLSTM, SSD

CASES = {
    case.name: case
    for case in (
        SELECTIVE_SCAN,
        LONGHORN,
        CAUSAL_CONV1D,
        LINEAR_SCAN,
        LTI_CONV,
        SLSTM,
        SSD,
        GLA,
        ADDITIVE_DECAY,
        DELTA_RULE,
        DPLR,
        MLSTM,
        GRID_SCAN,
        DAG_SCAN,
    )
}

__all__ = ["CASES", "CAUSAL_CONV1D", "FASTEST", "Case", "Inputs", "Peer", "Prepared", "Shape", "backends", "ours"]
