"""What the server behind `ranks.py` imports once for all processes that it forks."""

import graftwerk.generation.command
import graftwerk.nemo.models
import graftwerk.stages.eval
import graftwerk.stages.learning
import tests.graftwerk.parallel.compare
import tests.graftwerk.tiny_families

__all__ = ["graftwerk", "tests"]
