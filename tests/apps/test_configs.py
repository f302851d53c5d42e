"""Every configuration composes, and every experiment builds its objects, the model without memory for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from sinuous.apps import composition, domain_configs
from sinuous.apps.train import make_batches, make_trainer, make_training, take_from_data
from sinuous.core.data import lacking
from sinuous.core.mixers import list_mixers, mixer_class
from sinuous.core.tasks.denoising import Denoising
from sinuous.core.tasks.labelling import Labelling
from sinuous.core.tasks.language_modelling import LanguageModelling
from sinuous.vision.datasets import MaskedImages
from sinuous.vision.generation.code_tasks import Tokenizing


def options(group: str) -> list[str]:
    names = domain_configs.known()
    return [name.removeprefix(f"{group}/") for name in names if name.startswith(f"{group}/")]


def composed(*overrides: str, name: str = "train") -> DictConfig:
    composition.register()
    with initialize_config_module("sinuous.apps.configs", version_base="1.3"):
        return compose(name, [*overrides, "output_dir=nowhere"])


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")  # of a teacher
@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_builds(experiment: str) -> None:
    bare = composed(f"experiment={experiment}")
    given = ["data.root=nowhere"] if OmegaConf.is_missing(bare.data, "root") else []
    given += ["data.num_classes=7"] if OmegaConf.is_missing(bare.data, "num_classes") else []
    given += ["model.checkpoint_path=null"] if OmegaConf.is_missing(bare.model, "checkpoint_path") else []
    config = composed(f"experiment={experiment}", *given)
    task_name = experiment.rpartition("/")[2]
    assert config.task_name == task_name
    data = make_batches(config).data
    take_from_data(config, data)
    with torch.device("meta"):
        training = make_training(config)
    assert {parameter.device.type for parameter in training.model.parameters()} == {"meta"}
    assert lacking(data, training.task.takes) == []
    logits = training.model(data.example().to("meta"))
    if isinstance(training.task, Denoising):
        learned = config.noise.get("variance_type") == "learned_range"
        batch, channels, *sides = data.example().shape
        assert logits.sample.shape == (batch, channels * (1 + learned), *sides)
    elif isinstance(training.task, Tokenizing):
        assert logits.sample.shape == data.example().shape
    elif isinstance(data, MaskedImages):
        assert logits.shape == (1, data.num_classes, *data.img_size)
    else:
        places = (1, data.length) if isinstance(training.task, LanguageModelling | Labelling) else (1,)
        kinds = data.vocab_size if isinstance(training.task, LanguageModelling) else data.num_classes
        assert logits.shape == (*places, kinds)
    assert training.make_optimizer(torch.nn.Linear(2, 2)).param_groups[0]["lr"] == config.optimizer.lr


@pytest.mark.parametrize(
    ("group", "option"),
    [
        (g, o)
        for g in ("model", "data", "task", "optimizer", "scheduler", "callbacks", "trainer", "debug")
        for o in options(g)
    ],
)
def test_every_option_composes(group: str, option: str) -> None:
    config = composed(f"{group}={option}", "+data.root=nowhere" if group != "data" else "seed=0")
    container = OmegaConf.to_container(config[group] if group != "debug" else config, resolve=False)
    assert isinstance(container, dict)
    assert container


@pytest.mark.parametrize("option", [o for o in options("data") if o.endswith("_synthetic")])
def test_every_synthetic_twin_gives_batches(option: str) -> None:
    batches = make_batches(composed(f"data={option}", "data.batch_size=4", "data.eval_batch_size=4"))
    data = batches.data
    for loader in (batches.train_dataloader(), batches.val_dataloader(), batches.test_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape == (4, data.in_chans, *data.img_size)
        assert images.dtype == torch.float32
        assert labels.shape == (4,)


def test_every_data_set_has_a_twin_or_is_one() -> None:
    real = {o for o in options("data") if not o.endswith("_synthetic")}
    twins = {o.removesuffix("_synthetic") for o in options("data")} - real
    assert twins == set()
    # fashion_mnist_full is fashion_mnist from elsewhere, imagenet is image_folder with another augmentation, the other
    # two are what small and large pictures have in common, collages and arrows are made of what comes with the package,
    # and the novels, clothing to draw and samples of sequences and of sounds come with it; folders of them are made by
    # their own tests.
    without = {o for o in real if f"{o}_synthetic" not in options("data")}
    pictures = {f"vision/{name}" for name in ("fashion_mnist_full", "imagenet", "small_images", "large_images")}
    made = {"vision/collage", "vision/arrow_pointing", "video/moving_clips", "video/needle", "video/needle_frames"}
    made |= {"video/film_captions", "video/film_scenes", "video/film_questions"}
    others = {o for o in real if o.startswith(("genomics/", "audio/", "generation/"))}
    assert without == pictures | made | others | {"language/austen"}


def test_repeated_augmentation_shows_a_picture_several_times_in_a_batch() -> None:
    augmented = ["data.train_transform.auto_augment=rand-m9-mstd0.5-inc1", "data.train_transform.re_prob=1.0"]
    data = make_batches(
        composed("data=vision/image_folder_synthetic", "data.batch_size=6", "data.repeats=3", *augmented)
    )
    images, labels = next(iter(data.train_dataloader()))
    assert labels[:3].unique().numel() == labels[3:].unique().numel() == 1
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("mixer", ["vim_pair", "mamba", "ss2d"])
def test_another_mixer_is_one_override(mixer: str) -> None:
    config = composed("model=vision/test_vim", f"model.mixer={mixer}", "data.img_size=64")
    take_from_data(config, make_batches(config).data)
    with torch.device("meta"):
        names = {type(module).__name__ for module in make_training(config).model.modules()}
    assert ("Bidirectional" in names) == (mixer == "mamba")


def test_every_mixer_can_be_the_override() -> None:
    config = composed("model=vision/test_vim", "model.mixer=???", "data.img_size=64")
    for mixer in list_mixers():
        config.model.mixer = mixer
        with torch.device("meta"):
            names = {type(module).__name__ for module in hydra.utils.instantiate(config.model).modules()}
        assert mixer_class(mixer).__name__ in names
        assert ("Bidirectional" in names) is mixer_class(mixer).causal


def test_noise_is_chosen_by_one_word() -> None:
    for word, kind in (("epsilon", "DDPMScheduler"), ("v_prediction", "DDPMScheduler"), ("flow", "FlowMatch")):
        config = composed("task=denoising", f"noise={word}")
        assert kind in config.task.scheduler._target_
        assert config.noise.get("prediction_type", "flow") == word


def test_the_command_line_beats_the_experiment() -> None:
    config = composed("experiment=vision/imagenet", "optimizer.lr=3e-4", "trainer=cpu", "data.root=nowhere", "seed=7")
    assert config.optimizer.lr == 3e-4
    assert config.trainer.accelerator == "cpu"
    assert config.data.seed == 7


@pytest.mark.parametrize("logger", options("logger"))
def test_the_csv_logger_is_always_there(logger: str) -> None:
    assert "csv" in composed(f"logger={logger}").logger


def test_precision_is_chosen_for_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = composed("logger=csv", "trainer=cpu", "data=vision/fashion_mnist")
    config.output_dir = str(tmp_path)
    seen: list[Any] = []
    monkeypatch.setattr("lightning.Trainer", lambda **given: seen.append(given["precision"]))

    def instantiate(node: Any, **given: Any) -> Any:
        seen.append(dict(node).get("precision"))
        return SimpleNamespace(world_size=1, strategy=None)

    monkeypatch.setattr(hydra.utils, "instantiate", instantiate)
    for available, capability, accelerator, wanted in (
        (True, (8, 0), "auto", "bf16-mixed"),
        (True, (7, 5), "auto", "32-true"),
        (True, (9, 0), "cpu", "32-true"),
        (False, (0, 0), "auto", "32-true"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        config.trainer.accelerator = accelerator
        make_trainer(config)
        assert seen[-1] == wanted


@pytest.mark.parametrize(
    ("overrides", "pinned"),
    [
        (
            ["experiment=language/bytes"],
            {
                "task.best.mode": "min",
                "optimizer.lr": 3e-3,
                "optimizer.weight_decay": 0.1,
                "optimizer.betas": [0.9, 0.95],
            },
        ),
        (["experiment=vision/fashion_mnist"], {"task.best": {"monitor": "val/accuracy", "mode": "max"}}),
        (
            ["model=vision/test_vim"],
            {"optimizer.opt": "adamw", "optimizer.weight_decay": 0.05, "scheduler.sched": "cosine"},
        ),
        (["model=vision/test_vim", "optimizer=sgd"], {"optimizer.weight_decay": 5e-4, "optimizer.momentum": 0.9}),
        (
            ["experiment=vision/imagenet", "data.root=nowhere"],
            {
                "optimizer.lr": 1e-3,
                "optimizer.weight_decay": 0.1,
                "scheduler.warmup_epochs": 5,
                "scheduler.warmup_lr": 1e-6,
                "scheduler.min_lr": 1e-5,
                "trainer.max_epochs": 300,
                "task.smoothing": 0.1,
                "task.mixing.mixup_alpha": 0.8,
                "task.mixing.cutmix_alpha": 1.0,
                "ema_decay": 0.99996,
                "data.repeats": 3,
                "data.train_transform.auto_augment": "rand-m9-mstd0.5-inc1",
                "data.train_transform.re_prob": 0.25,
            },
        ),
    ],
)
def test_recipes_and_defaults_are_pinned_by_value(overrides: list[str], pinned: dict[str, Any]) -> None:
    config = composed(*overrides)
    values = {name: OmegaConf.select(config, name) for name in pinned}
    plain = {k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in values.items()}
    assert plain == pinned
