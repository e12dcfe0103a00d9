"""How to load a Megatron checkpoint: Megatron-LM's arguments and Megatron-Bridge's calls for it.

Sources: Megatron-LM's arguments.py, `load_args_from_checkpoint`, which takes neither window, sinks,
activation nor YaRN from a checkpoint, and Megatron-Bridge's AutoBridge.
"""

from __future__ import annotations

import textwrap

from gptoss_convert.formats.config import Config
from gptoss_convert.formats.megatron.fields import model_fields
from gptoss_convert.formats.megatron.files import HF_FOLDER

LAUNCH = "megatron-launch.md"
"""Written into every Megatron TARGET."""


def arguments(config: Config) -> list[str]:
    """Megatron-LM's arguments for this model, each with its value; `$CHECKPOINT` is the path."""
    fields = model_fields(config)
    left, right = fields["window_size"]
    return [
        '--load "$CHECKPOINT"',
        "--ckpt-format torch_dist",
        "--use-checkpoint-args",
        "--tokenizer-type HuggingFaceTokenizer",
        f'--tokenizer-model "$CHECKPOINT/{HF_FOLDER}"',
        "--bf16",
        "--transformer-impl transformer_engine",
        f"--num-layers {fields['num_layers']}",
        f"--hidden-size {fields['hidden_size']}",
        f"--ffn-hidden-size {config.intermediate_size}",
        f"--num-attention-heads {fields['num_attention_heads']}",
        "--group-query-attention",
        f"--num-query-groups {fields['num_query_groups']}",
        f"--kv-channels {fields['kv_channels']}",
        "--add-qkv-bias",
        f"--softmax-type {fields['softmax_type']}",
        f"--window-size {left},{right}",
        f"--window-attn-skip-freq {fields['window_attn_skip_freq']}",
        f"--normalization {fields['normalization']}",
        f"--norm-epsilon {config.rms_norm_eps:g}",
        "--untie-embeddings-and-output-weights",
        f"--max-position-embeddings {config.max_position_embeddings}",
        f"--seq-length {config.original_max_position_embeddings}",
        f"--num-experts {config.num_local_experts}",
        f"--moe-ffn-hidden-size {fields['moe_ffn_hidden_size']}",
        f"--moe-router-topk {fields['moe_router_topk']}",
        f"--moe-router-score-function {fields['moe_router_score_function']}",
        "--moe-router-load-balancing-type none",
        "--moe-grouped-gemm",
        "--moe-token-dispatcher-type alltoall",
        "--expert-tensor-parallel-size 1",
        "--quick-geglu",
        f"--glu-linear-offset {fields['glu_linear_offset']}",
        f"--activation-func-clamp-value {fields['activation_func_clamp_value']}",
        f"--position-embedding-type {fields['position_embedding_type']}",
        f"--rotary-base {fields['rotary_base']}",
        "--rotary-percent 1.0",
        f"--rotary-scaling-factor {fields['yarn_rotary_scaling_factor']}",
        "--yarn-original-max-position-embeddings "
        f"{fields['yarn_original_max_position_embeddings']}",
        f"--yarn-beta-fast {fields['yarn_beta_fast']}",
        f"--yarn-beta-slow {fields['yarn_beta_slow']}",
        f"--{'' if config.rope_truncate else 'no-'}yarn-correction-range-round-to-int",
        "--no-rope-fusion",
        "--no-bias-dropout-fusion",
        "--attention-dropout 0.0",
        "--hidden-dropout 0.0",
    ]


_BRIDGE = {
    "modern": "0.4.0 or later (`--bridge modern`, the default)",
    "legacy": "before 0.4.0 (`--bridge legacy`)",
}


def launch_words(config: Config, target: str) -> list[str]:
    """Megatron-LM's arguments, to be shown when a conversion has ended."""
    words = " ".join(arguments(config))
    lines = textwrap.wrap(words, 98, break_on_hyphens=False, break_long_words=False)
    head = f"Megatron-LM's arguments for it, explained in {target}/{LAUNCH}:"
    return [head, *(f"  {line}" for line in lines)]


def launch_page(config: Config, bridge: str | None = None) -> str:
    """The same as a Markdown page; `bridge` is what run_config.yaml was written for, if known."""
    window, original = config.sliding_window, config.original_max_position_embeddings
    shell = " \\\n  ".join(arguments(config))
    written = f"`run_config.yaml` here is for {_BRIDGE[bridge]}.\n" if bridge else ""
    return f"""# Loading this checkpoint

gpt-oss {config.size}, torch_dist; the numbers below are those of this checkpoint.

## Megatron-LM with megatron-core 0.19 or later

```sh
CHECKPOINT=/path/to/this/directory
ARGS=(
  {shell}
)
```

Parallel sizes are free but for `--expert-tensor-parallel-size`: with biases it must be 1.
`--use-checkpoint-args` alone takes neither window, sinks, activation nor YaRN.
`--disable-bias-linear` drops every bias.
`--moe-layer-freq` given as a list asks for one tensor a layer (`--layout per-layer`).

## Megatron-LM with an older megatron-core

YaRN's numbers reach the model only through the ModelOpt builder's `--enable-gpt-oss`.
That sets YaRN's original length to 131072; this model has {original}.
Use megatron-core 0.19 or later, or Megatron-Bridge.

## Megatron-Bridge

{written}Bridge finds the iteration by itself, so pass the directory that holds `iter_*`:

```python
from megatron.bridge import AutoBridge

checkpoint = "/path/to/this/directory"
bridge = AutoBridge.from_hf_pretrained("/path/to/the/same/model/in-bf16")
model = bridge.load_megatron_model(checkpoint, wrap_with_ddp=False)
bridge.export_ckpt(checkpoint, "exported-to-hugging-face")
```

Give `from_hf_pretrained` BF16 files (`gptoss-convert convert MODEL DIR --to hf --dtype bf16`);
with an MXFP4 one, `export_ckpt` of every version from 0.2.2 on writes no expert weights.
It is not needed: `gptoss-convert convert` itself turns this directory, or a run's save, back.

What Bridge makes from a Hugging Face directory has, up to 0.3.1, a window of {window},0:
one token too many; this model has {window - 1},0.
"""
