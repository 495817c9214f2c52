#!/usr/bin/env bash
# Everything from nothing, on a CPU: environment, data, tokenizer, warm start, reinforcement learning, report.
#
#   bash examples/quickstart/run.sh [section.key=value ...]     settings for the reinforcement learning
#
# SEED=1 picks another seed. Finished parts are kept; remove runs/quickstart to start over.
set -euo pipefail
cd "$(dirname "$0")/../.."
seed="${SEED:-0}"
out=runs/quickstart

part() { printf '\n== %s (%dm%02ds)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

part "environment"
bash tools/setup_env.sh
python=.venv/bin/python
vlrl=.venv/bin/megatron-vlrl
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

if [[ ! -d $out/shards ]]; then
  part "data: real handwritten digits on canvases, five tasks"
  rm -rf $out/raw $out/shards.part
  $python examples/quickstart/make_digits.py --out $out/raw --train 20000 --held-out 128 --seed "$seed"
  for split in train heldout; do
    $vlrl data prepare --jsonl $out/raw/$split.jsonl --images $out/raw/images \
      --out $out/shards.part/$split --samples-per-shard 4000
  done
  mv $out/shards.part $out/shards
fi

if [[ ! -f $out/model/config.json ]]; then
  part "model: a tokenizer trained on the data, and a tiny Qwen3-VL with random weights"
  $python examples/quickstart/make_model.py --data $out/raw/train.jsonl --out $out/model --seed "$seed"
fi

if [[ ! -d $out/warmstart/hf ]]; then
  part "warm start on demonstrations"
  $vlrl train --config examples/quickstart/warmstart.yaml run.seed="$seed"
fi

part "reinforcement learning"
$vlrl train --config examples/quickstart/rl.yaml run.seed="$seed" "$@"

folder=$out
for setting in "$@"; do
  [[ $setting != run.folder=* ]] || folder=${setting#run.folder=}
done
part "done"
echo "report:  $folder/report.html"
echo "model:   $folder/hf"
