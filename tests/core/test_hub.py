from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from torch import nn

import sinuous
from sinuous.core import hub, registry
from sinuous.core.checkpoints import load_state_dict, save_safetensors

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in sinuous.list_models("test_*")},
    "vim with mamba": ("test_vim", {"mixer": "mamba", "num_classes": 7, "img_size": (64, 96), "drop_path_rate": 0.1}),
    "vim on a grid": ("test_vim", {"mixer": "ss2d", "img_size": (64, 96)}),
    "bytes": ("bytes_5m", {"dim": 16, "depth": 2, "pattern": ("gla", "min_gru"), "mlp_ratio": 1.5}),
    "hybrid": (
        "bytes_5m",
        {
            "dim": 16,
            "depth": 3,
            "pattern": ["mamba2", "softmax_attention"],
            "mixer_options": {"mamba2": {"headdim": 8, "d_state": 4}, "softmax_attention": {"num_heads": 2}},
            "mlp": {"softmax_attention": "geglu"},
            "tie_head": False,
        },
    ),
    "shared values": (
        "bytes_5m",
        {"dim": 16, "depth": 2, "pattern": "rwkv7", "mixer_options": {"rwkv7": {"num_heads": 2}}},
    ),
}


def build(case: str) -> nn.Module:
    name, options = SMALL[case]
    model = sinuous.create_model(name, **options).eval()
    with torch.no_grad():  # zeros and ones of the start would hide what is not stored
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


EXAMPLES = {
    "test_aim": lambda model: torch.randint(model.config.vocab_size, (2, model.config.num_tokens)),
    "test_diffwave": lambda _: torch.randn(2, 1, 64),
    "test_frame_reader": lambda _: torch.randn(2, 1, 5, 16, 16),
    "test_lamamba_diff": lambda model: torch.randn(2, model.config.in_channels, 8, 8),
    "test_videomamba": lambda model: torch.randn(2, 3, *model.patch_embed.img_size),
    "test_wave_classifier": lambda _: torch.randn(2, 1, 800),
}


def example(model: nn.Module) -> torch.Tensor:
    name = model.pretrained_cfg["architecture"]
    if name in EXAMPLES:
        return EXAMPLES[name](model)
    if registry.find_entry(name)[2].in_timm:
        height, width = model.patch_embed.img_size
        return torch.randn(2, model.in_chans, height, width).to(next(model.parameters()).dtype)
    return torch.randint(model.vocab_size, (2, 12))


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    own, theirs = model.state_dict(), other.state_dict()
    assert own.keys() == theirs.keys()
    for name, tensor in own.items():
        assert theirs[name].dtype == tensor.dtype, name
        assert torch.equal(theirs[name], tensor), name
    x = example(model)
    with torch.no_grad():
        one, another = (getattr(y, "sample", y) for y in (other.eval()(x), model.eval()(x)))
    assert torch.equal(one, another)


@pytest.mark.parametrize("case", SMALL)
def test_round_trip_is_equal_in_every_bit(case: str, tmp_path: Path) -> None:
    model = build(case)
    sinuous.save(model, tmp_path / "saved")
    loaded = sinuous.load(tmp_path / "saved")
    assert type(loaded) is type(model)
    assert_equal(model, loaded)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    sinuous.save(loaded, tmp_path / "again")
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", ["test_vim", "hybrid"])
def test_dtypes_stay(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(case).to(dtype)
    if dtype == torch.float64:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-10)  # lost in fp32
    sinuous.save(model, tmp_path)
    assert_equal(model, sinuous.load(tmp_path))
    assert {p.dtype for p in sinuous.load(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}


@pytest.mark.parametrize("case", ["test_vim", "hybrid"])
def test_each_parameter_has_its_own_dtype(case: str, tmp_path: Path) -> None:
    model = build(case)
    model.layers[0].to(torch.float64)
    sinuous.save(model, tmp_path)
    loaded = sinuous.load(tmp_path)
    assert {name: p.dtype for name, p in loaded.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}


def test_options_of_training_stay_as_they_were_given(tmp_path: Path) -> None:
    sinuous.save(sinuous.create_model("test_vim", drop_rate=0.2, drop_path_rate=0.3), tmp_path / "vim")
    loaded = sinuous.load(tmp_path / "vim")
    assert loaded.pos_drop.p == 0.2
    assert json.loads((tmp_path / "vim" / "config.json").read_text())["model_args"]["drop_path_rate"] == 0.3
    assert sinuous.load(tmp_path / "vim", drop_rate=0.0).pos_drop.p == 0
    sinuous.save(sinuous.create_model("bytes_5m", dim=16, depth=1, drop_rate=0.2), tmp_path / "bytes")
    assert sinuous.load(tmp_path / "bytes").drop.p == 0.2
    assert sinuous.load(tmp_path / "bytes", drop_rate=0.0).drop.p == 0


def resize(model: nn.Module) -> nn.Module:
    model.set_input_size((64, 96))
    return model


def another_head(model: nn.Module) -> nn.Module:
    model.reset_classifier(5, "avg")
    return model


def no_head(model: nn.Module) -> nn.Module:
    model.reset_classifier(0)
    return model


CHANGES: list[Callable[[nn.Module], nn.Module]] = [resize, another_head, no_head, copy.deepcopy, torch.compile]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changed_since_is_kept_and_timm_reads_it(change: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = change(sinuous.create_model("vim_nano", in_chans=3, mixer="mamba").eval())
    sinuous.save(model, tmp_path)
    model = getattr(model, "_orig_mod", model)
    loaded = sinuous.load(tmp_path)
    assert_equal(model, loaded)
    assert_equal(model, timm.create_model(f"local-dir:{tmp_path}", pretrained=True))
    assert (loaded.num_classes, loaded.global_pool) == (model.num_classes, model.global_pool)
    cfg = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert cfg["num_classes"] == model.num_classes
    assert cfg["input_size"] == [3, *model.patch_embed.img_size]
    assert ("label_names" in cfg) == (model.num_classes == 10)
    assert not {"tag", "license", "description"} & cfg.keys()  # of the shipped weights, which these are not


def test_a_model_outside_of_timm_that_changed_its_classes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    registry.list_models()
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))

    class Hum(nn.Module):
        def __init__(self, num_classes: int = 3) -> None:
            super().__init__()
            self.reset_classifier(num_classes)

        def reset_classifier(self, num_classes: int) -> None:
            self.num_classes = num_classes
            self.head = nn.Linear(2, num_classes)

    @registry.register_model(domain="audio", default_cfgs={})
    def hum(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return Hum(**kwargs)

    model = sinuous.create_model("hum")
    model.pretrained_cfg["label_names"] = ("a", "b", "c")
    sinuous.save(model, tmp_path / "three")
    assert sinuous.load(tmp_path / "three").pretrained_cfg["label_names"] == ("a", "b", "c")
    model.reset_classifier(4)
    sinuous.save(model, tmp_path / "four")
    loaded = sinuous.load(tmp_path / "four")
    assert torch.equal(loaded.head.weight, model.head.weight)
    assert "label_names" not in loaded.pretrained_cfg
    model.head = nn.Linear(2, 5)
    with pytest.raises(
        ValueError, match=r"this Hum was changed .*head.weight is of shape \[5, 2\], and of shape \[4, 2\]"
    ):
        sinuous.save(model, tmp_path / "five")


def test_refuses_to_lose_what_it_cannot_build_again(tmp_path: Path) -> None:
    model = sinuous.create_model("test_vim", depth=4)
    model.prune_intermediate_layers([1], prune_head=True)
    with pytest.raises(
        ValueError, match=r"this Vim was changed after it was built: layers.2.* is missing, and of shape"
    ):
        sinuous.save(model, tmp_path / "pruned")
    with pytest.raises(ValueError, match="features_only=True is a part of one; save the whole model"):
        sinuous.save(sinuous.create_model("test_vim", features_only=True), tmp_path / "features")
    with pytest.raises(ValueError, match="this Linear was not built by its name"):
        sinuous.save(nn.Linear(2, 2), tmp_path / "linear")
    with pytest.raises(ValueError, match=r"this ResNet is timm's own resnet10t; save it with timm.models.save_for_hf"):
        sinuous.save(timm.create_model("resnet10t"), tmp_path / "resnet")
    with torch.device("meta"):
        empty = sinuous.create_model("test_vim")
    with pytest.raises(ValueError, match="is on the meta device and has no weights to save"):
        sinuous.save(empty, tmp_path / "meta")
    model = sinuous.create_model("bytes_5m", dim=16, depth=1)
    model._model_args["norm"] = object()
    with pytest.raises(ValueError, match=r"argument norm=<object .* of bytes_5m cannot be written into config.json"):
        sinuous.save(model, tmp_path / "object")
    model._model_args["norm"] = {1: 2}  # whose key JSON would make a word
    with pytest.raises(ValueError, match=r"argument norm=\{1: 2\} of bytes_5m cannot be written"):
        sinuous.save(model, tmp_path / "keys")
    assert list(tmp_path.iterdir()) == []


def test_writes_a_folder_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (sinuous.create_model("test_vim", num_classes=n) for n in (3, 4))
    sinuous.save(first, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; give another folder, or overwrite=True"):
        sinuous.save(second, tmp_path)

    def full(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(hub, "save_safetensors", full)
        with pytest.raises(OSError, match="no space left"):
            sinuous.save(second, tmp_path, overwrite=True)
    assert_equal(first, sinuous.load(tmp_path))

    replaced = []

    def interrupted(source: Path, target: Path) -> None:
        replaced.append(Path(target).name)
        if len(replaced) == 2:
            raise KeyboardInterrupt
        shutil.move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(hub.os, "replace", interrupted)
        patch.setattr(hub, "save_safetensors", lambda state, path, *_: path.write_bytes(b"half"))
        with pytest.raises(KeyboardInterrupt):
            sinuous.save(second, tmp_path, overwrite=True)
    assert replaced[0] == "model.safetensors"
    with pytest.raises(ValueError, match=r"has no config.json"):
        sinuous.load(tmp_path)
    sinuous.save(second, tmp_path, overwrite=True)
    assert_equal(second, sinuous.load(tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match=r"notes.txt is a file; give a folder"):
        sinuous.save(second, tmp_path / "notes.txt")


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_of_shipped_weights_is_told_of_them_alone(tmp_path: Path) -> None:
    model = sinuous.load("vim_nano.fashion_mnist")
    sinuous.save(model, tmp_path / "shipped")
    front, text = card_of(tmp_path / "shipped")
    assert front == {"library_name": "sinuous", "license": "apache-2.0", "tags": ["sinuous", "vision", "timm"]}
    assert "# vim_nano.fashion_mnist\n" in text
    assert "| test | accuracy | 0.9131 |" in text
    assert "sinuous train experiment=vision/fashion_mnist_full_finetune" in text
    assert "Data: Fashion-MNIST (MIT, Zalando SE)" in text
    cfg = sinuous.load(tmp_path / "shipped").pretrained_cfg
    assert (cfg["tag"], cfg["mean"]) == ("fashion_mnist", [0.286])
    with torch.no_grad():
        model.head.bias[0] += 1e-6
    sinuous.save(model, tmp_path / "changed")
    front, text = card_of(tmp_path / "changed")
    assert front == {"library_name": "sinuous", "tags": ["sinuous", "vision", "timm"]}
    assert "Nothing is recorded of the data and the training of these weights." in text
    assert "No scores are recorded of these weights." in text
    assert "0.91" not in text


def test_a_card_of_ones_own(tmp_path: Path) -> None:
    model = sinuous.create_model("bytes_5m", dim=16, depth=1)
    card = {
        "license": "CC BY 4.0",
        "description": "Writes like nobody.",
        "scores": {"test": {"bits_per_byte": 3.5}},
        "baselines": {"xz": {"bits_per_byte": 2.5}},
        "machine": "a laptop",
        "pretrained_cfg": {"label_names": ["a"]},
    }
    sinuous.save(model, tmp_path, card=card)
    front, text = card_of(tmp_path)
    assert front == {"library_name": "sinuous", "license": "cc-by-4.0", "tags": ["sinuous", "language"]}
    for line in (
        "Writes like nobody.",
        "| test | bits_per_byte | 3.5 |",
        "| xz | bits_per_byte | 2.5 |",
        "a laptop",
        "`dim=16`",
    ):
        assert line in text
    assert "timm" not in text
    assert sinuous.load(tmp_path).pretrained_cfg["label_names"] == ("a",)
    with pytest.raises(ValueError, match=r"card: scores.test must be of the kind dict"):
        sinuous.save(model, tmp_path / "other", card={"scores": {"test": 1.0}})
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("safe", [True, False])
def test_reads_the_folders_of_timm(safe: bool, tmp_path: Path) -> None:
    model = sinuous.create_model("test_vim", num_classes=7, mixer="mamba").eval()
    model.set_input_size((64, 96))
    timm.models.save_for_hf(model, tmp_path / "ours", safe_serialization=safe)
    assert_equal(model, sinuous.load(tmp_path / "ours"))
    theirs = timm.create_model("test_resnet", num_classes=3).eval()
    timm.models.save_for_hf(theirs, tmp_path / "theirs", safe_serialization=safe)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(sinuous.load(tmp_path / "theirs").eval()(x), theirs(x))


def test_fits_a_model_of_pictures_to_other_sizes(tmp_path: Path) -> None:
    model = sinuous.create_model("test_vim").eval()
    sinuous.save(model, tmp_path)
    x = torch.randn(1, 3, 64, 64)
    other = sinuous.load(tmp_path, num_classes=3).eval()
    assert torch.equal(other.forward_features(x), model.forward_features(x))
    assert other(x).shape == (1, 3)
    assert "state_dict" not in other.pretrained_cfg
    assert sinuous.load(tmp_path, img_size=32, in_chans=1).eval()(x[:, :1, :32, :32]).shape == (1, 1000)
    for features, taps in zip(
        sinuous.load(tmp_path, features_only=True).eval()(x),
        model.forward_intermediates(x, intermediates_only=True),
        strict=True,
    ):
        torch.testing.assert_close(features, taps)
    sinuous.save(sinuous.create_model("bytes_5m", dim=16, depth=1), tmp_path / "bytes")
    with pytest.raises(ValueError, match=r"embedding.weight has shape"):
        sinuous.load(tmp_path / "bytes", dim=32)


def test_places_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config.json; give a folder written by sinuous.save or"):
        sinuous.load(tmp_path)
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(ValueError, match="is a file, which does not say what model it is for"):
        sinuous.load(file)
    with pytest.raises(ValueError, match="there is nothing at"):
        sinuous.load(tmp_path / "absent" / "model")
    with pytest.raises(ValueError, match=r"no model 'vim_nanno'; did you mean 'vim_nano'"):
        sinuous.load("vim_nanno")


@pytest.mark.parametrize("case", ["test_vim", "bytes"])
def test_folders_that_are_damaged(case: str, tmp_path: Path) -> None:
    sinuous.save(build(case), tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    text, stored = config.read_text(), weights.read_bytes()
    name = json.loads(text)["architecture"]
    for content, message in (
        ("{", "config.json of .* is not JSON"),
        ("[]", "config.json of .* names no architecture"),
        (json.dumps({"architectures": ["Bert"]}), "config.json of .* names no architecture"),
        (json.dumps({**json.loads(text), "model_args": {"colour": 3}}), f"does not build {name}: .*colour"),
        (json.dumps({**json.loads(text), "model_args": [3]}), f"does not build {name}: "),
        (text.replace(name, f"{name}x"), rf"is for the model '{name}x', which nothing registers here .*'{name}'"),
    ):
        config.write_text(content)
        with pytest.raises(ValueError, match=message):
            sinuous.load(tmp_path)
    config.write_text(text)
    weights.write_bytes(stored[: len(stored) // 2])
    with pytest.raises(ValueError, match="is a damaged safetensors file"):
        sinuous.load(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"has no model.safetensors; get it from where its config.json came from"):
        sinuous.load(tmp_path)
    weights.write_bytes(stored)
    whole = load_state_dict(weights)
    key = "norm_f.weight"
    save_safetensors({name: t for name, t in whole.items() if name != key}, weights)
    with pytest.raises(ValueError, match=f"it lacks {key}"):
        sinuous.load(tmp_path)
    save_safetensors({**whole, key: torch.ones(3)}, weights)
    with pytest.raises(ValueError, match=rf"{key} has shape \[3\] there"):
        sinuous.load(tmp_path)


@pytest.mark.parametrize("case", ["test_vim", "bytes"])
def test_the_hub(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(case)
    sinuous.save(model, tmp_path / "stored")
    asked = []

    def snapshot(repo_id: str, *, revision: str | None, allow_patterns: list[str], **options: Any) -> str:
        asked.append((repo_id, revision, options))
        for name in allow_patterns:
            assert not name.endswith((".bin", ".pth", ".pt"))
        return str(tmp_path / "stored")

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert_equal(model, sinuous.load("somebody/model"))
    assert_equal(model, sinuous.load("hf-hub:somebody/model@v2", cache_dir="here"))
    assert asked == [
        ("somebody/model", None, {"cache_dir": None}),
        ("somebody/model", "v2", {"cache_dir": "here"}),
    ]
    (tmp_path / "stored" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"somebody/model has no model.safetensors"):
        sinuous.load("somebody/model")


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("off"), LocalEntryNotFoundError("no"), ConnectionError("no")])
def test_says_in_one_sentence_that_the_hub_is_out_of_reach(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def unreachable(repo_id: str, **_: Any) -> str:
        assert repo_id == "somebody/vim"
        raise error

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    with pytest.raises(ConnectionError, match=r"cannot get 'somebody/vim' from the .* Hub .*give sinuous.load"):
        sinuous.load("somebody/vim")
