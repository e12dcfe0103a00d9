#!/bin/sh
# Build the wheel, install it outside the checkout, and see that it holds the checkout's tables and
# kernels, and converts.
set -eu
cd "$(dirname "$0")/.."
checkout=$PWD
away=$(mktemp -d)
trap 'rm -rf "$away"' EXIT

echo "building the wheel"
.venv/bin/python -m build --wheel --outdir "$away" . >"$away/build.log" 2>&1 || {
    cat "$away/build.log"
    exit 1
}
.venv/bin/python -m venv "$away/venv"
"$away/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    -c constraints.txt "$away"/*.whl

cd "$away"
PATH="$away/venv/bin:$PATH"
tables=$(python -c 'import gptoss_convert.mappings as m; print(m.__path__[0])')
case $tables in "$checkout"*) echo "error: the checkout's tables were imported: $tables"; exit 1 ;; esac
for table in "$checkout"/mappings/*.toml "$checkout"/mappings/*/*.toml; do
    cmp "$table" "$tables/${table#"$checkout"/mappings/}"
done
test -f "$(dirname "$tables")/py.typed"
test -f "$(dirname "$tables")/witness/texts/ids.json"
python - <<CHECK
from gptoss_convert.codecs.mxfp4 import library
assert not library.SOURCE.exists(), "the wheel holds a source, whose age would be asked for"
assert library.load() or not "$(command -v "${CC:-cc}")", "the wheel lacks the kernels"
CHECK
gptoss-convert synth mxfp4 --model tiny
gptoss-convert convert mxfp4 bf16 --to hf --dtype bf16
gptoss-convert convert bf16 back --to hf --dtype mxfp4
diff -r -x gptoss-convert.json mxfp4 back
GPTOSS_CONVERT_KERNELS=numpy gptoss-convert convert bf16 numpy --to hf --dtype mxfp4
diff -r -x gptoss-convert.json mxfp4 numpy
gptoss-convert convert mxfp4 megatron --to megatron
gptoss-convert convert megatron from-megatron --to hf --dtype mxfp4
diff -r -x gptoss-convert.json mxfp4 from-megatron
echo "the wheel holds the checkout's tables and kernels, and converts"
