"""What workers are asked to do for a generation: messages made of what is known of it. Pure; sends nothing."""

from __future__ import annotations

from ckptd import __version__
from ckptd.checkpoint.names import image_name
from ckptd.daemon.job.generation import CurrentPlan, Generation, Seal
from ckptd.daemon.settings.config import Config
from ckptd.protocol.errors import UnexpectedError
from ckptd.protocol.messages import CommitTask, HandOverTask, PlanTask, StagedHandOver, WriteTask
from ckptd.staging.arena import slot_offset


def plan_task(path: str, generation: Generation, *, world_size: int, fixed: frozenset[int]) -> PlanTask:
    """Return the task of planning over all ranks.

    Args:
        path: Where the plan is kept.
        generation: The save; its plan, if any, is the one that the ranks in ``fixed`` have staged under.
        world_size: Number of ranks.
        fixed: Ranks that have staged already.
    """
    base = generation.plan
    staged = base.ranks() if base is not None and fixed else None
    plans: list[bytes] = []
    positions: list[bytes | None] = []
    digests: list[str] = []
    for rank in range(world_size):
        if staged is not None and base is not None and rank in fixed:
            plans.append(staged.plans[rank])
            positions.append(staged.assigned[rank])
            digests.append(base.digests[rank])
        else:
            plans.append(generation.proposals[rank].plan)
            positions.append(None)
            digests.append(generation.proposals[rank].digest)
    return PlanTask(path, plans, positions, digests)


def write_task(generation: Generation, rank: int, config: Config) -> WriteTask:
    """Return the task of making a rank's image durable."""
    seal = generation.seals[rank]
    message = seal.message
    return WriteTask(
        plan_path=plan_of(generation).path,
        rank=rank,
        arena_path=seal.arena.path,
        image_offset=slot_offset(message.slot, seal.arena.slot_bytes) + message.control_bytes,
        image_bytes=message.image_bytes,
        object_bytes=message.object_bytes,
        directory=generation.directory,
        file=image_name(rank),
        threads=config.write_threads,
        chunk_bytes=config.write_chunk_bytes,
    )


def commit_task(generation: Generation, job: str) -> CommitTask:
    """Return the task of publishing a save whose images are all durable."""
    ranks = range(generation.rules.world_size)
    return CommitTask(
        plan_path=plan_of(generation).path,
        directory=generation.directory,
        checkpoint_id=generation.rules.checkpoint_id,
        save_id=generation.save_id,
        hashes=[generation.written[rank].hashes for rank in ranks],
        frame_hashes=[generation.written[rank].frame_hash for rank in ranks],
        object_bytes=[generation.seals[rank].message.object_bytes for rank in ranks],
        overwrite=all(seal.message.overwrite for seal in generation.seals.values()),
        header={
            "version": __version__,
            "job": job,
            "incarnation": str(generation.incarnation),
            "sequence": str(generation.sequence),
            "save_id": generation.save_id,
            "world_size": str(generation.rules.world_size),
            **generation.user_header(),
        },
    )


def hand_over_task(generation: Generation) -> HandOverTask:
    """Return the task of a save that all ranks have handed over."""
    return HandOverTask([_staged(generation.seals[rank]) for rank in range(generation.rules.world_size)])


def plan_of(generation: Generation) -> CurrentPlan:
    """Return the plan that a generation is staged under; the rules ask for nothing that needs one before."""
    if generation.plan is None:
        raise UnexpectedError(f"save {generation.sequence} has no plan")
    return generation.plan


def _staged(seal: Seal) -> StagedHandOver:
    message, arena = seal.message, seal.arena
    return StagedHandOver(
        arena_path=arena.path,
        image_offset=slot_offset(message.slot, arena.slot_bytes) + message.control_bytes,
        image_bytes=message.image_bytes,
        code_offset=message.code_offset,
        code_bytes=message.code_bytes,
    )
