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
    printf '$ diff -r %s %s\n' "$1" "$2"
    diff -r "$1" "$2"
    (cd "$1" && sha256sum -- *.safetensors) | sed 's/^\(.\{16\}\)[^ ]*/\1.../'
    echo "byte-identical: every file of $1 and $2"
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

say "6. To OpenAI's own layout, and back to Hugging Face's"
run gptoss-convert convert mxfp4 original --to openai
run gptoss-convert convert original mxfp4-from-original --to hf --tokenizer mxfp4
same mxfp4 mxfp4-from-original

say "Done. The checkpoints are in demo/. Next: README.md, docs/quickstart.md"
