"""On-policy distillation with token selection, one loop on one screen.

The student samples and the teacher scores (SGLang, under Ray); ta_opd decides which tokens are worth teaching; Megatron-core
trains on exactly those; the new weights go back to the engines.
"""

import sys

from slime.ray.actor_group import create_actor_group
from slime.ray.placement import create_placement
from slime.ray.rollout import create_rollout_manager
from slime.utils.arguments import parse_args
from slime.utils.plan import print_plan
from slime.utils.run import Run
from slime.utils.validation import validate
from ta_opd.errors import TaOpdError


def train(args) -> None:
    with Run(args) as run:  # run directory, trackers, progress, and the end of every process that is started below
        placement = run.owns(create_placement(args))
        rollout = run.owns(create_rollout_manager(args, placement))  # student engines and teacher servers, starting
        actors = run.owns(create_actor_group(args, placement))  # Megatron ranks, starting at the same time
        start = run.resume(actors.init(), rollout)
        rollout.wait_ready()  # servers up, probe passed
        with run.phase("sync"):
            actors.update_weights(rollout, version=start)
        if run.eval_due(start - 1):
            run.evaluate(rollout, start - 1)

        for rollout_id in run.rollouts(start):
            batch = rollout.generate(rollout_id)  # sampled, scored, selected, split over data-parallel ranks
            if args.exact_selection:  # the teacher is on the trainer's ranks: exact H, D and C come from there
                with run.phase("score"):
                    exact = actors.exact_metrics(batch)
                batch = rollout.select(batch, exact)
            if not args.debug_rollout_only:
                with run.phase("train"):
                    batch.metrics |= actors.train(rollout_id, batch)
                with run.phase("sync"):
                    actors.update_weights(rollout, version=rollout_id + 1)
            if run.eval_due(rollout_id):
                run.evaluate(rollout, rollout_id)
            run.log(rollout_id, batch)
            if run.save_due(rollout_id):  # after the log: a resumed run has no hole in its metrics
                with run.phase("save"):
                    actors.save(rollout_id, extra=run.state(rollout))
        if args.save_hf and not args.debug_rollout_only:
            actors.save_hf(args.save_hf)


def main(argv=None) -> int:
    try:
        args = validate(parse_args(argv))
        if args.dry_run:
            print_plan(args)
        else:
            train(args)
    except TaOpdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: every process of this run has been stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
