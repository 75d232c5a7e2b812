"""Tools around many machines, which the core never imports: preflight, Slurm jobs, sweeps."""
