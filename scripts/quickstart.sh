#!/usr/bin/env bash
# Trains configs/quickstart.toml on this machine's GPUs or CPU (run scripts/setup.sh first), then samples from the model.
# Arguments override keys of the file.
#
# Without a GPU: 4 CPU ranks, data parallel 2 x tensor parallel 2. With GPUs: one rank each (1, 2, 4 or 8), all data
# parallel. All of these train on the same 8 sequences per step, so the loss is the same.
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
if compgen -G "$folder/*/checkpoint/step-*" >/dev/null; then # none if checkpoints are disabled
    echo "dtron sample $folder --prompt 'def '"
    exec .venv/bin/python -m dtron sample "$folder" --prompt 'def '
fi
