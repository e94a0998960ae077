"""A method = collect(), backward(), after_step(). A new one is a class with these in a file here, named in METHODS."""

from forethought.algo.base import Collected, Method, Sums, add, means
from forethought.algo.cpt import CPT
from forethought.algo.mixed import Mixed
from forethought.algo.policy_gradient import Experience
from forethought.algo.rlp import RLP
from forethought.algo.rpt import RPT

__all__ = ["CPT", "METHODS", "RLP", "RPT", "Collected", "Experience", "Method", "Mixed", "Sums", "add", "means"]

Named = type[RLP] | type[RPT] | type[CPT] | type[Mixed]
METHODS: dict[str, Named] = {"rlp": RLP, "rpt": RPT, "cpt": CPT, "mixed": Mixed}
