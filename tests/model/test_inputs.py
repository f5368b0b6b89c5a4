"""Soft prompts at the input: which token gets which offset, where inserted vectors stand, what a plain call sees."""

import pytest
import torch

from luthier.data.batch import IGNORE, collate
from luthier.model.inputs import prepend, soft_prompt
from luthier.model.view import Inputs
from luthier.testing.models import batch_of, rows_of, view_of

WIDTH = 32


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hooked(view, batch, vectors, offsets, scope="prompt"):
    """[T, D] embeddings of the batch's own tokens, and all of what the trunk gets."""
    out = soft_prompt(lambda: vectors, lambda: offsets, scope)(Inputs(batch, None, None), view)
    return out.embeds[out.source], out


@pytest.mark.parametrize("scope", ["prompt", "all"])
@pytest.mark.parametrize("reach", [1, 3, 20], ids=["one", "inside the prompt", "past the end"])
def test_offsets_go_by_position_to_the_scope_and_no_further(scope, reach):
    view, rows = view_of(), rows_of((9, 5, 12), answer=4)
    offsets, batch = draw(reach, WIDTH), collate(rows)
    seen, _ = hooked(view, batch, draw(2, WIDTH, seed=1), offsets, scope)
    t = 0
    for row in rows:
        for position, (token, prompt) in enumerate(zip(row["ids"], row["token"]["prompt"], strict=True)):
            expected = view.embedding.weight[token]
            if position < reach and (prompt or scope == "all"):
                expected = expected + offsets[position]
            assert torch.equal(seen[t], expected), (t, position)
            t += 1


def test_inserted_vectors_stand_before_each_sequence():
    view, batch, vectors = view_of(), batch_of((3, 2), answer=1), draw(2, WIDTH)
    out = prepend(Inputs(batch, view.embedding(batch.ids), None), vectors)
    assert out.source.tolist() == [2, 3, 4, 7, 8] and out.batch.lengths == (5, 4)
    assert out.batch.pos.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert out.batch.seq.tolist() == [0] * 5 + [1] * 4
    assert torch.equal(out.embeds[[0, 1]], vectors) and torch.equal(out.embeds[[5, 6]], vectors)
    assert torch.equal(out.embeds[out.source], view.embedding(batch.ids))
    assert torch.equal(out.batch.labels[out.source], batch.labels)
    front = [0, 1, 5, 6]
    assert (out.batch.labels[front] == IGNORE).all()


def test_a_second_prompt_stands_before_the_first_and_offsets_count_the_texts_own_tokens():
    """Two prompts at one input, as when an update with a prompt is bound and another one trains."""
    view, batch = view_of(), batch_of((6, 4), answer=2)
    first, second, offsets, more = (
        draw(2, WIDTH),
        draw(1, WIDTH, seed=1),
        draw(3, WIDTH, seed=2),
        draw(9, WIDTH, seed=3),
    )
    _, once = hooked(view, batch, first, offsets)
    out = soft_prompt(lambda: second, lambda: more)(once, view)
    plain = view.embedding(batch.ids)
    for t, (position, prompt) in enumerate(zip(batch.pos.tolist(), batch.token["prompt"].tolist(), strict=True)):
        wanted = plain[t]
        if prompt and position < 3:
            wanted = wanted + offsets[position]
        if prompt:
            wanted = wanted + more[position]
        assert torch.equal(out.embeds[out.source[t]], wanted)
    assert torch.equal(out.embeds[:3], torch.cat([second, first])) and out.batch.lengths == (9, 7)
    everywhere = soft_prompt(lambda: second, lambda: more, "all")(once, view)
    assert torch.equal(everywhere.embeds[1:3], first), "vectors of another prompt are no tokens"
