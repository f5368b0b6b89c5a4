"""The contract of luthier's methods, for ours."""

from luthier_focal import Focal

from luthier.testing.contract import *  # noqa: F403

EXAMPLES = [Focal(gamma=1.0)]
