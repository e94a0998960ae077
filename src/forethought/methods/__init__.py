"""A method = collect(), backward(), after_step(). A new one is a class with these in a file here, named in METHODS."""

from forethought.methods.base import Collected, Method, Sums, add, means
from forethought.methods.cpt import CPT
from forethought.methods.learning import Experience
from forethought.methods.mixed import Mixed
from forethought.methods.rlp import RLP
from forethought.methods.rpt import RPT

__all__ = ["CPT", "METHODS", "RLP", "RPT", "Collected", "Experience", "Method", "Mixed", "Sums", "add", "means"]

Named = type[RLP] | type[RPT] | type[CPT] | type[Mixed]
METHODS: dict[str, Named] = {"rlp": RLP, "rpt": RPT, "cpt": CPT, "mixed": Mixed}
