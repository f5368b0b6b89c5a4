"""Rows with a blank to fill, as LiST's pipeline and its objective take them."""

import torch

WORDS = torch.tensor([4, 5])


def cloze(count, seed):
    """Rows whose class stands at position 2; label words 4 and 5, answer slot 5."""
    generator, out = torch.Generator().manual_seed(seed), []
    for i in range(count):
        y = int(torch.randint(2, (1,), generator=generator))
        ids = torch.randint(20, 97, (8,), generator=generator).tolist()
        ids[2] = 10 + y
        row = {"label": torch.tensor(y), "slot": torch.tensor(5), "words": WORDS}
        out.append({"ids": ids, "labels": [-100] * 8, "key": str(i), "row": row})
    return out


def with_soft(rows, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [{**r, "row": {**r["row"], "soft": torch.rand(2, generator=generator).softmax(-1)}} for r in rows]
