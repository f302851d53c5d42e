"""README.md of a saved model: what it is, what made its weights, how good they are, and how to load them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData
from torch import nn

from sinuous.core.registry import find_entry, model_info

_SECTIONS = {"description", "license", "data", "command", "experiment", "overrides", "scores", "baselines"}
_NOT_SHOWN = {"part", "model_args", "pretrained_cfg"}  # config.json has the latter two


def model_card(model: nn.Module, name: str, arguments: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    """The model card of the hub, in Markdown.

    Args:
        model: that is saved.
        name: of its architecture, with the tag of its weights if they are known.
        arguments: by which the architecture was built.
        card: under the keys of `sinuous.core.weights`, each of which may be missing.
    """
    _, _, entry = find_entry(name)
    info = model_info(name)
    license = str(card["license"]).lower().replace(" ", "-") if "license" in card else None
    tags = ["sinuous", info.domain, *(["timm"] if entry.in_timm else [])]
    front = ModelCardData(library_name="sinuous", license=license, tags=tags).to_yaml()
    paper = f" The architecture is that of {info.paper}." if info.paper else ""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    built = ", ".join(f"`{key}={value!r}`" for key, value in arguments.items())
    paragraphs = [
        f"---\n{front}\n---",
        f"# {info.name}",
        str(card.get("description", "")),
        f"A model of the domain {info.domain} with {parameters:,} parameters.{paper}",
        f"The architecture as it is registered: {inspect.getdoc(entry.build)}" if entry.build.__doc__ else "",
        f"This one was built with {built}." if built else "",
        "## Use",
        _code(["import sinuous", "", 'model = sinuous.load("FOLDER_OR_HUB_ID").eval()'], "python"),
    ]
    if entry.in_timm:
        lines = [
            "import timm",
            "",
            f"import {entry.build.__module__}  # registers the model with timm",
            "",
            'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()',
        ]
        paragraphs.append(_code(lines, "python"))
    paragraphs += [*_training(card), *_scores(card)]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def _training(card: Mapping[str, Any]) -> list[str]:
    paragraphs = ["## Training"]
    if "data" in card:
        paragraphs.append(f"Data: {card['data']}.".replace("..", "."))
    if "command" in card:
        commands = [card["command"]] if isinstance(card["command"], str) else card["command"]
        paragraphs.append(_code(commands, "sh"))
    facts = {key: value for key, value in card.items() if key not in _SECTIONS | _NOT_SHOWN}
    paragraphs.append("\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in facts.items()))
    if len(list(filter(None, paragraphs))) == 1:
        paragraphs.append("Nothing is recorded of the data and the training of these weights.")
    return paragraphs


def _scores(card: Mapping[str, Any]) -> list[str]:
    rows = [(split, name, value) for split, scores in card.get("scores", {}).items() for name, value in scores.items()]
    paragraphs = ["## Scores"]
    paragraphs.append(_table(("split", "score", "value"), rows) if rows else "No scores are recorded of these weights.")
    compared = [
        (what, name, value) for what, scores in card.get("baselines", {}).items() for name, value in scores.items()
    ]
    if compared:
        paragraphs += ["Others on the same test set:", _table(("what", "score", "value"), compared)]
    return paragraphs


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _code(lines: Sequence[str], language: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])
