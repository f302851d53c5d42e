"""Small models of letters with weights that matter, for what is done with models."""

from typing import Any

import torch

from sinuous.genomics.heads import HeadedModel
from sinuous.genomics.letters import DNATokenizer, ProteinTokenizer, SmilesTokenizer

TOKENIZERS = {"dna": DNATokenizer(), "protein": ProteinTokenizer(), "smiles": SmilesTokenizer()}


def letter_model(kind: str, pattern: str = "mlstm", **options: Any) -> HeadedModel:
    """A model whose outputs hang on all that it has read, in fp64 and in evaluation mode."""
    tokenizer = TOKENIZERS[kind]
    rotary = {"mlstm": {"rotary": "inner"}} if kind == "protein" and pattern == "mlstm" else None
    options = {"tie_head": False, "mixer_options": rotary, **options}
    model = HeadedModel(tokenizer.vocab_size, 16, 2, 2, pattern, tokenizer=tokenizer, **options).double().eval()
    generator = torch.Generator().manual_seed(0)
    for weights in model.parameters():
        weights.data += 0.2 * torch.randn(weights.shape, generator=generator, dtype=torch.float64)
    return model


def letters(kind: str, length: int, seed: int = 0) -> str:
    """Random letters of DNA or a protein."""
    natural = TOKENIZERS[kind].natural
    drawn = torch.randint(len(natural), (length,), generator=torch.Generator().manual_seed(seed))
    return str(TOKENIZERS[kind].decode(natural[drawn]))
