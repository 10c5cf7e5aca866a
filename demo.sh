#!/usr/bin/env bash
# The whole method on the snowglobe: world, cache, layernorm training, captions, scores, gallery.
#
#   ./demo.sh             about 5 minutes on 2 cores after the installation
#   ./demo.sh --small     the same on a few images, to see that everything runs
#   ./demo.sh --full      also the other numbers of docs/results.md: sampling for all caches, all
#                         weights of BART tuned, captions from perfect and from random tables (20
#                         minutes more)
#
# Rerunning skips finished stages. Results go into demo/, those of --small into demo/small/, or into
# the folder that DEMO names: results.json, gallery.html, runs/, checkpoints/.
set -euo pipefail
cd "$(dirname "$0")"

folder=demo train=3000 val=500 epochs=6 samples=100
case "${1:-}" in
    "" | --full) ;;
    --small) folder=demo/small train=320 val=40 epochs=2 samples=10 ;;
    *) echo "usage: ./demo.sh [--small | --full]" >&2; exit 2 ;;
esac
demo=${DEMO:-$folder}
clip=snowglobe/weights/clip bart=snowglobe/weights/bart
. ./venv.sh
export HF_HUB_OFFLINE=1
mkdir -p "$demo/done" "$demo/runs"

# stage NAME COMMAND...: runs a command unless an earlier run finished it, and records its seconds.
stage() {
    local name=$1 start
    shift
    if [ -e "$demo/done/$name" ]; then
        echo "== $name: finished earlier"
        return
    fi
    echo "== $name"
    start=$SECONDS
    "$@"
    echo "$name $((SECONDS - start))" >"$demo/done/$name"
}

# caption NAME SPLIT ARGUMENTS...: captions a split into runs/NAME.
caption() {
    local name=$1 split=$2
    shift 2
    stage "$name" python sampler.py --datadir "$demo/world" --split "$split" \
        --savedir "$demo/runs/$name" --features "$demo" --clip_model $clip --lm $bart \
        --batch_size 64 --gallery 24 "$@"
}

# add_words: makes a second cache, the mined one with the held-out words.
add_words() {
    for end in txt npy npy.json; do
        cp "$demo/cache.$end" "$demo/added.$end"
    done
    python compute_cache.py --textfile "$demo/added.txt" --embfile "$demo/added.npy" \
        --clip_model $clip --add_from snowglobe/held_out.txt
}

stage world \
    python -m snowglobe.scenes --datadir "$demo/world" --train $train --val $val
stage cache \
    python compute_cache.py --datadir "$demo/world" --textfile "$demo/cache.txt" \
    --embfile "$demo/cache.npy" --clip_model $clip --topk 150
stage words add_words
stage train \
    python trainer.py --datadir "$demo/world" --textfile "$demo/cache.txt" \
    --embfile "$demo/cache.npy" --savedir "$demo/checkpoints" --clip_model $clip --lm $bart \
    --topk 16 --batch_size 16 --lrate 7e-2 --epochs $epochs

mined=(--textfile "$demo/cache.txt" --embfile "$demo/cache.npy")
added=(--textfile "$demo/added.txt" --embfile "$demo/added.npy")
tuned=(--ckpt "$demo/checkpoints/best.safetensors")
caption untuned val2017 "${mined[@]}" --ckpt none --topk 16
caption tuned val2017 "${mined[@]}" "${tuned[@]}"
caption val_added val2017 "${added[@]}" "${tuned[@]}"
for split in near out; do
    caption ${split}_mined $split "${mined[@]}" "${tuned[@]}"
    caption ${split}_added $split "${added[@]}" "${tuned[@]}"
done
sampled=(--do_sample --num_return_sequences $samples --top_p 0.9)
caption near_added_sampled near "${added[@]}" "${tuned[@]}" "${sampled[@]}"

if [ "${1:-}" != --full ]; then
    python -m snowglobe.measure --folder "$demo"
    exit
fi

caption tuned_sampled val2017 "${mined[@]}" "${tuned[@]}" "${sampled[@]}"
for split in near out; do
    caption ${split}_mined_sampled $split "${mined[@]}" "${tuned[@]}" "${sampled[@]}"
done
caption out_added_sampled out "${added[@]}" "${tuned[@]}" "${sampled[@]}"
stage train_full \
    python trainer.py --datadir "$demo/world" --textfile "$demo/cache.txt" \
    --embfile "$demo/cache.npy" --savedir "$demo/checkpoints_full" --clip_model $clip --lm $bart \
    --trained all --topk 16 --batch_size 16 --lrate 5e-4 --epochs $epochs
full=(--ckpt "$demo/checkpoints_full/best.safetensors")
caption full val2017 "${mined[@]}" "${full[@]}"
for split in near out; do
    caption full_${split}_added $split "${added[@]}" "${full[@]}"
done
python -m snowglobe.measure --folder "$demo" --bounds --alone
