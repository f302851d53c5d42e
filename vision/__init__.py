"""Images: backbones, datasets and what to do with them. Importing this registers the models with timm and with us."""

from __future__ import annotations

from sinuous.vision import hvir, lightnet, mambavision, plstm, segmentation, vim, vir, vmamba

__all__ = ["hvir", "lightnet", "mambavision", "plstm", "segmentation", "vim", "vir", "vmamba"]
