# shellcheck shell=bash
# Shape of Qwen3-8B, as Megatron flags. train.py reads the shape from the model's config.json; these are checked against it when
# MODEL_SHAPE=qwen3-8B is set, and serve a stock slime checkout.
# shellcheck disable=SC2034
MODEL_ARGS=(
  --swiglu
  --num-layers 36
  --hidden-size 4096
  --ffn-hidden-size 12288
  --num-attention-heads 32
  --group-query-attention
  --num-query-groups 8
  --kv-channels 128
  --vocab-size 151936
  --use-rotary-position-embeddings
  --rotary-base 1000000
  --disable-bias-linear
  --normalization RMSNorm
  --norm-epsilon 1e-6
  --untie-embeddings-and-output-weights
  --qk-layernorm
)
