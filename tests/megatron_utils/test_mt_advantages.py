"""Base advantages against their definitions."""

import numpy as np
import pytest

from slime.backends.megatron_utils import advantages as adv
from ta_opd.errors import ConfigError, DataError


def test_group_normalised_rewards():
    out = adv.group_normalized([1.0, 0.0, 5.0, 5.0, 2.0], [0, 0, 1, 1, 2])
    np.testing.assert_allclose(out, [0.5 / (np.sqrt(0.5) + 1e-6), -0.5 / (np.sqrt(0.5) + 1e-6), 0, 0, 0])
    with pytest.raises(DataError, match="one group a reward"):
        adv.group_normalized([1.0], [0, 1])


def test_grpo_is_constant_and_reinforce_is_discounted():
    a, b = adv.token_advantages("grpo", [2.0, -1.0], [3, 2], gamma=0.5)
    assert a.tolist() == [2, 2, 2] and b.tolist() == [-1, -1]
    a, b = adv.token_advantages("reinforce_plus_plus", [2.0, -1.0], [3, 2], gamma=0.5)
    assert a.tolist() == [0.5, 1, 2] and b.tolist() == [-0.5, -1]
    with pytest.raises(ConfigError, match="grpo, reinforce_plus_plus"):
        adv.token_advantages("ppo", [1.0], [1])


def test_whitening_over_valid_tokens_of_all_ranks():
    parts = [[np.array([1.0, 2.0, 9.0], np.float32)], [np.array([3.0], np.float32)]]
    masks = [[np.array([1, 1, 0])], [np.array([1])]]
    moments = np.sum([adv.masked_moments(a, m) for a, m in zip(parts, masks, strict=True)], axis=0)
    out = [adv.whiten(a, m, tuple(moments))[0] for a, m in zip(parts, masks, strict=True)]
    joined = np.concatenate([out[0][:2], out[1]])
    assert out[0][2] == 0 and abs(joined.mean()) < 1e-6 and joined.std() == pytest.approx(1, abs=1e-5)
