"""Jobs through submitit: one task per rank, on SLURM or on this machine."""
