"""Token mixers by name: `build_mixer(name, dim)`, `list_mixers()`."""

from __future__ import annotations

from sinuous.core.mixers.aaren import Aaren, AarenState
from sinuous.core.mixers.attention import AttentionState, SlidingWindowAttention, SoftmaxAttention, WindowState
from sinuous.core.mixers.bidirectional import Bidirectional
from sinuous.core.mixers.contract import (
    Mixer,
    build_mixer,
    list_mixers,
    mixer_class,
    mixer_options,
    register_mixer,
    register_state,
)
from sinuous.core.mixers.delta_net import DeltaNet, DeltaProduct, GatedDeltaNet, GatedDeltaProduct
from sinuous.core.mixers.elementwise import ElementwiseState
from sinuous.core.mixers.gate_loop import GateLoop
from sinuous.core.mixers.gla import GLA, HGRN2
from sinuous.core.mixers.gsa import GSA, GSAState
from sinuous.core.mixers.hgrn import HGRN
from sinuous.core.mixers.hydra import Hydra
from sinuous.core.mixers.kda import KDA
from sinuous.core.mixers.lightnet import LightNet, LightNetNonCausal, LightNetState
from sinuous.core.mixers.linear_attention import LinearAttention, Retention, RetentionState, SimpleGLA
from sinuous.core.mixers.longhorn import Longhorn
from sinuous.core.mixers.lru import LRU
from sinuous.core.mixers.mamba import Mamba, MambaState
from sinuous.core.mixers.mamba2 import Mamba2
from sinuous.core.mixers.mambavision import MambaVisionMixer
from sinuous.core.mixers.matrix_mixer import MatrixState
from sinuous.core.mixers.min_rnn import MinGRU, MinLSTM
from sinuous.core.mixers.mlstm import MLSTM, MLSTMLarge, MLSTMState
from sinuous.core.mixers.plstm import PLSTMGrid
from sinuous.core.mixers.rg_lru import RGLRU, RGLRUState
from sinuous.core.mixers.rwkv4 import RWKV4, RWKV4State
from sinuous.core.mixers.rwkv6 import RWKV6
from sinuous.core.mixers.rwkv7 import RWKV7
from sinuous.core.mixers.s4 import S4, S4D, LTIState, S4Bidirectional, S4DBidirectional
from sinuous.core.mixers.s5 import S5
from sinuous.core.mixers.slstm import SLSTM, SLSTMState
from sinuous.core.mixers.ss2d import SS2D
from sinuous.core.mixers.vim_pair import VimPair
from sinuous.core.mixers.vir import ViRRetention, ViRRetentionGrid, ViRState
from sinuous.core.mixers.vit_attention import ViTAttention

__all__ = [
    "GLA",
    "GSA",
    "HGRN",
    "HGRN2",
    "KDA",
    "LRU",
    "MLSTM",
    "RGLRU",
    "RWKV4",
    "RWKV6",
    "RWKV7",
    "S4",
    "S4D",
    "S5",
    "SLSTM",
    "SS2D",
    "Aaren",
    "AarenState",
    "AttentionState",
    "Bidirectional",
    "DeltaNet",
    "DeltaProduct",
    "ElementwiseState",
    "GSAState",
    "GateLoop",
    "GatedDeltaNet",
    "GatedDeltaProduct",
    "Hydra",
    "LTIState",
    "LightNet",
    "LightNetNonCausal",
    "LightNetState",
    "LinearAttention",
    "Longhorn",
    "MLSTMLarge",
    "MLSTMState",
    "Mamba",
    "Mamba2",
    "MambaState",
    "MambaVisionMixer",
    "MatrixState",
    "MinGRU",
    "MinLSTM",
    "Mixer",
    "PLSTMGrid",
    "RGLRUState",
    "RWKV4State",
    "Retention",
    "RetentionState",
    "S4Bidirectional",
    "S4DBidirectional",
    "SLSTMState",
    "SimpleGLA",
    "SlidingWindowAttention",
    "SoftmaxAttention",
    "ViRRetention",
    "ViRRetentionGrid",
    "ViRState",
    "ViTAttention",
    "VimPair",
    "WindowState",
    "build_mixer",
    "list_mixers",
    "mixer_class",
    "mixer_options",
    "register_mixer",
    "register_state",
]
