"""The contract suite: tests that every method must pass. To run them on your own methods, write a test module:

    from luthier.testing.contract import *  # noqa: F403
    EXAMPLES = [Focal(gamma=1.0)]

An example is a small instance. If it needs its own rows, model or tuner, write Example(method, rows=...).
"""

from luthier.testing.contract.answers import *  # noqa: F403
from luthier.testing.contract.computes import *  # noqa: F403
from luthier.testing.contract.curators import *  # noqa: F403
from luthier.testing.contract.evaluators import *  # noqa: F403
from luthier.testing.contract.examples import CONSTANT as CONSTANT
from luthier.testing.contract.examples import PADDED as PADDED
from luthier.testing.contract.examples import SETTINGS as SETTINGS
from luthier.testing.contract.examples import Example as Example
from luthier.testing.contract.examples import Four as Four
from luthier.testing.contract.examples import as_examples as as_examples
from luthier.testing.contract.methods import *  # noqa: F403
from luthier.testing.contract.objectives import *  # noqa: F403
from luthier.testing.contract.pipelines import *  # noqa: F403
from luthier.testing.contract.protocols import *  # noqa: F403
from luthier.testing.contract.tasks import *  # noqa: F403
from luthier.testing.contract.translators import *  # noqa: F403
from luthier.testing.contract.tuners import *  # noqa: F403
from luthier.testing.contract.tuners import learns_a_task_head as learns_a_task_head

__all__ = [n for n in dir() if n.startswith("test_")]
