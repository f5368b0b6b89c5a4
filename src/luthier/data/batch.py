"""One logical batch over two layouts.

Letters of the whole library: T tokens of a batch, S sequences, N supervised rows, V vocabulary, D hidden,
H heads, R rank, K entries kept, P parties.

A `Batch` always lists its sequences end to end in T tokens. Whether the model then sees one flat row or a
padded rectangle is decided by the `ModelView`; methods never notice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # label of a position that carries no loss


@dataclass(frozen=True)
class Batch:
    """Sequences end to end.

    ids     [T] int64 token ids
    labels  [T] int64; labels[t] is what the model should predict *at* position t (already shifted), or IGNORE;
            for row-level tasks all IGNORE, with the class in row["label"]
    seq     [T] int64, index of the sequence a token belongs to, 0..S-1, non-decreasing
    pos     [T] int64, position within the sequence; need not be contiguous after tokens were dropped
    lengths S Python ints, tokens a sequence
    token   named per-token columns [T, ...]; row: named per-sequence columns [S, ...]
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
    def starts(self) -> Tensor:
        """[S] int64, index of each sequence's first token."""
        lengths = torch.tensor(self.lengths, device=self.ids.device)
        return lengths.cumsum(0) - lengths

    @property
    def ends(self) -> Tensor:
        """[S] int64, index of each sequence's last token."""
        return torch.tensor(self.lengths, device=self.ids.device).cumsum(0) - 1

    @property
    def contiguous(self) -> bool:
        """True where every sequence counts its positions from 0 without a gap."""
        expected = torch.arange(self.num_tokens, device=self.ids.device) - self.starts[self.seq]
        return bool((self.pos == expected).all())

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            ids=self.ids.to(device),
            labels=self.labels.to(device),
            seq=self.seq.to(device),
            pos=self.pos.to(device),
            token={k: v.to(device) for k, v in self.token.items()},
            row={k: v.to(device) for k, v in self.row.items()},
        )

    def with_columns(
        self, *, token: Mapping[str, Tensor] | None = None, row: Mapping[str, Tensor] | None = None
    ) -> Batch:
        """The same batch with more columns."""
        return replace(self, token={**self.token, **(token or {})}, row={**self.row, **(row or {})})

    def select(self, rows: Tensor, tokens: Tensor | None = None, drop: bool = False) -> Batch:
        """Keep some sequences, and within them some tokens.

        rows    [S'] int64, sequences to keep, sorted
        tokens  [T] bool, positions whose label stays; None keeps all
        drop    False: other labels become IGNORE. True: positions with a label that is not kept leave the input as
                well, and `pos` keeps its old values. Then the token is gone from the context, and its prediction too.
        """
        labels = self.labels if tokens is None else torch.where(tokens, self.labels, IGNORE)
        wanted = torch.zeros(self.num_sequences, dtype=torch.bool, device=self.ids.device)
        wanted[rows] = True
        keep = wanted[self.seq]  # [T]
        if drop and tokens is not None:
            # labels[t] belongs to the *input* token t + 1; that token leaves when its label was pruned.
            pruned = (self.labels != IGNORE) & ~tokens
            gone = torch.zeros_like(pruned)
            gone[1:] = pruned[:-1] & (self.seq[1:] == self.seq[:-1])
            keep, labels = keep & ~gone, self._rejoin(labels, gone)
        new_index = wanted.long().cumsum(0) - 1  # [S] -> position among the kept
        seq = new_index[self.seq[keep]]
        lengths = torch.bincount(seq, minlength=int(wanted.sum())).tolist() if seq.numel() else []
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
        )

    def _rejoin(self, labels: Tensor, gone: Tensor) -> Tensor:
        """A position before a dropped run predicts the first token after it, if that one is supervised.

        Without this the kept tokens behind a dropped one would lose their loss, since the position that predicted
        them has left.
        """
        labels = labels.clone()
        for t in gone.nonzero().squeeze(1).flip(0).tolist():  # right to left, so runs collapse
            labels[t - 1] = labels[t]
        return labels


def collate(sequences: Sequence[Mapping[str, Any]]) -> Batch:
    """Sequences to one batch.

    Each item holds `ids` and `labels` (lists of ints, unshifted labels aligned with ids: labels[i] is ids[i] where it
    is supervised, else IGNORE), optionally `key`, `token` (named per-token lists) and `row` (named values).
    The shift happens here, once, for the whole library. `targets` in place of labels are not shifted: targets[i] is what
    is to be predicted at i, where it was hidden.
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
    token_names = sequences[0].get("token", {}) if sequences else {}
    row_names = sequences[0].get("row", {}) if sequences else {}
    as_long = lambda values: torch.tensor(values, dtype=torch.long)  # noqa: E731
    return Batch(
        ids=as_long(ids),
        labels=as_long(labels),
        seq=as_long(seq),
        pos=as_long(pos),
        lengths=tuple(lengths),
        token={k: torch.cat([torch.as_tensor(s["token"][k]) for s in sequences]) for k in token_names},
        row={k: torch.stack([torch.as_tensor(s["row"][k]) for s in sequences]) for k in row_names},
        keys=tuple(keys),
    )


def predicted(item: Mapping[str, Any]) -> list[bool]:
    """For each token of a rendered row: is it predicted? Nothing predicts the first one from what stands before it."""
    if "targets" in item:
        return [y != IGNORE for y in item["targets"]]
    return [at > 0 and y != IGNORE for at, y in enumerate(item["labels"])]


def front_of(labels: Sequence[int]) -> int:
    """Tokens before the first supervised one."""
    return next((i for i, y in enumerate(labels) if y != IGNORE), len(labels))


def pad(values: Tensor, batch: Batch, fill: float = 0) -> Tensor:
    """[T, ...] -> [S, L, ...], right-padded."""
    width = max(batch.lengths, default=0)
    out = values.new_full((batch.num_sequences, width, *values.shape[1:]), fill)
    out[batch.seq, _columns(batch)] = values
    return out


def unpad(values: Tensor, batch: Batch) -> Tensor:
    """[S, L, ...] -> [T, ...]."""
    return values[batch.seq, _columns(batch)]


def _columns(batch: Batch) -> Tensor:
    return torch.arange(batch.num_tokens, device=batch.ids.device) - batch.starts[batch.seq]
