"""Weights that come with a domain: `weights/NAME.TAG.safetensors` beside `NAME.TAG.json` in its package.

The JSON is the card of the weights. It says what made them, so that they can be made again, and how good they are:

    experiment    by which `sinuous train` made them, such as "vision/fashion_mnist"
    overrides     list of what the command line changed in it
    command       the whole command, or a list of commands that follow each other
    seed          of the run
    cpu_minutes   that it took, on one core
    data          a sentence on the data
    license       of the weights
    description   a sentence on the weights
    scores        {split: {score: value}}; "test" is there
    part          {"overrides": [...], "split": "test", "scores": {score: value}}: data that comes with the package, by
                  the overrides that choose it in the experiment, and the scores on it to all digits
    model_args    optional: arguments of the model beyond its registered defaults
    pretrained_cfg    optional: entries of timm's configuration, such as mean, std, label_names, input_size
    baselines     optional: {"what it is": {score: value}}, on the test set
    default       optional: true in the card of those that the model's bare name means, where it has several

Other keys are kept as they are. Adding the two files is all it takes for weights to be listed, loaded and scored.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg

from sinuous.core.domains import domains

Kinds = dict[str, type | tuple[type, ...]]

_REQUIRED: Kinds = {
    "experiment": str,
    "overrides": list,
    "command": (str, list),
    "seed": int,
    "cpu_minutes": (int, float),
    "data": str,
    "license": str,
    "description": str,
    "scores": dict,
    "part": dict,
}
_OPTIONAL: Kinds = {"model_args": dict, "pretrained_cfg": dict, "baselines": dict, "default": bool}
_OF_PART: Kinds = {"overrides": list, "split": str, "scores": dict}
_CFG_ENTRIES = {field.name for field in dataclasses.fields(PretrainedCfg)}


@dataclass(frozen=True)
class Weights:
    """Weights in a file, and what is known of them.

    Attributes:
        name: `architecture.tag`.
        architecture: the registered model that they are for.
        tag: by which they are told from others of that model.
        file: safetensors.
        card: content of the JSON beside the file.
    """

    name: str
    architecture: str
    tag: str
    file: Path
    card: Mapping[str, Any]


def read_card(file: Path) -> dict[str, Any]:
    """Content of the JSON beside the safetensors `file`.

    Raises:
        ValueError: if there is none, or a key is missing or holds another kind of value; naming file and key.
    """
    path = file.with_suffix(".json")
    if not path.is_file():
        raise ValueError(f"{file} has no {path.name} beside it; write what made these weights into it")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); correct it") from error
    check_card(card, str(path), whole=True)
    return dict(card)


def check_card(card: Any, source: str, *, whole: bool) -> None:
    """Refuse a card whose keys hold another kind of value than they should.

    Args:
        card: content of a JSON of weights, or a part of it.
        source: name of the card in messages.
        whole: refuse a card that lacks a key.

    Raises:
        ValueError: naming source and key.
    """
    _check_keys(card, _REQUIRED, _OPTIONAL, source, "", whole)
    scores, part = card.get("scores", {}), card.get("part", {})
    _check_keys(scores, {"test": dict}, dict.fromkeys(scores, dict), source, "scores.", whole)
    for split, values in scores.items():
        _check_keys(values, {}, dict.fromkeys(values, (int, float)), source, f"scores.{split}.", whole)
    _check_keys(part, _OF_PART, {}, source, "part.", whole)
    for entry in card.get("pretrained_cfg", {}):
        if entry not in _CFG_ENTRIES:
            close = difflib.get_close_matches(entry, _CFG_ENTRIES, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"they are {', '.join(sorted(_CFG_ENTRIES))}"
            raise ValueError(f"{source}: pretrained_cfg.{entry} is no entry of timm's configuration; {hint}")


def _check_keys(values: Any, required: Kinds, optional: Kinds, source: str, prefix: str, whole: bool) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{source}: {prefix.removesuffix('.') or 'it'} must be a dictionary (got {values!r})")
    for key, kind in {**optional, **required}.items():
        if key not in values:
            if key in required and whole:
                raise ValueError(f"{source} lacks the key {prefix}{key}; add it")
        elif not isinstance(values[key], kind):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"{source}: {prefix}{key} must be of the kind {names} (got {values[key]!r})")


def shipped(folder: Path) -> dict[str, Weights]:
    """Weights in `folder` by name, sorted, each model's default before its others; none if there is no such folder.

    Raises:
        ValueError: if a file has no JSON, a JSON no file, a name no tag, a JSON lacks a key, or a model has two
            defaults; naming file and key.
    """
    known = {}
    for file in sorted(folder.glob("*.safetensors")):
        architecture, _, tag = file.stem.partition(".")
        if not tag:
            raise ValueError(f"{file} names no weights of a model; call it NAME.TAG.safetensors")
        known[file.stem] = Weights(file.stem, architecture, tag, file, read_card(file))
    for path in sorted(folder.glob("*.json")):
        if path.stem not in known:
            raise ValueError(f"{path} has no {path.stem}.safetensors beside it; add the weights or remove the file")
    defaults: dict[str, str] = {}
    for name, weights in known.items():
        if weights.card.get("default") and (first := defaults.setdefault(weights.architecture, name)) != name:
            raise ValueError(f"{first} and {name} both say that they are the default; take the key from one card")
    return dict(sorted(known.items(), key=lambda item: (item[1].architecture, item[0] not in defaults.values())))


def all_weights() -> dict[str, Weights]:
    """Weights of all domains by name.

    Raises:
        ValueError: as `shipped`.
    """
    return {
        name: weights for domain in domains().values() for name, weights in shipped(domain.folder / "weights").items()
    }


def find_weights(name: str) -> Weights:
    """The weights `architecture.tag`, or the default of an architecture (without one, its first).

    Raises:
        ValueError: if there are none, naming the closest.
    """
    known = all_weights()
    if name in known:
        return known[name]
    for weights in known.values():
        if weights.architecture == name:
            return weights
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"there are: {', '.join(known) or 'none'}"
    raise ValueError(f"there are no weights {name!r}; {hint}")


def shipped_cfgs(folder: Path, architecture: str, base_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of timm's `generate_default_cfgs` for one architecture, with a tag for each of its weights in `folder`.

        default_cfgs = generate_default_cfgs({**shipped_cfgs(Path(__file__).parent / "weights", "vim_nano", _cfg())})

    Args:
        folder: of the domain's weights.
        architecture: name of the registered model.
        base_cfg: what holds for all tags; the entries `pretrained_cfg` of a card come over it. Without weights it
            stands alone, under the tag `untrained`.

    Raises:
        ValueError: as `shipped`.
    """
    cfgs = {}
    for name, weights in shipped(folder).items():
        if weights.architecture == architecture:
            entries = {
                k: tuple(v) if isinstance(v, list) else v for k, v in weights.card.get("pretrained_cfg", {}).items()
            }
            facts = {key: weights.card[key] for key in ("license", "description")}
            if "num_classes" in (args := weights.card.get("model_args", {})):  # timm puts a new head on other numbers
                facts["num_classes"] = args["num_classes"]
            cfgs[name] = {**base_cfg, **facts, "file": str(weights.file), **entries}
    return cfgs or {f"{architecture}.untrained": dict(base_cfg)}
