"""Speed and state of language models while they write, after prompts short and long."""

from __future__ import annotations

import argparse
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sinuous.core.bench import measure
from sinuous.core.bench.options import add_machine, add_outputs, positive_integers
from sinuous.core.generation import Sampling, generate
from sinuous.core.registry import create_model
from sinuous.core.sequence_model import SequenceModel
from sinuous.core.tables import Row, command, show, write_csv, write_markdown

METHOD = """Models have random weights, since speed does not depend on them, and write {tokens} tokens greedily after a
prompt of random ones, one row at a time. Prefill is the reading of the prompt in chunks of 2048. State is what must be
kept between two tokens. Each figure is the median of {repeats} runs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="bytes_5m", help="a language model of the registry")
    parser.add_argument(
        "--mixers",
        default="mamba2,gated_delta_net,mlstm,hgrn2,softmax_attention",
        help="comma-separated mixers for its pattern",
    )
    parser.add_argument("--contexts", default="1024,16384", help="comma-separated lengths of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to write")
    parser.add_argument("--repeats", type=int, default=3)
    add_machine(parser)
    add_outputs(parser)


def _state_bytes(model: Any, prompt: Tensor) -> int:
    with torch.inference_mode():
        _, state = model.prefill(prompt[None], None, last_only=True)
    return sum(t.numel() * t.element_size() for t in tree_leaves(state) if isinstance(t, Tensor))


def run(options: argparse.Namespace) -> list[Row]:
    """All rows that the options ask for.

    Raises:
        ValueError: for an unknown model or mixer, or contexts that are no positive integers.
    """
    contexts = positive_integers("--contexts", options.contexts)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    sampling = Sampling(max_new_tokens=options.tokens)
    rows: list[Row] = []
    for mixer in options.mixers.split(","):
        torch.manual_seed(0)
        model = cast("SequenceModel", create_model(options.model, pattern=mixer.strip()).to(device).eval())
        for context in contexts:
            prompt = torch.randint(model.vocab_size, (context,), device=device)
            generate(model, prompt[:16], Sampling(max_new_tokens=2))
            runs = [generate(model, prompt, sampling) for _ in range(options.repeats)]
            rows.append(
                {
                    "mixer": mixer.strip(),
                    "context": context,
                    "prefill_tokens_per_s": measure.median([r.prefill_tokens_per_second for r in runs]),
                    "decode_tokens_per_s": measure.median([r.tokens_per_second for r in runs]),
                    "state_mb": _state_bytes(model, prompt) / 1e6,
                    "parameters": sum(p.numel() for p in model.parameters()),
                }
            )
    heading = f"{options.model}, {measure.machine(device)}, {options.threads} thread(s), torch {torch.__version__}"
    show(rows, tuple(rows[0]), title=heading, group=("mixer",))
    if options.csv:
        write_csv([row | {"threads": options.threads} for row in rows], options.csv)
        print(options.csv)
    if options.markdown:
        method = METHOD.format(**vars(options)) + f"\n\n    {command('generation', options)}"
        write_markdown(rows, tuple(rows[0]), options.markdown, title=f"Generation: {heading}", method=method)
        print(options.markdown)
    return rows
