"""Many trainings of one script, on this machine or on Slurm."""
