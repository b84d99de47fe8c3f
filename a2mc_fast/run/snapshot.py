"""A trainer's state, out of a checkpoint and into one."""

from __future__ import annotations

from a2mc_fast.data.identity import differing
from a2mc_fast.errors import require
from a2mc_fast.ranks import checksum
from a2mc_fast.run import checkpoint
from a2mc_fast.trainer import Trainer


def restore(trainer: Trainer, saved: checkpoint.Checkpoint) -> None:
    """Continue from a checkpoint. `InputError` if it was trained on other data."""
    changed = " and ".join(differing(saved.data, trainer.clips.identity))
    require(not changed, f"{saved.path} was trained on other data: the {changed} are not those of now")
    saved.restore(trainer.model)
    saved.restore_optimizer(trainer.model, trainer.optimizer)
    trainer.scaler.load_state_dict(saved.scaler)


def state(trainer: Trainer, step: int, progress: dict[str, float]) -> checkpoint.Checkpoint:
    """What a checkpoint holds after `step` steps: the live tensors, not copies.

    `InputError` if the ranks do not hold the same.
    """
    model, clips = trainer.model, trainer.clips
    if not trainer.world.alone:
        trainer.world.require_equal(
            checksum(list(model.state_dict().values())),
            f"{{ranks}} no longer held what rank 0 held after step {step}, as may happen on unlike GPUs: "
            "continue from the last checkpoint on equal ones, with --resume",
        )
    return checkpoint.Checkpoint(
        step=step,
        config=trainer.config,
        skeleton=clips.skeleton,
        persons=clips.num_persons,
        classes=model.classifier.out_features,
        data=clips.identity,
        progress=dict(progress),
        scaler=trainer.scaler.state_dict(),
        recurrence=model.query.encoder.recurrence,
        tensors=checkpoint.tensors_of(model, trainer.optimizer),
    )
