"""What a Slurm cluster needs beside the ranks: inspection of nodes, the fate of a job, and locks on folders."""
