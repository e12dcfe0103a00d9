#!/bin/bash
# Converts on several machines: sbatch --nodes 4 slurm.sh SOURCE TARGET OPTIONS...
# TARGET must lie on a file system that all machines share.
#SBATCH --job-name gptoss-convert
#SBATCH --nodes 2
#SBATCH --ntasks-per-node 1
#SBATCH --cpus-per-task 16
#SBATCH --mem 32G
#SBATCH --time 02:00:00
#SBATCH --requeue

set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" \
  --nproc-per-node "${RANKS_PER_NODE:-4}" \
  --rdzv-backend c10d \
  --rdzv-id "$SLURM_JOB_ID" \
  --rdzv-endpoint "$first:${PORT:-29500}" \
  -m gptoss_convert convert "$@" --rank-log "ranks-$SLURM_JOB_ID"
