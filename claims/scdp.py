"""How evenly do the kept rows spread over distances from the median?"""

from functools import cache

import numpy as np
from toys import rows_of

from luthier.curation.scdp import NUM_STRATA, Scdp, strata_of, stratified
from luthier.support.rng import Streams

COUNT, KEPT = 1500, 450


@cache
def distances():
    articles = [r for split in ("train", "valid") for r in rows_of("wikitext2", split)]
    texts = [p for r in articles for p in r["text"].split("\n") if len(p) > 100]
    assert len(texts) >= COUNT
    return Scdp(keep_fraction=0.3).scores(texts[:COUNT])[0]


def measure(arm, seed, say):
    scores, generator = distances(), Streams(seed).at("claim")
    drawn = generator.permutation(COUNT)[:KEPT] if arm == "random" else stratified(scores, KEPT, generator)
    share = np.bincount(strata_of(scores)[drawn], minlength=NUM_STRATA) / KEPT
    return {"entropy": float(-(share[share > 0] * np.log(share[share > 0])).sum())}
