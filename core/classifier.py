"""The head of a classifier, which timm's interface lets users exchange."""

from __future__ import annotations

from typing import Any

from torch import nn

from sinuous.core.checks import check_range


class Classifier(nn.Module):
    """Base of models whose `head` turns `num_features` numbers of a sample into logits.

    A subclass sets `num_features` and makes its other parameters, then calls `reset_classifier`.

    Attributes:
        head: a linear layer, or an identity for 0 classes.
        num_classes: K.
    """

    num_features: int

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for `num_classes` classes, N(0, 0.02²), biases of 0; 0 for none.

        Raises:
            ValueError: if the number is negative.
        """
        check_range(0, float("inf"), num_classes=num_classes)
        self.num_classes = num_classes
        like = next(self.parameters())
        at: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.head: nn.Module = nn.Linear(self.num_features, num_classes, **at) if num_classes else nn.Identity()
        self.init_head()

    def init_head(self) -> None:
        """Fill the head anew."""
        if isinstance(self.head, nn.Linear):
            nn.init.normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def get_classifier(self) -> nn.Module:
        return self.head
