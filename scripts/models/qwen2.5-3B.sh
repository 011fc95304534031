# shellcheck shell=bash
# Shape of Qwen2.5-3B, as Megatron flags. train.py reads the shape from the model's config.json; these are checked against it when
# MODEL_SHAPE=qwen2.5-3B is set, and serve a stock slime checkout.
# shellcheck disable=SC2034
MODEL_ARGS=(
  --swiglu
  --num-layers 36
  --hidden-size 2048
  --ffn-hidden-size 11008
  --num-attention-heads 16
  --group-query-attention
  --num-query-groups 2
  --kv-channels 128
  --vocab-size 151936
  --use-rotary-position-embeddings
  --rotary-base 1000000
  --disable-bias-linear
  --normalization RMSNorm
  --norm-epsilon 1e-6
  --add-qkv-bias
)
