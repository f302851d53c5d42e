"""Training of Video-Ma2mba in stages: the shared task of language modelling, of some parts of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from sinuous.core.tasks.language_modelling import LanguageModelling


class FilmTextModelling(LanguageModelling):
    """Trains parts of a `VideoMa2mba` on the tokens of text that its data marks; the others are frozen.

    Args:
        trained: names of the parts: `vision`, `projector`, `language`.
        vision_lr: learning rate of `vision`; that of the rest, if absent.
        **options: of `LanguageModelling`.

    Raises:
        ValueError: if there is no such part, or the model has no parts to choose from.
    """

    def __init__(self, trained: Sequence[str], vision_lr: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.trained, self.vision_lr = tuple(trained), vision_lr

    def prepare(self, model: nn.Module) -> None:
        choose: Any = getattr(model, "train_only", None)
        if choose is None:
            raise ValueError(
                f"the task trains parts of a VideoMa2mba (got {type(model).__name__}); choose "
                "model=video/test_video_ma2mba"
            )
        choose(*self.trained, vision_lr=self.vision_lr)
