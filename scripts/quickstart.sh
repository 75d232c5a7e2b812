#!/usr/bin/env bash
# Trains configs/quickstart.toml on what this machine has, after scripts/setup.sh, and lets the model write a few lines.
# Arguments override keys of the file.
#
# Without a GPU: 4 CPU ranks, data parallel 2 x tensor parallel 2. With GPUs: one rank each (1, 2, 4 or 8), all data
# parallel. Every one of these takes the same 8 sequences a step, so the loss is the same on all of them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -eq 0 ]; then
    ranks=4
    layout=(--parallelism.tensor_parallel_degree 2)
    export OMP_NUM_THREADS=1 # the ranks share the cores
else
    ranks=8
    while [ "$ranks" -gt "$gpus" ]; do ranks=$((ranks / 2)); done
    layout=(--training.local_batch_size $((8 / ranks)))
fi

set -- train.py --job.config_file configs/quickstart.toml "${layout[@]}" "$@"
echo "torchrun --standalone --nproc-per-node $ranks $*"
.venv/bin/python -m torch.distributed.run --standalone --nproc-per-node "$ranks" "$@"

folder=outputs
while [ $# -gt 0 ]; do
    if [ "$1" = --job.dump_folder ] && [ $# -gt 1 ]; then folder=$2; fi
    shift
done
if compgen -G "$folder/*/checkpoint/step-*" >/dev/null; then # none where checkpoints were turned off
    echo "dtron sample $folder --prompt 'def '"
    exec .venv/bin/python -m dtron sample "$folder" --prompt 'def '
fi
