"""The contract over curators that rewrite, split and encode; those of luthier only choose."""

from helpers.curators import BACKWARDS, LINES, made
from luthier.testing.contract import (  # noqa: F401
    Example,
    test_a_codec_brings_back_the_answers_it_encodes,
    test_a_curator_accounts_for_every_row,
    test_a_curator_decides_alike_whatever_the_order_of_rows,
    test_a_curator_in_a_loop_of_your_own,
    test_a_curator_keeps_the_share_it_was_asked_for,
    test_a_curator_with_one_seed_decides_once,
    test_an_idempotent_curator_changes_nothing_the_second_time,
    test_every_row_that_a_curator_made_has_a_parent_or_none,
)

ROWS = [{"prompt": f"p{i}", "completion": f"first {i}\nsecond" if i % 3 else f"LINE {i}"} for i in range(9)]
CODED = made(BACKWARDS, "coded")
EXAMPLES = [Example(made(LINES, "lines_of_mine")["Lines"](), ROWS), Example(CODED["Backwards"](), ROWS)]
