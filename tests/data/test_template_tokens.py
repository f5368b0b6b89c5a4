"""What ends an answer, and what a tokenizer's key changes with."""

import random

import pytest
from tokenizers import AddedToken, normalizers

from helpers.templates import CHATML, MARKS, TEMPLATES
from helpers.words import TOKENIZERS, byte_level, sentencepiece, slow_bytes
from luthier.data.rendering import Renderer
from luthier.data.tokens import Tokens, tokenizer_key


@pytest.mark.parametrize(
    ("kind", "first", "last", "leads"),
    [
        ("byte-level", [], [], False), ("byte-level-bos", ["<s>"], [], False), ("sentencepiece", ["<s>"], [], True),
        ("metaspace-always", ["<s>"], [], True), ("metaspace-first", ["<s>"], [], True), ("no-lead", ["<s>"], [], False),
        ("unigram", ["</s>"], [], True), ("word-pieces", ["[CLS]"], ["[SEP]"], False), ("slow-bytes", [], ["</s>"], False),
    ],
)  # fmt: skip
def test_the_edges_of_a_text(kind, first, last, leads):
    tokenizer = TOKENIZERS[kind]()
    tokens = Tokens(tokenizer)
    assert [tokenizer.convert_ids_to_tokens(list(x)) for x in tokens.frame] == [first, last] and tokens.leads == leads
    text = "two plus"
    whole = tokenizer("is two plus", add_special_tokens=False)["input_ids"]
    after = tokens.following(" two plus") if kind != "word-pieces" else tokens.following(text)
    assert whole[-len(after) :] == after


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_templates_own_end_is_a_stop(name):
    tokenizer = byte_level(TEMPLATES[name])
    stops = {tokenizer.decode([i]) for i in Renderer(tokenizer).stop_ids}
    tail = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "ANSWER"}], tokenize=False
    ).partition("ANSWER")[2]
    assert min((m for m in MARKS if m in tail), key=tail.index) in stops


def test_the_models_settings_name_more_ends():
    tokenizer = byte_level(CHATML)
    eot, end = tokenizer.convert_tokens_to_ids(["<|User|>", "<|end|>"])
    assert eot not in Renderer(tokenizer).stop_ids and end in Renderer(tokenizer).stop_ids
    stops = Renderer(tokenizer, ends=(eot, 10**6)).stop_ids
    assert eot in stops and 10**6 not in stops and end not in stops


def test_the_key_changes_with_all_that_decides_ids():
    moved = sentencepiece()
    moved.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    added = byte_level()
    added.add_tokens(["hello"])
    no_eos = byte_level()
    no_eos.eos_token = "<|im_end|>"
    made = [byte_level(), byte_level(CHATML), sentencepiece(), moved, added, no_eos, slow_bytes(), slow_bytes(CHATML)]
    assert len({tokenizer_key(t) for t in made}) == len(made)
    assert tokenizer_key(byte_level()) == tokenizer_key(byte_level())
    assert tokenizer_key(slow_bytes()) == tokenizer_key(slow_bytes())


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_ids_up_to_a_cut_are_those_of_the_text_up_to_it(kind):
    """At random cuts of random texts, also within tokens and where an added token takes the space before it."""
    tokenizer, rng = TOKENIZERS[kind](), random.Random(3)
    if kind != "slow-bytes":
        tokenizer.add_tokens([AddedToken("<|left|>", lstrip=True, rstrip=True), AddedToken("fine", single_word=True)])
    words = [
        *MARKS[:6],
        "<|left|>",
        " ",
        "  ",
        "\n",
        "hello",
        " there",
        "the answer",
        "fine",
        "—",
        "a",
        "<",
        "|>",
        "[INST]",
    ]
    texts = ["".join(rng.choices(words, k=12)) for _ in range(40)]
    cuts = [[*sorted(rng.randrange(1, len(t)) for _ in range(4)), len(t)] for t in texts]
    found = Tokens(tokenizer).fronts(texts, cuts)
    for text, row, fronts in zip(texts, cuts, found, strict=True):
        assert fronts == [tokenizer(text[:c], add_special_tokens=False)["input_ids"] for c in row], text
