#!/usr/bin/env bash
# An evaluation as a Slurm job array, a job a part, and a job after them that joins the parts:
#
#   bash examples/slurm.sh 16 out --model hf-extrapolate --model_args pretrained=org/name,dtype=bfloat16 --tasks extrapolate
#
# submits both; the arguments after the number of parts and the folder (which all machines see) are lm_eval's. A job that is pre-empted is
# queued again and goes on where it was. One that failed is run again by what its log begins with, or by
#
#   sbatch --array=3 examples/slurm.sh 16 out --model …
#
# and joined by `harness-ext merge out/part-* --output_path out`, which says what is missing.
#SBATCH --job-name=extrapolate
#SBATCH --output=%x-%A-%a.log
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --requeue
set -euo pipefail
parts=$1 out=$2
shift 2
if [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
    array=$(sbatch --parsable --array="1-$parts" "$0" "$parts" "$out" "$@")
    sbatch --dependency="afterok:${array%%;*}" --job-name=merge --output="%x-%j.log" \
        --wrap "harness-ext merge $(printf %q "$out")/part-* --output_path $(printf %q "$out")"
    exit
fi
set -x
# Where unfinished answers are kept: the next try may be on another machine.
export HARNESS_EXT_CACHE="${HARNESS_EXT_CACHE:-$out/unfinished}"
harness-ext run --shard "$SLURM_ARRAY_TASK_ID/$parts" "$@" --output_path "$out/part-$SLURM_ARRAY_TASK_ID" --log_samples
