"""On-policy distillation with token selection, one loop on one screen.

The student samples and the teacher scores (SGLang, under Ray); ta_opd decides which tokens are worth teaching; Megatron-core
trains on exactly those; the new weights go back to the engines. train_async.py samples the next rollout in the meantime.
"""

import sys

from slime.ray.steps import Steps
from slime.utils import command
from slime.utils.run import Run


def train(args) -> None:
    with Run(args) as run:  # run directory, trackers, progress, and the end of every process that is started below
        steps = Steps(args, run)  # engines, teachers and Megatron ranks: placed, started, probed, first weights sent
        for rollout_id in run.rollouts(steps.start):
            batch = steps.generate(rollout_id)  # sampled, scored, selected, split over data-parallel ranks
            steps.train(rollout_id, batch)  # on the kept rows
            steps.sync(rollout_id + 1)  # the new weights into every engine
            steps.conclude(rollout_id, batch)  # evaluate, log, save
        steps.finish()


def main(argv=None) -> int:
    return command.main(train, argv)


if __name__ == "__main__":
    sys.exit(main())
