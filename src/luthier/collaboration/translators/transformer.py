"""The Grad-Transformer: an encoder reads the small update layer by layer, and a decoder writes the large one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import T5Config, T5Model
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from luthier.collaboration.translators.base import PADDED, Fitted, Pairs, Standard, Translator
from luthier.method import Source
from luthier.step.lab import Lab
from luthier.support.rng import Streams

SETS_NEEDED = 20  # with fewer sets the sheet refuses; ridge is better below 200
VALIDATED = 100  # pairs at most, because validation writes layer by layer


class UpdateTransformer(nn.Module):
    """The encoder and the decoder of a T5 between three linear maps. One token is one layer's factors.

    core   a T5Model; its token embeddings are not used
    width_s, width_t  numbers in each layer, d_S and d_T
    """

    def __init__(self, core: T5Model, width_s: int, width_t: int, generator: torch.Generator) -> None:
        super().__init__()
        h = core.config.d_model
        self.core = core
        self.core.shared.requires_grad_(False)
        self.embed_s, self.embed_t, self.out = nn.Linear(width_s, h), nn.Linear(width_t, h), nn.Linear(h, width_t)
        for linear in (self.embed_s, self.embed_t, self.out):
            nn.init.xavier_uniform_(linear.weight, generator=generator)
            nn.init.zeros_(linear.bias)

    def encode(self, x: Tensor) -> Tensor:
        """[N, L_S, d_S] -> [N, L_S, h]."""
        hidden: Tensor = self.core.encoder(inputs_embeds=self.embed_s(x)).last_hidden_state
        return hidden

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Predict each layer of the large update from the small update and the true layers before it: [N, L_T, d_T] in and out.

        The first decoder input is the image of zero, here and in `write`. The official code starts inference from another vector
        than training.
        """
        before = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], dim=1)
        hidden = self.core.decoder(
            inputs_embeds=self.embed_t(before), encoder_hidden_states=self.encode(x), use_cache=False
        ).last_hidden_state  # [N, L_T, h]
        written: Tensor = self.out(hidden)
        return written

    @torch.no_grad()
    def write(self, x: Tensor, layers: int, cached: bool = True) -> Tensor:
        """Write each layer from the layers written before: [N, L_S, d_S] -> [N, L_T, d_T]."""
        memory = self.encode(x)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if cached else None
        written = [torch.zeros(len(x), self.out.out_features, device=x.device)]
        for _ in range(layers):
            tokens = written[-1:] if cached else written
            hidden = self.core.decoder(
                inputs_embeds=self.embed_t(torch.stack(tokens, dim=1)), encoder_hidden_states=memory,
                past_key_values=cache, use_cache=cached,
            ).last_hidden_state  # fmt: skip
            written.append(self.out(hidden[:, -1]))
        return torch.stack(written[1:], dim=1)


def masked_error(guess: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Mean square over the coordinates that exist: Eq. 10 divided by d_T. guess, truth [N, L, d]; mask [L, d] bool."""
    return ((guess - truth) * mask).square().sum() / (mask.sum() * len(guess))


class Transformer(Translator):
    """Translate layer by layer, with a T5 encoder and decoder over whole layers' factors.

    It trains with the true earlier layers, and validates on its own outputs for other shadow sets. The state with the lowest
    validation error is kept. Standard form is on by default, unlike in the paper: raw targets are so small that a new translator
    hardly learns anything else than "no change" (sheet: 0 to 3% of the gap closed, against 55 to 67%).
    Cost: about 6 (P_encoder L_S + P_decoder L_T) FLOPs a pair and epoch.
    Refuses: fewer than 20 shadow sets.
    """

    source: ClassVar[Source] = Source(
        "Gradient Transformer: Learning to Generate Updates for LLMs", 2026, "arXiv:2605.27591", "eq. 10, 11"
    )

    width: int = Field(256, ge=8)
    """Width of the stacks (h); not used with `pretrained`."""
    layers: int = Field(4, ge=1)
    """Encoder layers, and decoder layers."""
    heads: int = Field(4, ge=1)
    """Attention heads."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout during training."""
    pretrained: str | None = None
    """Folder or Hub id of a T5 to start from (google/flan-t5-large in the paper); None starts from random weights."""
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    """Constant learning rate of Adam; use 2e-5 to 8e-5 if it starts from a pre-trained T5."""
    batch_size: int = Field(32, ge=1)
    """Pairs in each step."""
    epochs: int = Field(200, ge=1)
    """Largest number of passes over the pairs."""
    patience: int = Field(20, ge=1)
    """It stops after this many epochs without a better validation error."""
    training_share: float = Field(0.9, gt=0, lt=1)
    """Share of the shadow sets to train on; the others choose the epoch."""
    own_outputs: float = Field(0.0, ge=0, le=1)
    """Final probability that a pair is trained on layers that the translator wrote itself; it rises during training."""
    seed: int = Field(0, ge=0)
    """Seed for start, split, order and dropout."""

    def fit(self, pairs: Pairs, lab: Lab | None = None) -> FittedTransformer:
        pairs = pairs.checked(at_least=SETS_NEEDED)
        streams = Streams(self.seed)
        training, validation = pairs.split(self.training_share, streams)
        x, y = self.standards(training)
        with keyed(streams, "translator"):
            net = self._net(pairs, streams)
            fitted = FittedTransformer(x, y, net)
            _Training(self, fitted, training, validation, streams).run()
        return fitted

    def _net(self, pairs: Pairs, streams: Streams) -> UpdateTransformer:
        if self.pretrained:
            core = T5Model.from_pretrained(self.pretrained, dtype=torch.float32)
        else:
            core = T5Model(
                T5Config(
                    vocab_size=1, d_model=self.width, d_kv=self.width // self.heads, d_ff=4 * self.width,
                    num_layers=self.layers, num_decoder_layers=self.layers, num_heads=self.heads,
                    dropout_rate=self.dropout, eos_token_id=None,
                )
            )  # fmt: skip
        generator = streams.torch("translator-maps")
        return UpdateTransformer(core, pairs.x.shape[2], pairs.y.shape[2], generator)


class FittedTransformer(Fitted):
    """The trained network."""

    def __init__(self, x: Standard, y: Standard, net: UpdateTransformer) -> None:
        super().__init__(x, y)
        self.net = net.eval()

    def translate(self, x: Tensor) -> Tensor:
        return self.net.write(x, len(self.y.mean))


class _Training:
    """Training over epochs; the best state is restored at the end."""

    def __init__(
        self, settings: Transformer, fitted: FittedTransformer, training: Pairs, validation: Pairs, streams: Streams
    ) -> None:
        self.settings, self.fitted, self.net, self.streams = settings, fitted, fitted.net, streams
        self.x, self.y = fitted.x.apply(training.x), fitted.y.apply(training.y)
        few = validation.take(torch.arange(min(len(validation.x), VALIDATED)))
        self.held_x, self.held_y = fitted.x.apply(few.x), fitted.y.apply(few.y)
        self.mask = training.y_kinds != PADDED
        self.optimizer = torch.optim.Adam([p for p in self.net.parameters() if p.requires_grad], settings.learning_rate)

    def run(self) -> None:
        best, best_state, since = float("inf"), {}, 0
        for epoch in range(self.settings.epochs):
            entry = {"epoch": epoch + 1, "loss": self._epoch(epoch), "validation": self._validate()}
            self.fitted.epochs.append(entry)
            since += 1
            if entry["validation"] < best:
                best, since = entry["validation"], 0
                best_state = {k: v.detach().clone() for k, v in self.net.state_dict().items()}
            if since >= self.settings.patience:
                break
        if not best_state:
            raise ValueError("the translator's validation error was never finite; lower its learning_rate")
        self.net.load_state_dict(best_state)
        self.net.eval()

    def _epoch(self, epoch: int) -> float:
        self.net.train()
        order = torch.from_numpy(self.streams.at("translator-order", epoch).permutation(len(self.x)))
        total = 0.0
        for rows in order.split(self.settings.batch_size):
            x, y = self.x[rows], self.y[rows]
            loss = masked_error(self.net(x, self._teacher(x, y, epoch)), y, self.mask)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            total += float(loss.detach()) * len(rows)
        return total / len(self.x)

    def _teacher(self, x: Tensor, y: Tensor, epoch: int) -> Tensor:
        """The earlier layers that the decoder gets in training."""
        chance = self.settings.own_outputs * epoch / max(self.settings.epochs - 1, 1)
        if not chance:
            return y
        self.net.eval()
        own = self.net.write(x, y.shape[1])
        self.net.train()
        chosen = torch.rand(len(x), 1, 1) < chance
        return torch.where(chosen, own, y)

    def _validate(self) -> float:
        """The error of its own outputs. With the true layers before it, a translator looks better than it is."""
        self.net.eval()
        return float(masked_error(self.net.write(self.held_x, self.held_y.shape[1]), self.held_y, self.mask))


@contextmanager
def keyed(streams: Streams, purpose: str) -> Iterator[None]:
    """Use a key for torch's global generator, which dropout and T5's start draw from; it is restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(streams.at(purpose).integers(2**62)))
        yield


__all__ = ["FittedTransformer", "Transformer", "UpdateTransformer", "masked_error"]
