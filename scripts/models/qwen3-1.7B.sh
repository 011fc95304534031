# shellcheck shell=bash
# Shape of Qwen3-1.7B, as Megatron flags. train.py reads the shape from the model's config.json; these are checked against it when
# MODEL_SHAPE=qwen3-1.7B is set, and serve a stock slime checkout.
# shellcheck disable=SC2034
MODEL_ARGS=(
  --swiglu
  --num-layers 28
  --hidden-size 2048
  --ffn-hidden-size 6144
  --num-attention-heads 16
  --group-query-attention
  --num-query-groups 8
  --kv-channels 128
  --vocab-size 151936
  --use-rotary-position-embeddings
  --rotary-base 1000000
  --disable-bias-linear
  --normalization RMSNorm
  --norm-epsilon 1e-6
  --qk-layernorm
)
