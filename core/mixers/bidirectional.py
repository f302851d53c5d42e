"""Two causal mixers, one for each direction of time, averaged, so that a recurrence sees the future."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from sinuous.core.mixers.contract import Mixer, Shared, build_mixer
from sinuous.kernels.torch.packing import mirror


class Bidirectional(Mixer):
    """Average of two causal mixers f, g of one kind, `y = (f(x) + flip(g(flip(x)))) / 2`, each with its own parameters.

    Args:
        name: a causal mixer by its registered name.
        dim: width of the model.
        **kwargs: for both constructors.

    Raises:
        ValueError: if there is no such mixer, or it already looks both ways.
    """

    causal: ClassVar[bool] = False
    constant_state: ClassVar[bool] = False
    __constants__: ClassVar[list[str]] = ["reads_positions"]

    def __init__(self, name: str, dim: int, **kwargs: Any) -> None:
        super().__init__()
        self.past = build_mixer(name, dim, **kwargs)
        self.future = build_mixer(name, dim, **kwargs)
        self.reads_positions = self.past.reads_positions
        if not self.past.causal:
            raise ValueError(f"mixer {name!r} already looks both ways; use it without Bidirectional")

    def init_weights(self) -> None:
        self.past.init_weights()
        self.future.init_weights()

    def output_weights(self) -> set[str]:
        return {f"{side}.{name}" for side in ("past", "future") for name in self.past.output_weights()}

    def no_weight_decay(self) -> set[str]:
        return {f"{side}.{name}" for side in ("past", "future") for name in self.past.no_weight_decay()}

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        grid: list[int] | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        bounds = mirror(cu_seqlens, x.shape[1])
        if self.reads_positions:
            mirrored = None if position_ids is None else position_ids.flip(1)
            past: Tensor = self.past(x, cu_seqlens, grid, position_ids)
            future: Tensor = self.future(x.flip(1), bounds, grid, mirrored)
        else:
            past = self.past(x, cu_seqlens, grid)
            future = self.future(x.flip(1), bounds, grid)
        return (past + future.flip(1)) / 2

    def mix_sharing(
        self, x: Tensor, shared: Shared = (), state: None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, None, Shared]:
        """Run as the contract says. Each mixer shares with that of its own direction."""
        half = len(shared) // 2
        past, _, of_past = self.past.mix_sharing(x, shared[:half], None, cu_seqlens)
        mirrored = tuple(tensor.flip(1) for tensor in shared[half:])
        future, _, of_future = self.future.mix_sharing(x.flip(1), mirrored, None, mirror(cu_seqlens, x.shape[1]))
        return (past + future.flip(1)) / 2, None, (*of_past, *(tensor.flip(1) for tensor in of_future))
