"""A model of both strands over a causal trunk, of any mixers: what annotation asks for, and no more."""

import torch
from torch import Tensor, nn

from sinuous.core.sequence_model import SequenceModel
from sinuous.genomics.letters import DNATokenizer


class Trunk(nn.Module):
    def __init__(self, pattern: str) -> None:
        super().__init__()
        heads = {} if pattern == "mamba" else {pattern: {"num_heads": 2}}
        self.model = SequenceModel(12, 16, 2, pattern, heads)

    def prefill(self, ids: Tensor, state: object) -> tuple[Tensor, object]:
        x, after = self.model.layers.prefill(self.model.embedding(ids), state)
        return self.model.norm_f(x), after

    def initial_state(self, batch_size: int) -> object:
        return self.model.initial_state(batch_size)


class Annotator(nn.Module):
    """Logits of features u and of v at the same bases, not the same for both: the join must keep them apart."""

    num_classes = 5
    tokenizer = DNATokenizer()

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.trunk = Trunk(pattern)
        self.forwards, self.backwards = nn.Linear(16, 5), nn.Linear(16, 5)
        generator = torch.Generator().manual_seed(0)
        for weights in self.parameters():  # so that blocks write much, and states matter for long
            weights.data += 0.2 * torch.randn(weights.shape, generator=generator)

    def join(self, u: Tensor, v: Tensor) -> Tensor:
        return self.forwards(u) + self.backwards(v) + (u[..., :5] * v[..., 5:10])

    def forward(self, ids: Tensor) -> Tensor:
        u, v = self.trunk.prefill(ids, None)[0], self.trunk.prefill(self.tokenizer.complement[ids].flip(1), None)[0]
        return self.join(u, v.flip(1))
