"""The `sinuous` command. Each verb's module is imported when the verb is used, so that `sinuous --help` loads no torch.

Exit codes: 0 done, 2 wrong input or a missing piece (one sentence on stderr says what to do), 130 Ctrl-C, 143 SIGTERM.
`SINUOUS_DEBUG=1` shows the traceback behind the sentence.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from sinuous.apps.threads import choose_waiting

VERBS = {
    "train": ("sinuous.apps.train", "train a model: sinuous train experiment=vision/fashion_mnist"),
    "eval": ("sinuous.apps.evaluate", "score weights on a test set: sinuous eval weights=vim_nano.fashion_mnist"),
    "demo": ("sinuous.apps.demo", "see what a trained model does: sinuous demo vision"),
    "models": ("sinuous.apps.models", "list the models: sinuous models 'vim*'"),
    "info": ("sinuous.apps.info", "what this machine can run: sinuous info kernels"),
    "bench": ("sinuous.apps.bench", "measure on this machine: sinuous bench ops"),
    "convert": (
        "sinuous.apps.convert",
        "an author's checkpoint to safetensors: sinuous convert IN OUT --model NAME",
    ),
    "export": ("sinuous.apps.export", "a model as ONNX: sinuous export vim_nano.fashion_mnist OUT.onnx"),
}


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, VERBS))
    parser = argparse.ArgumentParser(
        prog="sinuous",
        description="Recurrent backbones for sequences that are too long for attention.",
        epilog="verbs:\n"
        + "\n".join(f"  {verb:<{width}}  {help_text}" for verb, (_, help_text) in VERBS.items())
        + "\n\n`sinuous VERB --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    parser.add_argument("verb", nargs="?", metavar="VERB", help="one of the verbs below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the verb")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sinuous` with `argv` (the process's own arguments if absent) and return its exit code."""
    parser = _parser()
    words = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(words[:1])
    if options.version:
        from sinuous import __version__

        print(f"sinuous {__version__}")
        return 0
    if options.verb is None:
        parser.print_help()
        return 2
    if options.verb not in VERBS:
        near = difflib.get_close_matches(options.verb, VERBS, n=1, cutoff=0.4)
        hint = f"did you mean `sinuous {near[0]}`?" if near else f"the verbs are {', '.join(VERBS)}"
        print(f"sinuous: there is no verb {options.verb!r}; {hint}", file=sys.stderr)
        return 2
    return _run(options.verb, words[1:])


def _run(verb: str, arguments: list[str]) -> int:
    choose_waiting()
    try:
        return int(importlib.import_module(VERBS[verb][0]).main(arguments) or 0)
    except SystemExit as stop:  # argparse and Hydra end this way after --help and on unknown flags
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    except KeyboardInterrupt:
        print(f"\nsinuous {verb}: stopped by Ctrl-C", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `sinuous models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        sentence = None if os.environ.get("SINUOUS_DEBUG") == "1" else explain(error)
        if sentence is None:
            raise
        print(f"sinuous {verb}: {sentence}", file=sys.stderr)
        return 2


def explain(error: BaseException) -> str | None:
    """One sentence for a failure that its user can mend, or None for a defect of the program.

    Hydra wraps what an object's constructor raises; the cause is then what is explained.
    """
    names = {cls.__name__ for cls in type(error).__mro__}
    if "InstantiationException" in names and error.__cause__ is not None:
        sentence = explain(error.__cause__)
        if sentence is None:  # the constructor broke on what it was given: an option too many, a word for a list
            place = re.search(r"full_key: (\S+)", str(error)) or re.search(r"target '(?:[^']*\.)?([^'.]+)'", str(error))
            cause = textwrap.shorten(str(error.__cause__), 300, placeholder=" …").rstrip(".")
            name = place[1] if place else "an object"
            sentence = f"{name}: {cause}; correct its options (SINUOUS_DEBUG=1 shows where it fails)"
        return sentence
    if isinstance(error, ModuleNotFoundError) and error.name:
        from sinuous.apps.packages import extra_with

        package = error.name.partition(".")[0]
        extra = extra_with(package)
        return extra and f"this needs {package}, which is not installed: pip install '{extra}'"
    if "OverrideParseException" in names:
        key, _, value = str(getattr(error, "override", "")).partition("=")
        word = shlex.quote(key + '="' + value.replace('"', '\\"') + '"')
        return (
            f"the value of {key} has a character that the grammar of options reads as its own; put it into quotes, "
            f"within those of the shell: {word}"
        )
    if missing := getattr(error, "missing_cfg_file", None):  # of Hydra's MissingConfigException
        from sinuous.apps.domain_configs import known

        return f"there is no configuration {missing}; {_near(str(missing).removesuffix('.yaml'), known())}"
    if str(error).startswith("Config group override must be a string or a list"):
        from sinuous.apps.composition import COMMAND

        empty = [word for word in COMMAND if word.endswith("=null")]
        group = empty[0].removesuffix("=null") if empty else "GROUP"
        return f"{group}=null: a group is left out with '~{group}'"
    if "OutOfMemoryError" in names:
        return "the device has no memory left; lower data.batch_size or the size of the model"
    text, key = str(error), str(getattr(error, "full_key", None) or "")
    if absent := re.match(r"Interpolation key '(.+?)' not found", text):
        return (
            f"{key} is read from {absent[1]}, which is not in this configuration; choose a model, data and a task that "
            "go together, as an experiment does"
        )
    if absent := re.match(r"Missing mandatory value: (\S+)", text):
        name = key if key.endswith(f".{absent[1]}") else absent[1]
        return f"Missing mandatory value: {name}; give {name}=VALUE"
    if unknown := re.match(r"Could not override '([\w.@/]+)'\.\s*To append", text):
        name = unknown[1]
        return f"there is no option {name} here; {_near(name, _options(name))} (+{name}=… would add it)"
    if unknown := re.match(r"Could not override '([\w@/]+)'\. No match", text):
        return f"this verb has no group {unknown[1]}; with --help it lists those that it has"
    if isinstance(error, OSError) and error.filename is not None and text.startswith("[Errno"):
        return f"{error.strerror}: {error.filename}; check that path, and whether it may be read and written"
    expected = {"ValueError", "OSError", "HydraException", "OmegaConfBaseException", "MisconfigurationException"}
    expected |= {"YAMLError", "ModuleNotFoundError"}
    if not names & expected:
        return None
    if "Original Traceback" in text:  # raised in a worker process of a data loader: its last line is the message
        text = text.strip().splitlines()[-1].partition(": ")[2]
    cause = str(error.__cause__) if error.__cause__ is not None and "HydraException" in names else ""
    lines = [line.strip() for line in [*text.splitlines(), *cause.splitlines()] if line.strip()]
    telling = [
        line for line in dict.fromkeys(lines) if not line.startswith(("full_key:", "object_type=", "reference_type="))
    ]
    return " ".join(telling) or type(error).__name__


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else "`sinuous train --help` lists what there is"


def _options(like: str) -> list[str]:
    """Names of the groups, or of the options that configurations of the group of `like` have."""
    import yaml  # comes with hydra, which has run by now

    from sinuous.apps.domain_configs import OWN, folders

    def names(node: Any, prefix: str) -> Iterator[str]:
        for key, value in node.items() if isinstance(node, dict) else ():
            yield f"{prefix}{key}"
            yield from names(value, f"{prefix}{key}.")

    groups = {group.name for folder in folders() for group in folder.iterdir() if group.is_dir()}
    group, dot, rest = like.partition(".")
    if dot and group not in groups:
        return sorted(f"{name}.{rest}" for name in groups)
    files = [file for folder in folders() for file in (folder / group).rglob("*.yaml")] if dot else []
    files += [OWN / "batches.yaml"] if group == "data" else []
    files += [] if dot else [OWN / f"{verb}.yaml" for verb in ("train", "eval")]
    known = {name for file in files for name in names(yaml.safe_load(file.read_text()), f"{group}." if dot else "")}
    known.discard(like)  # which another choice of the group has
    return sorted(known if dot else known | groups)
