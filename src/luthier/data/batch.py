"""One logical batch with two layouts.

Letters of the whole library: T tokens of a batch, S sequences, N supervised rows, V vocabulary, D hidden,
H heads, R rank, K entries kept, P parties.

A `Batch` always lists its sequences end to end in T tokens. The `ModelView` decides whether the model gets one flat row or
a padded rectangle; methods work with both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier.support.errors import LuthierError

IGNORE = -100  # label of a position that does not count in the loss
WEIGHT = "weight"  # the row column that says how much a row's loss counts
TYPE_IDS = (
    "token_type_ids"  # the token column that says which of two texts a token belongs to, as the tokenizer numbers them
)


class Spans(NamedTuple):
    """Runs of tokens that belong together; M of them, in the order of their sequences.

    seq    [M] int64, index of the sequence a span lies in
    start  [M] int64, its first token among the batch's T; end: the token behind its last
    type   [M] int64, the type's number, as the user numbered it
    """

    seq: Tensor
    start: Tensor
    end: Tensor
    type: Tensor

    def where(self, keep: Tensor) -> Spans:
        """The spans of a mask [M]."""
        return Spans(*(column[keep] for column in self))


@dataclass(frozen=True)
class Batch:
    """Sequences end to end.

    ids     [T] int64 token ids
    labels  [T] int64; labels[t] is what the model should predict *at* position t (already shifted), or IGNORE;
            for row-level tasks all IGNORE, with the class in row["label"]; where tokens are tagged, the tag's class
    seq     [T] int64, index of the sequence a token belongs to, 0..S-1, non-decreasing
    pos     [T] int64, position within the sequence; need not be contiguous after tokens were dropped
    lengths S Python ints, the number of tokens of each sequence
    token   named per-token columns [T, ...]; row: named per-sequence columns [S, ...]; span: named spans of tokens
    keys    S stable row ids, for keyed randomness and reports
    """

    ids: Tensor
    labels: Tensor
    seq: Tensor
    pos: Tensor
    lengths: tuple[int, ...]
    token: Mapping[str, Tensor] = field(default_factory=dict)
    row: Mapping[str, Tensor] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    span: Mapping[str, Spans] = field(default_factory=dict)

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return int(self.ids.numel())

    @property
    def supervised(self) -> Tensor:
        """[N] int64, indices of the supervised positions."""
        return (self.labels != IGNORE).nonzero().squeeze(1)

    @property
    def supervised_counts(self) -> Tensor:
        """[S] int64, the number of supervised positions of each sequence."""
        return torch.bincount(self.seq[self.supervised], minlength=self.num_sequences)

    @property
    def starts(self) -> Tensor:
        """[S] int64, index of each sequence's first token."""
        lengths = torch.tensor(self.lengths, device=self.ids.device)
        return lengths.cumsum(0) - lengths

    @property
    def ends(self) -> Tensor:
        """[S] int64, index of each sequence's last token."""
        return torch.tensor(self.lengths, device=self.ids.device).cumsum(0) - 1

    @property
    def within(self) -> Tensor:
        """[T] int64, the number of tokens before each token in its sequence."""
        return torch.arange(self.num_tokens, device=self.ids.device) - self.starts[self.seq]

    @property
    def contiguous(self) -> bool:
        """True if every sequence counts its positions from 0 without a gap."""
        return bool((self.pos == self.within).all())

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            ids=self.ids.to(device),
            labels=self.labels.to(device),
            seq=self.seq.to(device),
            pos=self.pos.to(device),
            token={k: v.to(device) for k, v in self.token.items()},
            row={k: v.to(device) for k, v in self.row.items()},
            span={k: Spans(*(column.to(device) for column in v)) for k, v in self.span.items()},
        )

    def with_columns(
        self, *, token: Mapping[str, Tensor] | None = None, row: Mapping[str, Tensor] | None = None,
        span: Mapping[str, Spans] | None = None,
    ) -> Batch:  # fmt: skip
        """The same batch with more columns."""
        return replace(
            self, token={**self.token, **(token or {})}, row={**self.row, **(row or {})}, span={**self.span, **(span or {})}
        )  # fmt: skip

    def select(self, rows: Tensor, tokens: Tensor | None = None, drop: bool = False) -> Batch:
        """Keep some sequences, and within them some tokens.

        rows    [S'] int64, sequences to keep, sorted
        tokens  [T] bool, positions whose label stays; None keeps all
        drop    False: other labels become IGNORE. True: a token whose label is not kept also leaves the input, and `pos` keeps
                its old values. So the token is neither in the context nor predicted. A span keeps its remaining tokens, and is
                removed with the last of them
        """
        labels = self.labels if tokens is None else torch.where(tokens, self.labels, IGNORE)
        wanted = torch.zeros(self.num_sequences, dtype=torch.bool, device=self.ids.device)
        wanted[rows] = True
        keep = wanted[self.seq]  # [T]
        if drop and tokens is not None:
            # labels[t] is predicted at t and is the *input* token t + 1; that token is removed when its label was pruned.
            pruned = (self.labels != IGNORE) & ~tokens
            gone = torch.zeros_like(pruned)
            gone[1:] = pruned[:-1] & (self.seq[1:] == self.seq[:-1])
            keep, labels = keep & ~gone, self._rejoin(labels, gone)
        new_index = wanted.long().cumsum(0) - 1  # [S] -> position among the kept
        seq = new_index[self.seq[keep]]
        lengths = torch.bincount(seq, minlength=int(wanted.sum())).tolist()
        kept_rows = wanted.nonzero().squeeze(1).tolist()
        return Batch(
            ids=self.ids[keep],
            labels=labels[keep],
            seq=seq,
            pos=self.pos[keep],
            lengths=tuple(lengths),
            token={k: v[keep] for k, v in self.token.items()},
            row={k: v[wanted] for k, v in self.row.items()},
            keys=tuple(self.keys[i] for i in kept_rows) if self.keys else (),
            span=self._kept_spans(keep, new_index),
        )

    def _kept_spans(self, keep: Tensor, new_index: Tensor) -> dict[str, Spans]:
        """Spans over the tokens of a mask [T]; new_index [S] numbers the sequences that stay."""
        before = torch.cat([keep.new_zeros(1).long(), keep.long().cumsum(0)])  # [T + 1]: kept tokens before each place
        moved = {k: Spans(new_index[v.seq], before[v.start], before[v.end], v.type) for k, v in self.span.items()}
        return {k: v.where(v.end > v.start) for k, v in moved.items()}

    def _rejoin(self, labels: Tensor, gone: Tensor) -> Tensor:
        """A position before a dropped run predicts the first token after it, if that one is supervised.

        Without this, the kept tokens after a dropped one would lose their loss, because the position that predicted them is
        removed.
        """
        labels = labels.clone()
        for t in gone.nonzero().squeeze(1).flip(0).tolist():  # right to left, so runs collapse
            labels[t - 1] = labels[t]
        return labels


def collate(sequences: Sequence[Mapping[str, Any]]) -> Batch:
    """Sequences to one batch.

    Each item holds `ids` and `labels` (lists of ints, unshifted labels aligned with ids: labels[i] is ids[i] where it
    is supervised, else IGNORE), optionally `key`, `token` (named per-token lists or arrays), `row` (named values) and
    `span` (named lists of (start, end, type) within the sequence).
    The shift happens here, once, for the whole library. `targets` instead of labels are not shifted: targets[i] is the token to
    predict at i, where it was hidden, or the class of i.
    Raises LuthierError with the key of a sequence that lacks a column of the others.
    """
    ids: list[int] = []
    labels: list[int] = []
    seq: list[int] = []
    pos: list[int] = []
    lengths: list[int] = []
    keys: list[str] = []
    for index, item in enumerate(sequences):
        n = len(item["ids"])
        ids.extend(item["ids"])
        labels.extend(item["targets"] if "targets" in item else [*item["labels"][1:], IGNORE] if n else [])
        seq.extend([index] * n)
        pos.extend(range(n))
        lengths.append(n)
        keys.append(str(item.get("key", index)))
    columns = {level: _columns_of(sequences, keys, level) for level in ("token", "row", "span")}
    as_long = partial(torch.tensor, dtype=torch.long)
    return Batch(
        ids=as_long(ids),
        labels=as_long(labels),
        seq=as_long(seq),
        pos=as_long(pos),
        lengths=tuple(lengths),
        token={k: torch.cat([torch.as_tensor(v) for v in values]) for k, values in columns["token"].items()},
        row={k: torch.stack([torch.as_tensor(v) for v in values]) for k, values in columns["row"].items()},
        keys=tuple(keys),
        span={k: _joined(values, lengths) for k, values in columns["span"].items()},
    )


def predicted(item: Mapping[str, Any]) -> list[bool]:
    """For each token of a rendered row, whether it is predicted. No position before the first token predicts it."""
    if "targets" in item:
        return [y != IGNORE for y in item["targets"]]
    return [at > 0 and y != IGNORE for at, y in enumerate(item["labels"])]


def _columns_of(sequences: Sequence[Mapping[str, Any]], keys: Sequence[str], level: str) -> dict[str, list[Any]]:
    """The columns of one level: by name a value for each sequence."""
    held = [item.get(level, {}) for item in sequences]
    out: dict[str, list[Any]] = {name: [] for name in (held[0] if held else ())}
    for key, columns in zip(keys, held, strict=True):
        if columns.keys() != out.keys():
            lacking = min(columns.keys() ^ out.keys())
            which = key if lacking in out else keys[0]
            raise LuthierError(
                f"{which}: has no {level} column {lacking!r}, which other rows have; give it to all rows"
            )
        for name, values in out.items():
            values.append(columns[name])
    return out


def _joined(spans: Sequence[Any], lengths: Sequence[int]) -> Spans:
    """The (start, end, type) of each sequence, shifted to where the sequence begins."""
    found, start = [], 0
    for index, (mine, n) in enumerate(zip(spans, lengths, strict=True)):
        found += [(index, start + int(a), start + int(b), int(t)) for a, b, t in mine]
        start += n
    return Spans(*torch.tensor(found, dtype=torch.long).reshape(-1, 4).unbind(1))


def front_of(labels: Sequence[int]) -> int:
    """The number of tokens before the first supervised one."""
    return next((i for i, y in enumerate(labels) if y != IGNORE), len(labels))


def pad(values: Tensor, batch: Batch, fill: float = 0) -> Tensor:
    """[T, ...] -> [S, L, ...], right-padded."""
    width = max(batch.lengths, default=0)
    out = values.new_full((batch.num_sequences, width, *values.shape[1:]), fill)
    out[batch.seq, batch.within] = values
    return out


def unpad(values: Tensor, batch: Batch) -> Tensor:
    """[S, L, ...] -> [T, ...]."""
    return values[batch.seq, batch.within]
