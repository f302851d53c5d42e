"""The selective scan in Triton; the kernels are in `channel_states` and `channel_states_backward`."""

from sinuous.kernels.triton.channel_states import forward
from sinuous.kernels.triton.channel_states_backward import backward

__all__ = ["backward", "forward"]
