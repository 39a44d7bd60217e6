#!/usr/bin/env bash
# Everything that runs on a GPU, the most valuable first. Each part has a time limit, so the results before a failure are kept.
#
#   OUT=results benchmarks/gpu_all.sh measure PHOTOS [VGG_FILE]           about 5 minutes
#   OUT=results benchmarks/gpu_all.sh train PHOTOS MINUTES [VGG_FILE]     a training of the sd preset at 256 px
#
# VGG_FILE: LPIPS features, where loss.perceptual_weights would name one. SCALE=small tries the scripts on a CPU.
set -u
: "${OUT:?a folder for the results}"
PYTHON=${PYTHON:-python3}
HERE=$(cd "$(dirname "$0")" && pwd)
LOG=$OUT/log.txt
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1
START=$SECONDS

part() { # NAME LIMIT_SECONDS FILE COMMAND...: standard output into the file and the log, errors into the log
    local name=$1 limit=$2 file=$3 began=$SECONDS status
    shift 3
    echo "=== $name, from second $((began - START))" | tee -a "$LOG"
    timeout -k 5 "$limit" "$@" > >(tee -a "$OUT/$file" >> "$LOG") 2> >(grep -v '^W[0-9]\{4\} ' >> "$LOG")
    status=$?
    echo "=== $name: status $status, $((SECONDS - began)) s" | tee -a "$LOG"
}

measure() {
    local photos=$1 vgg=${2:-} weights=() side=256 batch=8 model=sd device=cuda models=(kl_f4 sd)
    local sizes=(256x8 512x1 512x8 1024x1) fixed=512x1 profiled=512x1 step32=4 rounds=7 compiled=("LDM / sgm, channels_last, compiled" ours "ours, compiled" "ours, channels_last, compiled")
    if [ "${SCALE:-}" = small ]; then
        side=64 batch=1 model=tiny device=cpu models=(tiny) sizes=(64x1) fixed=64x1 profiled=64x1 step32=1 rounds=2
        compiled=(ours)
    fi
    if [ -n "$vgg" ]; then weights=(--perceptual-weights "$vgg"); fi
    local step=("$PYTHON" "$HERE/step.py" --device "$device" --model "$model" --resolution "$side" "${weights[@]}")
    local infer=("$PYTHON" "$HERE/inference.py" --device "$device" --model "$model")
    # Compiles while nothing is timed; what it leaves in the cache shortens the compiled parts below.
    local warming=
    if [ "$device" = cuda ]; then
        timeout 100 "${step[@]}" --batch "$batch" --rounds 1 --variants "${compiled[@]}" > /dev/null 2>&1 &
        warming=$!
    fi
    part correctness 110 gpu_correctness.md "$PYTHON" "$HERE/gpu_correctness.py" "$photos" --device "$device" \
        --models "${models[@]}" --side "$side" "${weights[@]}" --output "$OUT/correctness_partial.md"
    rm -f "$OUT/correctness_partial.md"
    if [ -n "$warming" ]; then wait "$warming"; fi
    part "step, bfloat16" 50 step.md "${step[@]}" --batch "$batch" --rounds "$rounds" --variants "diffusers script" \
        "diffusers script, bfloat16 weights" "LDM / sgm" ours "ours, channels_last"
    part "inference, bfloat16" 60 inference.md "${infer[@]}" --sizes "${sizes[@]}" --rounds "$rounds"
    part upsampling 30 upsampling.md "$PYTHON" "$HERE/upsampling.py" --device "$device" --dtype bfloat16 --batch "$batch"
    part profile 35 profile.md "$PYTHON" "$HERE/gpu_profile.py" --device "$device" --model "$model" \
        --decode "$profiled" --step "${side}x$batch" "${weights[@]}"
    part "step, compiled" 75 step.md "${step[@]}" --batch "$batch" --rounds "$rounds" --variants "${compiled[@]}"
    if [ "$device" = cuda ]; then
        part "decode, compiled" 75 inference.md "${infer[@]}" --sizes "$fixed" --halves decode --rounds "$rounds" \
            --variants diffusers "diffusers, compiled" "diffusers, channels_last, compiled" ours "ours, compiled" \
            "ours, channels_last, compiled"
    fi
    part "step, float32" 40 step.md "${step[@]}" --batch "$step32" --rounds "$rounds" --dtype float32
    part "inference, float32" 35 inference.md "${infer[@]}" --sizes "$fixed" --rounds "$rounds" --dtype float32
}

train() {
    local photos=$1 minutes=$2 vgg=${3:-null} runs more=()
    runs=$(mktemp -d)
    if [ "${SCALE:-}" = small ]; then
        more=(model=tiny trainer=default data.resolution=64 data.batch_size=2 validate_every=5 loss.perceptual_net=alex)
        vgg=null
    fi
    part training $((${minutes%.*} * 60 + 90)) training.txt "$PYTHON" "$HERE/../train.py" \
        model=sd trainer=one_gpu data=folder "data.root=$photos" name=sd "output=$runs" "max_minutes=$minutes" \
        updates=100000 validate_every=250 data.resolution=256 data.batch_size=12 data.validation_fraction=0.05 \
        "loss.perceptual_weights=$vgg" loss.discriminator_start=500 loss.adversarial_start=1000 \
        loss.adversarial_ramp=500 loss.weights.adversarial=0.1 optim.learning_rate=2.0e-4 \
        optim.discriminator_learning_rate=1.0e-4 'optim.betas=[0.9,0.99]' optim.warmup_updates=50 \
        optim.ema_decay=0.99 trainer.enable_progress_bar=false "${more[@]}"
    cp "$runs/sd/metrics.csv" "$runs/sd/config.json" "$OUT/"
    "$PYTHON" - "$runs/sd/reconstructions" "$OUT" <<'PYTHON'
import sys
from pathlib import Path

from PIL import Image

sheets = sorted(Path(sys.argv[1]).glob("*.png"))
for name, sheet in {"first": sheets[0], "last": sheets[-1]}.items():
    picture, target = Image.open(sheet).convert("RGB"), Path(sys.argv[2]) / f"{name}_{sheet.name}"
    picture.save(target, optimize=True)
    while target.stat().st_size >= 1_000_000:
        picture = picture.resize((round(picture.width * 0.85), round(picture.height * 0.85)), Image.Resampling.LANCZOS)
        picture.save(target, optimize=True)
PYTHON
    rm -rf "$runs"
}

"$@"
sleep 1 # the last lines are on their way into the files
echo "=== all: $((SECONDS - START)) s" | tee -a "$LOG"
if [ -f "$OUT/gpu_correctness.md" ]; then grep '^|' "$OUT/gpu_correctness.md"; fi
for file in step.md inference.md; do
    if [ -f "$OUT/$file" ]; then grep -h '^|\|^## \|does not run' "$OUT/$file"; fi
done
tail -n 3 "$LOG"
