"""The `sinuous` command. Each verb's module is imported when the verb is used, so that `sinuous --help` loads no torch.

Exit codes: 0 done, 2 wrong input or a missing piece (one sentence on stderr says what to do), 130 Ctrl-C, 143 SIGTERM.
`SINUOUS_DEBUG=1` shows the traceback behind the sentence.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

VERBS = {
    "train": ("sinuous.apps.train", "train a model: sinuous train experiment=vision/fashion_mnist"),
    "eval": ("sinuous.apps.evaluate", "score weights on a test set: sinuous eval model_name=vim_nano pretrained=true"),
    "demo": ("sinuous.apps.demo", "run a trained model on a picture of yours: sinuous demo vision"),
    "models": ("sinuous.apps.models", "list the models: sinuous models 'vim*'"),
    "info": ("sinuous.apps.info", "what this machine can run: sinuous info kernels"),
    "bench": ("sinuous.apps.bench", "measure the ops on this machine"),
    "convert": (
        "sinuous.apps.convert",
        "an author's checkpoint to safetensors: sinuous convert IN OUT --model NAME",
    ),
}

_EXTRA_OF = {
    "lightning": "train",
    "torchmetrics": "train",
    "torchdata": "train",
    "matplotlib": "train",
    "gradio": "gallery",
    "torchaudio": "audio",
    "soundfile": "audio",
    "av": "video",
    "diffusers": "diffusion",
    "tokenizers": "genomics",
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
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the verb takes")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sinuous` with `argv` (the process's own arguments if absent) and return its exit code."""
    parser = _parser()
    given = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(given[:1])
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
    return _run(options.verb, given[1:])


def _run(verb: str, arguments: list[str]) -> int:
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
    if type(error).__name__ == "InstantiationException" and error.__cause__ is not None:
        if isinstance(error.__cause__, TypeError):  # an option that the object does not have
            return f"{str(error).rpartition('full_key: ')[2].strip()}: {error.__cause__}"
        return explain(error.__cause__)
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        if package not in _EXTRA_OF:
            return None
        return f"this needs {package}, which is not installed: pip install 'sinuous[{_EXTRA_OF[package]}]'"
    missing = getattr(error, "missing_cfg_file", None)  # of Hydra's MissingConfigException
    if missing:
        configs = Path(__file__).parent / "configs"
        known = [str(path.relative_to(configs).with_suffix("")) for path in configs.rglob("*.yaml")]
        near = difflib.get_close_matches(str(missing).removesuffix(".yaml"), known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`sinuous train --help` lists what there is"
        return f"there is no configuration {missing}; {hint}"
    names = {cls.__name__ for cls in type(error).__mro__}
    if "OutOfMemoryError" in names:
        return "the device has no memory left; lower data.batch_size or the size of the model"
    wanted = {"ValueError", "OSError", "HydraException", "OmegaConfBaseException", "MisconfigurationException"}
    if not names & wanted:
        return None
    text = str(error)
    if "Original Traceback" in text:  # raised in a worker process of a data loader: its last line is the message
        text = text.strip().splitlines()[-1].partition(": ")[2]
    cause = str(error.__cause__) if error.__cause__ is not None and "HydraException" in names else ""
    lines = [line.strip() for line in [*text.splitlines(), *cause.splitlines()] if line.strip()]
    kept = [
        line for line in dict.fromkeys(lines) if not line.startswith(("full_key:", "object_type=", "reference_type="))
    ]
    return " ".join(kept) or type(error).__name__
