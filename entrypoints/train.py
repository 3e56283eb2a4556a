"""Trains one round of a recipe, evaluates it on val and logs its model."""

from pathlib import Path

from aliprod import interruption
from aliprod.recipe import override, read, replaced
from entrypoints.command import Minutes, command, data_folder, recipe_path, refuse
from tracking import copies, origin, rounds, runs


def main(
    recipe: str, round: str, data: str, init: str, overrides: str, resume: str, minutes: Minutes, work: Path
) -> None:
    """recipe: a name or a .toml file; round: of it, else the first; data: a folder, or demo; init: in place of the
    round's; overrides: fields of the round, as "lr=3e-4 epochs=2"; resume: a run's id, which says all the others but
    data, if that was moved since; minutes: to stop after, 0 for none; work: for checkpoints, cached embeddings and what
    waits to be sent."""
    if resume:
        refuse("resume takes everything from its run", round=round, init=init, overrides=overrides)
        job = rounds.Job.load(resume, work, "" if data == "demo" else str(data_folder(data, work)))
    else:
        rows = read(recipe_path(recipe))
        row = override(rows.row(round), overrides)
        row = replaced(row, {"init": init} if init else {}, "")
        job = rounds.Job(rows.name, copies.tables_here(row, work), str(data_folder(data, work)))
    with runs.start(f"{job.recipe}/{job.row.name}", work, beside=resume) as run:
        try:
            interruption.raise_on_signals(minutes)
            evaluation = rounds.train(run, job, work, resume)
        except KeyboardInterrupt:
            again = origin.again("train", runs.experiment_of(run.id), resume=run.id, work=work)
            raise KeyboardInterrupt(f"; go on with: {again}") from None
    print(rounds.summary(run, evaluation))
    print(f"browse:    {origin.pages()}")


if __name__ == "__main__":
    command(main)
