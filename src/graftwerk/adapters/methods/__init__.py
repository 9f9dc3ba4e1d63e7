"""One file for each method: its parts, their formulas and how they lie under tensor parallelism."""
