"""Recurrences with the calling convention of `torch.nn.LSTM`; see `sinuous.core.nn`."""

from __future__ import annotations

from sinuous.core.nn import Recurrent as Recurrent
from sinuous.core.nn import __dir__ as __dir__
from sinuous.core.nn import __getattr__ as __getattr__
