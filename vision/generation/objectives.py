"""The loss of denoisers of pictures: `denoising_loss`, which denoisers of sound are trained by, too."""

from sinuous.core.tasks.denoising import denoising_loss

__all__ = ["denoising_loss"]
