"""A domain of a stranger's: a small package that is installed by its entry point and known to no file of ours."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sinuous.apps import domain_configs
from sinuous.core import domains as core_domains

ROOT = Path(__file__).resolve().parents[2]

PACKAGE = {
    "strides/__init__.py": '''"""Walks on a line: which way does one go? Importing this registers the models."""
from strides import models
''',
    "strides/models.py": '''"""A mixer over steps, and a head."""
from torch import nn

from sinuous.core.mixers import build_mixer
from sinuous.core.registry import register_model


class Walker(nn.Module):
    def __init__(self, dim=8, mixer="min_gru"):
        super().__init__()
        self.embed, self.mixer, self.head = nn.Linear(1, dim), build_mixer(mixer, dim), nn.Linear(dim, 2)

    def forward(self, x):
        return self.head(self.mixer(self.embed(x))[:, -1])


@register_model(domain="strides")
def walker(pretrained=False, **kwargs):
    """Reads a walk step by step."""
    return Walker(**kwargs)
''',
    "strides/datasets.py": '''"""Walks with a drift to the left or to the right."""
import torch
from torch.utils.data import TensorDataset

from sinuous.core.data import SPLITS, check_split


class Walks:
    noun, num_classes, classes = "walks", 2, ("left", "right")

    def __init__(self, length=16):
        self.length = length

    def split(self, name):
        generator = torch.Generator().manual_seed(SPLITS.index(check_split(name)))
        labels = torch.arange(64) % 2
        steps = torch.randn(64, self.length, 1, generator=generator) + (2.0 * labels - 1)[:, None, None]
        return TensorDataset(steps, labels)

    def example(self):
        return torch.zeros(1, self.length, 1)
''',
    "strides/demo.py": '''"""Say which way a walk goes."""
from pathlib import Path

import sinuous
import torch


def add_arguments(parser):
    parser.add_argument("--out", type=Path, default=Path("walk.txt"), help="where the answer goes")


def run(options):
    model = sinuous.create_model("walker")
    options.out.write_text(f"{model(torch.ones(1, 9, 1)).argmax().item()}\\n")
    print(options.out)
''',
    "strides/configs/data/strides/walks.yaml": """defaults:
  - /batches@_here_
  - _self_
  - override /task@_global_.task: classification

_target_: strides.datasets.Walks
length: 16
""",
    "strides/configs/model/strides/walker.yaml": """defaults:
  - override /data@_global_.data: strides/walks

_target_: sinuous.create_model
name: walker
mixer: min_gru
""",
    "strides/configs/experiment/strides/walks.yaml": """# @package _global_
defaults:
  - override /model: strides/walker

task_name: walks
data:
  batch_size: 16
optimizer:
  lr: 3e-2
trainer:
  max_epochs: 20
""",
    "strides-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: strides\nVersion: 1.0\n",
    "strides-1.0.dist-info/entry_points.txt": "[sinuous.domains]\nstrides = strides\n",
}

SESSION = """
import json, sys
from sinuous.apps import cli
for arguments in json.loads(sys.argv[1]):
    print("$", *arguments)
    print("exit", cli.main(arguments))
"""


def test_a_package_of_few_lines_is_a_domain(tmp_path: Path) -> None:
    code = [text for name, text in PACKAGE.items() if not name.startswith("strides-")]
    assert sum(text.count("\n") for text in code) < 120
    for name, text in PACKAGE.items():
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_text(text)
    run, weights = f"hydra.run.dir={tmp_path / 'run'}", tmp_path / "run" / "checkpoints" / "best.safetensors"
    commands = [
        ["train", "experiment=strides/walks", run],
        ["eval", "model=strides/walker", f"checkpoint_path={weights}", f"hydra.run.dir={tmp_path / 'eval'}"],
        ["eval", "model_name=walker", "data=strides/walks", f"checkpoint_path={weights}", f"output_dir={tmp_path}"],
        ["models", "walk*"],
        ["demo", "--help"],
        ["demo", "strides", "--out", str(tmp_path / "walk.txt")],
        ["train", "experiment=strides/walk"],
        ["train", "experiment=strides/walks", "data.lenght=3"],
        ["eval", "model_name=walkre", "data=strides/walks", "pretrained=true"],
    ]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", SESSION, json.dumps(commands)],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    told = done.stdout.split("$ ")[1:]
    assert [part.rsplit("exit ", 1)[-1].strip() for part in told] == ["0"] * 6 + ["2"] * 3, done.stdout
    trained, by_config, by_name, models, help_text, demo, *mistakes = told
    accuracy = re.search(r"test accuracy (0\.\d{4}|1\.0000), loss .* on 64 walks", trained)
    assert accuracy, trained
    assert float(accuracy[1]) > 0.9
    assert f"test accuracy {accuracy[1]}" in by_config
    assert f"test accuracy {accuracy[1]}" in by_name
    assert "walker" in models
    assert "strides" in models
    assert "Say which way a walk goes" in help_text
    assert str(tmp_path / "walk.txt") in demo
    assert (tmp_path / "walk.txt").read_text() in ("0\n", "1\n")
    for text, hint in zip(mistakes, ("experiment/strides/walks", "data.length", "'walker'"), strict=True):
        assert f"did you mean {hint}" in text
        assert "Traceback" not in text


def test_a_package_that_is_not_there_is_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name, value, dist = "ghosts", "no_such_package", None

    monkeypatch.setattr(core_domains.importlib.metadata, "entry_points", lambda group: [Entry])
    core_domains.domains.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="the domain ghosts .no_such_package. is left out"):
            assert core_domains.domains() == {}
    finally:
        core_domains.domains.cache_clear()


def test_every_domain_of_ours_has_what_the_contract_asks_for() -> None:
    for domain in core_domains.domains().values():
        assert domain.configs is not None
        assert domain.demo is not None
        assert domain.demo.summary
        names = {name.split("/")[1] for name in domain_configs.known() if f"/{domain.name}/" in name}
        assert names == {domain.name}


NAMED = re.compile(r"\b(vision|language|image|picture|audio|video|genomics)s?\b", re.IGNORECASE)


@pytest.mark.parametrize("file", sorted((ROOT / "apps").rglob("*.*")), ids=lambda file: file.name)
def test_apps_name_no_domain(file: Path) -> None:
    """Examples in --help apart: those are the values of VERBS in cli.py."""
    if file.suffix == ".yaml":
        text = file.read_text()
    elif file.suffix == ".py":
        tree = ast.parse(file.read_text())
        if file.name == "cli.py":
            tree.body = [
                node for node in tree.body if "VERBS" not in ast.dump(node) or not isinstance(node, ast.Assign)
            ]
        text = ast.unparse(tree)
    else:
        return
    assert NAMED.findall(text) == []
