"""One-step-asynchronous training: the next rollout is sampled, scored and selected while this one trains. Flags are train.py's.

From the second step on a rollout comes from weights that are one step old (rollout/staleness); the engines get new weights
between two rollouts, never during one. docs/architecture.md says what that means for the losses.
"""

import sys

from slime.ray.steps import Steps
from slime.utils import command
from slime.utils.run import Run


def train(args) -> None:
    with Run(args) as run:
        steps = Steps(args, run)
        ready = None
        for rollout_id in run.rollouts(steps.start):
            batch = ready or steps.generate(rollout_id)  # the first one; later ones are ready
            ahead = steps.generate_ahead(rollout_id + 1)  # with the weights that this step starts from
            steps.train(rollout_id, batch)
            ready = ahead and ahead()  # now no request is running
            steps.sync(rollout_id + 1)
            steps.conclude(rollout_id, batch)
        steps.finish()


def main(argv=None) -> int:
    return command.main(train, argv, asynchronous=True)


if __name__ == "__main__":
    sys.exit(main())
