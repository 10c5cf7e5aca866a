"""The losses of a training: a table (loss.csv) and its picture (loss.png)."""

import csv

from antarctic.files import atomic


def write_curve(folder, history):
    """Writes loss.csv and loss.png.

    history: list of (step, training loss, validation loss or None, learning rate), steps ascending.
    """
    write_table(folder / "loss.csv", history)
    write_picture(folder / "loss.png", history)


def write_table(path, history):
    with atomic(path) as file:
        writer = csv.writer(file)
        writer.writerow(("step", "train_loss", "val_loss", "lrate"))
        for step, train_loss, val_loss, rate in history:
            validation = "" if val_loss is None else f"{val_loss:.5f}"
            writer.writerow((step, f"{train_loss:.5f}", validation, f"{rate:.3e}"))


def write_picture(path, history):
    import matplotlib  # it takes a second to load, so only this function imports it
    matplotlib.use("Agg")
    from matplotlib import pyplot

    training = [(step, train_loss) for step, train_loss, _, _ in history]
    validation = [(step, val_loss) for step, _, val_loss, _ in history if val_loss is not None]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*training), label="training", linewidth=1)
    axes.plot(*zip(*validation), "o-", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.legend()
    with atomic(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
