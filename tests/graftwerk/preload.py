"""What the server behind `ranks.py` imports once for all processes that it forks."""

import graftwerk.stages.eval
import graftwerk.stages.learning

__all__ = ["graftwerk"]
