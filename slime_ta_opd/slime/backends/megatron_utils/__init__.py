"""Training with megatron-core: model, parallel layouts, losses, optimizer, checkpoints, HF weights both ways."""
