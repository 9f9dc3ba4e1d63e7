"""The back ends: one file and one script template each."""

# cluster_type -> the file of this folder that defines `Backend`; imported only when it is asked for.
CLUSTERS = {"bcm": "slurm", "bcp": "bcp", "interactive": "interactive"}
