#!/bin/sh
# A tour: a small synthetic checkpoint through every conversion and back. Leaves it in demo/.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
rm -rf demo
mkdir demo
cd demo

say() { printf '\n== %s\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }

same() {
    # The manifest names the source of each, so it differs.
    run diff -r -x gptoss-convert.json "$1" "$2"
    run sha256sum "$1"/*.safetensors "$2"/*.safetensors
    echo "byte-identical: every file of $1 and $2 but the manifest"
}

say "1. A small GPT-OSS checkpoint with random values, as Hugging Face stores it (MXFP4)"
run gptoss-convert synth mxfp4 --model tiny

say "2. What is it? Read from the headers alone"
run gptoss-convert inspect mxfp4

say "3. The plan of a conversion to BF16; nothing is written"
run gptoss-convert convert mxfp4 bf16 --to hf --dtype bf16 --dry-run

say "4. MXFP4 -> BF16: exact, and the block scales are kept in a sidecar"
run gptoss-convert convert mxfp4 bf16 --to hf --dtype bf16
run ls bf16 bf16/mxfp4-scales

say "5. BF16 -> MXFP4 again"
run gptoss-convert convert bf16 mxfp4-again --to hf --dtype mxfp4
same mxfp4 mxfp4-again

say "6. The same model in OpenAI's own layout -> Hugging Face's: the weights of step 1"
run gptoss-convert synth original --model tiny --format openai
run gptoss-convert convert original from-original --to hf --tokenizer mxfp4
run cmp mxfp4/model.safetensors from-original/model.safetensors
echo "byte-identical: the weights of mxfp4 and from-original"

say "7. Hugging Face's layout -> OpenAI's again"
run gptoss-convert convert from-original original-again --to openai
same original original-again

say "8. Are they one model? Every value of both, decoded, bit by bit"
run gptoss-convert verify original bf16 --level values

say "9. ... and would it notice? One bit of one weight of a copy is flipped"
cp -R bf16 damaged
flip() { printf '\\%o' $(($(od -An -tu1 -j "$2" -N1 "$1") ^ 1)); }
weights=damaged/model.safetensors
at=$(($(stat -c %s "$weights") / 2))
printf "$(flip "$weights" "$at")" | dd of="$weights" bs=1 seek="$at" conv=notrunc status=none
run gptoss-convert verify original damaged --level values || echo "status $?: different"

if python -c "import torch" 2>/dev/null; then
    say "10. The same question to the model itself: both through one forward pass"
    run gptoss-convert verify original bf16
else
    echo "torch is not installed: the logits of both are not compared"
fi

say "Done. The checkpoints are in demo/. Next: README.md, docs/quickstart.md"
