# shellcheck shell=bash
# Shape of DeepSeek-R1-Distill-Qwen-14B, as Megatron flags. train.py reads the shape from the model's config.json; these are checked against it when
# MODEL_SHAPE=r1-distill-qwen-14B is set, and serve a stock slime checkout.
# shellcheck disable=SC2034
MODEL_ARGS=(
  --swiglu
  --num-layers 48
  --hidden-size 5120
  --ffn-hidden-size 13824
  --num-attention-heads 40
  --group-query-attention
  --num-query-groups 8
  --kv-channels 128
  --vocab-size 152064
  --use-rotary-position-embeddings
  --rotary-base 1000000
  --disable-bias-linear
  --normalization RMSNorm
  --norm-epsilon 1e-5
  --untie-embeddings-and-output-weights
  --add-qkv-bias
)
