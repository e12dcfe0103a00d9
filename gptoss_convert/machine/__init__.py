"""What the machine gives: memory, processors, files, threads, the processes of one run."""
