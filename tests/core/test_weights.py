from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import generate_default_cfgs
from torch import nn

import sinuous
from sinuous.core import registry
from sinuous.core.checkpoints import load_state_dict, save_safetensors
from sinuous.core.weights import all_weights, find_weights, read_card, shipped, shipped_cfgs

CARD: dict[str, Any] = {
    "experiment": "audio/hum",
    "overrides": [],
    "command": "sinuous train experiment=audio/hum",
    "seed": 3,
    "cpu_minutes": 0.5,
    "data": "hums of one person",
    "license": "CC0-1.0",
    "description": "Hears a hum.",
    "scores": {"test": {"accuracy": 0.75, "loss": 0.5}, "val": {"accuracy": 0.7}},
    "part": {"overrides": ["data=audio/hum"], "split": "test", "scores": {"accuracy": 0.75}},
}


def write(folder: Path, name: str, card: dict[str, Any] = CARD, **state: torch.Tensor) -> Path:
    file = folder / f"{name}.safetensors"
    save_safetensors(state or {"weight": torch.ones(1, 3), "bias": torch.zeros(1)}, file)
    file.with_suffix(".json").write_text(json.dumps(card))
    return file


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A copy of the table of models that a test may change."""
    registry.list_models()
    table = dict(registry._MODELS)
    monkeypatch.setattr(registry, "_MODELS", table)
    return table


@pytest.mark.parametrize("name", all_weights())
def test_shipped_weights_load_through_every_door_and_say_how_good_they_are(name: str) -> None:
    weights = find_weights(name)
    architecture, _, tag = name.partition(".")
    assert (weights.name, weights.architecture, weights.tag) == (name, architecture, tag)
    assert name in sinuous.list_models(pretrained=True)
    loaded = [sinuous.load(name), sinuous.create_model(name, pretrained=True)]
    if timm.is_model(architecture):
        loaded.append(timm.create_model(name, pretrained=True))
    # AiM's file has its authors' names, and its tokenizer's weights beside them.
    file = {key.removeprefix("mamba.backbone."): stored for key, stored in load_state_dict(weights.file).items()}
    file = {key: stored for key, stored in file.items() if not key.startswith("vqvae.")}
    assert file
    for key, stored in file.items():
        assert all(torch.equal(model.state_dict()[key], stored.float()) for model in loaded)
    info = sinuous.model_info(name)
    assert tag in info.weights
    assert info.card == weights.card
    assert info.scores == weights.card["scores"]["test"]
    assert info.metrics == weights.card["scores"]
    assert info.scores
    assert weights.card["part"]["scores"]
    assert weights.file.stat().st_size <= 4e6


def test_finds_weights_by_name_and_names_the_closest() -> None:
    assert find_weights("vim_nano").name == "vim_nano.fashion_mnist"
    with pytest.raises(ValueError, match=r"no weights 'vim_nano.fashion'; did you mean 'vim_nano.fashion_mnist'"):
        find_weights("vim_nano.fashion")
    with pytest.raises(ValueError, match=r"no weights '0'; there are: .*vim_nano.fashion_mnist"):
        find_weights("0")


def test_a_folder_of_weights(tmp_path: Path) -> None:
    assert shipped(tmp_path / "absent") == {}
    file = write(tmp_path, "hum.one")
    assert list(shipped(tmp_path)) == ["hum.one"]
    assert shipped(tmp_path)["hum.one"].card == CARD
    file.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match=r"hum.one.safetensors has no hum.one.json beside it"):
        shipped(tmp_path)
    file.unlink()
    file.with_suffix(".json").write_text(json.dumps(CARD))
    with pytest.raises(ValueError, match=r"hum.one.json has no hum.one.safetensors beside it"):
        shipped(tmp_path)
    file.with_suffix(".json").unlink()
    write(tmp_path, "hum")
    with pytest.raises(ValueError, match=r"hum.safetensors names no weights of a model; call it NAME.TAG"):
        shipped(tmp_path)


def test_the_default_of_a_model_comes_before_its_other_weights(models: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, "hum.loud", {**CARD, "model_args": {"width": 3}})
    write(tmp_path, "hum.soft", {**CARD, "default": True})
    write(tmp_path, "drum.one")
    assert list(shipped(tmp_path)) == ["drum.one", "hum.soft", "hum.loud"]
    cfgs = generate_default_cfgs(shipped_cfgs(tmp_path, "hum", {}))

    @registry.register_model(domain="audio", default_cfgs=cfgs)
    def hum(pretrained: bool = False) -> nn.Module:
        return nn.Linear(3, 1)

    assert sinuous.load("hum").pretrained_cfg["tag"] == "soft"
    write(tmp_path, "hum.loud", {**CARD, "default": True})
    with pytest.raises(ValueError, match=r"hum.loud and hum.soft both say that they are the default"):
        shipped(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        *((key, None, f"hum.one.json lacks the key {key}; add it") for key in CARD),
        ("part.split", None, "hum.one.json lacks the key part.split"),
        ("scores.test", None, "hum.one.json lacks the key scores.test"),
        ("default", "yes", "hum.one.json: default must be of the kind bool"),
        ("seed", "0", "hum.one.json: seed must be of the kind int .got '0'"),
        ("command", 3, "hum.one.json: command must be of the kind str or list"),
        ("part", [], "hum.one.json: part must be of the kind dict"),
        ("scores.test", 0.5, "hum.one.json: scores.test must be of the kind dict"),
        ("scores.test.accuracy", "good", "hum.one.json: scores.test.accuracy must be of the kind int or float"),
        (
            "pretrained_cfg",
            {"labels_names": []},
            "pretrained_cfg.labels_names is no entry .*mean 'label_names'",
        ),
    ],
)
def test_cards_that_are_not_whole(path: str, value: Any, message: str, tmp_path: Path) -> None:
    card = copy.deepcopy(CARD)
    *outer, key = path.split(".")
    inner = card
    for name in outer:
        inner = inner[name]
    if value is None:
        del inner[key]
    else:
        inner[key] = value
    with pytest.raises(ValueError, match=message):
        read_card(write(tmp_path, "hum.one", card))


def test_a_card_that_is_not_json(tmp_path: Path) -> None:
    file = write(tmp_path, "hum.one")
    file.with_suffix(".json").write_text("{")
    with pytest.raises(ValueError, match=r"hum.one.json is not JSON .*correct it"):
        read_card(file)
    file.with_suffix(".json").write_text("[]")
    with pytest.raises(ValueError, match=r"hum.one.json: it must be a dictionary \(got \[\]\)"):
        read_card(file)


def test_a_pair_of_files_is_all_that_a_model_outside_of_timm_needs(models: dict[str, Any], tmp_path: Path) -> None:
    cfg = {"mean": [0.5], "label_names": ["hum", "none"]}
    write(tmp_path, "hum.narrow", {**CARD, "pretrained_cfg": cfg})
    wide = {"weight": torch.full((1, 5), 1 / 3).half(), "bias": torch.zeros(1).half()}
    write(tmp_path, "hum.wide", {**CARD, "model_args": {"width": 5}}, **wide)
    cfgs = generate_default_cfgs(shipped_cfgs(tmp_path, "hum", {"input_size": (3,)}))

    @registry.register_model(domain="audio", default_cfgs=cfgs)
    def hum(pretrained: bool = False, width: int = 3) -> nn.Module:
        assert not pretrained
        return nn.Linear(width, 1)

    assert sinuous.list_models("hum*", pretrained=True) == ["hum.narrow", "hum.wide"]
    assert not timm.is_model("hum")
    for model in (sinuous.create_model("hum", pretrained=True), sinuous.load("hum.narrow"), hum(pretrained=True)):
        assert model(torch.ones(3)).item() == 3
        assert model.pretrained_cfg["mean"] == (0.5,)
        assert model.pretrained_cfg["label_names"] == ("hum", "none")
        assert model.pretrained_cfg["tag"] == "narrow"
        assert "interpolation" not in model.pretrained_cfg
    model = sinuous.create_model("hum.wide", pretrained=True)
    assert model.weight.dtype == torch.float32
    assert torch.equal(model.weight, wide["weight"].float())
    random = sinuous.create_model("hum.wide")
    assert random.in_features == 5
    assert not torch.equal(random.weight, model.weight)
    with pytest.raises(ValueError, match="weight has shape"):
        sinuous.load("hum.wide", width=4)
    info = sinuous.model_info("hum.wide")
    assert (info.params, info.input_size, info.license) == (6, (3,), "CC0-1.0")
    assert (info.description, info.scores) == ("Hears a hum.", {"accuracy": 0.75, "loss": 0.5})
    assert sinuous.model_info("hum").params == 4
    assert shipped_cfgs(tmp_path, "whistle", {"input_size": (3,)}) == {"whistle.untrained": {"input_size": (3,)}}


@pytest.mark.slow
def test_a_stranger_ships_weights_of_a_model_in_timm(tmp_path: Path) -> None:
    package = tmp_path / "birds"
    (package / "weights").mkdir(parents=True)
    (tmp_path / "birds-1.0.dist-info").mkdir()
    (tmp_path / "birds-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: birds\nVersion: 1.0\n")
    (tmp_path / "birds-1.0.dist-info" / "entry_points.txt").write_text("[sinuous.domains]\nbirds = birds\n")
    (package / "__init__.py").write_text(
        textwrap.dedent("""
            from pathlib import Path

            from timm.models import build_model_with_cfg, generate_default_cfgs

            from sinuous.core.registry import register_vision_model
            from sinuous.core.weights import shipped_cfgs
            from sinuous.vision.vim import Vim, checkpoint_filter_fn

            cfg = {"input_size": (3, 32, 32), "num_classes": 5, "first_conv": "patch_embed.proj", "classifier": "head"}
            cfg["fixed_input_size"] = True
            default_cfgs = generate_default_cfgs(shipped_cfgs(Path(__file__).parent / "weights", "bird_vim", cfg))


            @register_vision_model(domain="birds")
            def bird_vim(pretrained=False, **kwargs):
                sizes = {"patch_size": 8, "embed_dim": 16, "depth": 2, **kwargs}
                return build_model_with_cfg(
                    Vim, "bird_vim", pretrained, pretrained_filter_fn=checkpoint_filter_fn, **sizes
                )
            """)
    )
    sizes = {"img_size": 32, "num_classes": 5, "patch_size": 8, "embed_dim": 16, "depth": 3, "mixer": "gla"}
    model = sinuous.create_model("test_vim", **sizes)
    card = {**CARD, "model_args": {"depth": 3, "mixer": "gla"}, "pretrained_cfg": {"label_names": list("abcde")}}
    file = write(package / "weights", "bird_vim.field", card, **model.state_dict())
    code = f"""
        import timm, torch, sinuous
        from sinuous.core.checkpoints import load_state_dict
        from sinuous.core.weights import all_weights

        assert sinuous.list_models(pretrained=True, domain="birds") == ["bird_vim.field"]
        assert "bird_vim.field" in all_weights() and "vim_nano.fashion_mnist" in all_weights()
        stored = load_state_dict({str(file)!r})
        for make in (sinuous.create_model, timm.create_model):
            for name in ("bird_vim", "bird_vim.field"):
                model = make(name, pretrained=True)
                assert all(torch.equal(t, stored[key]) for key, t in model.state_dict().items()), name
                assert model.pretrained_cfg["label_names"] == tuple("abcde")
            other = make("bird_vim.field", pretrained=True, num_classes=2, img_size=48).eval()
            assert other(torch.zeros(1, 3, 48, 48)).shape == (1, 2)
        assert len(sinuous.create_model("bird_vim").layers) == 2
        info = sinuous.model_info("bird_vim.field")
        assert info.params == {sum(p.numel() for p in model.parameters())} and info.scores["accuracy"] == 0.75
        """
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_weights_on_the_hub_of_a_model_outside_of_timm(
    models: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfgs = generate_default_cfgs({"hum.far": {"hf_hub_id": "somebody/hum"}})

    @registry.register_model(domain="audio", default_cfgs=cfgs)
    def hum(pretrained: bool = False, width: int = 3) -> nn.Module:
        return nn.Linear(width, 1)

    def download(repo_id: str, filename: str) -> str:
        assert (repo_id, filename) == ("somebody/hum", "model.safetensors")
        if not (tmp_path / "hum.one.safetensors").is_file():
            raise ConnectionError("off")
        return str(tmp_path / "hum.one.safetensors")

    monkeypatch.setattr(registry, "hf_hub_download", download)
    with pytest.raises(ConnectionError, match="cannot get 'hum' from the Hugging Face Hub"):
        sinuous.load("hum.far")
    write(tmp_path, "hum.one")
    assert sinuous.load("hum.far")(torch.ones(3)).item() == 3
