"""Bits a sample of each block of hold music, of one model beside others: where is one ahead?

    python tools/music_blocks.py MODEL [MODEL ...] [--root FOLDER] [--split test]

MODEL is weights that come with the package, such as sashimi_nano.hold_music, or a checkpoint of a run,
RUN/checkpoints/best.safetensors. FOLDER holds the unpacked asterisk-moh-opsound-wav; without it the bundled pieces are
read. Each block is scored from its own start, with silence before it, as in training.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

import sinuous
from sinuous.audio.datasets.hold_music import BLOCK, HoldMusic
from sinuous.audio.generation import score
from sinuous.core.weights import all_weights


def model_of(name: str) -> Any:
    """The model of shipped weights, or of a run's checkpoint with the arguments in the run's configuration."""
    if name in all_weights():
        return sinuous.load(name)
    from omegaconf import OmegaConf

    file = Path(name)
    config = OmegaConf.load(file.parents[1] / ".hydra" / "config.yaml")
    options: Any = OmegaConf.to_container(OmegaConf.select(config, "model"), resolve=False)
    kept = {key: value for key, value in options.items() if not str(value).startswith("${") and key != "_target_"}
    return sinuous.create_model(kept.pop("name"), **{**kept, "checkpoint_path": file})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--root", type=Path, metavar="FOLDER")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"))
    options = parser.parse_args()
    data = HoldMusic(root=options.root)
    blocks = [part for wave in data.waves(options.split) for part in wave.split(BLOCK)]
    table = Table("block", "seconds", "rms, dB", *options.models)
    models = [model_of(name).eval() for name in options.models]
    total = [0.0] * len(models)
    for number, wave in enumerate(track(blocks, description="blocks", transient=True)):
        codes = data.codec.encode(wave)
        bits = [float(score(model, codes, engine="c").sum()) for model in models]
        total = [sum(pair) for pair in zip(total, bits, strict=True)]
        level = 10 * wave.square().mean().clamp(min=1e-10).log10()
        row = [f"{value / len(wave):.3f}" for value in bits]
        table.add_row(str(number), f"{len(wave) / data.sample_rate:.1f}", f"{level:.1f}", *row)
    samples = sum(map(len, blocks))
    table.add_row("all", f"{samples / data.sample_rate:.1f}", "", *(f"{value / samples:.3f}" for value in total))
    Console().print(table)


if __name__ == "__main__":
    main()
