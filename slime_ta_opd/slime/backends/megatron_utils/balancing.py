"""Load balancing of experts (--moe-aux-loss-coeff): a mean over the tokens of the optimizer step, the same at every layout.

megatron-core multiplies each micro-batch's balancing loss by its tokens and leaves the division to the end of the step, where it
divides all gradients by the step's tokens. Here losses come divided by their own counts and nothing is divided at the end, so
the balancing loss is divided by the step's tokens where it is made.

Shape letters: T tokens that reach a router on this rank, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from slime.backends.megatron_utils import distributed
from slime.backends.megatron_utils.packing import MicroBatch


class BalancedRouter(TopKRouter):
    """megatron-core's router with that loss. `step_tokens`: of all micro-batches and replicas, set before each step."""

    step_tokens = 1.0

    def _apply_aux_loss(self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False) -> Tensor:
        """Adds to probs' gradient that of coefficient x (tokens of the micro-batch / step_tokens) x E sum_e f_e P_e, with f_e the share
        of choices and P_e the mean score of expert e in the micro-batch (Switch Transformers, arXiv 2101.03961, eq. 4).

        scores_for_aux_loss: [T, E]; routing_map: bool [T, E]. T may differ between the ranks that share a micro-batch.
        """
        chosen_E = routing_map.sum(0).float()
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(chosen_E, group=self.tp_cp_group)
        per_token = self.get_aux_loss_coeff("aux_loss") * self.config.num_moe_experts / self.step_tokens
        return MoEAuxLossAutoScaler.apply(probs, (scores_for_aux_loss.sum(0) * chosen_E).sum() / chosen_E.sum() * per_token)


def set_step_tokens(layers: Iterable, batches: list[MicroBatch]) -> None:
    """Tells each router of this pipeline stage how many tokens reach it in this step, padding too (collective where it is needed)."""
    routers = [(layer.is_last, layer.mlp.router) for layer in layers if isinstance(getattr(layer.mlp, "router", None), BalancedRouter)]
    if not any(router.get_aux_loss_coeff("aux_loss") for _, router in routers):
        return
    rows = sum((b.layout.last_layer_rows if b.layout.select_rows else b.tokens).numel() for b in batches)
    parts = distributed.gather_objects((sum(b.tokens.numel() for b in batches), rows))
    copies = mpu.get_tensor_model_parallel_world_size() * mpu.get_pipeline_model_parallel_world_size()
    everywhere, in_last = (sum(x) / copies for x in zip(*parts, strict=True))
    for is_last, router in routers:
        router.step_tokens = in_last if is_last else everywhere
