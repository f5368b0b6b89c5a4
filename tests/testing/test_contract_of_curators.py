"""The contract suite on curators that rewrite, split and encode rows; luthier's own only choose."""

from helpers.curators import BACKWARDS, LINES, made
from luthier.testing.contract.curators import *  # noqa: F403
from luthier.testing.contract.examples import Example

ROWS = [{"prompt": f"p{i}", "completion": f"first {i}\nsecond" if i % 3 else f"LINE {i}"} for i in range(9)]
CODED = made(BACKWARDS, "coded")
EXAMPLES = [Example(made(LINES, "lines_of_mine")["Lines"](), ROWS), Example(CODED["Backwards"](), ROWS)]
