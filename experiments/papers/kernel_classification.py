"""FAVOR#: kernel classification with random features (Likhosherstov et al. 2023, arXiv:2302.00787).

    python experiments/papers/kernel_classification.py --out experiments/results/papers/kernel_classification.json
    python experiments/papers/kernel_classification.py --csv banknote.data --csv car.data      # tables of the UCI

Nadaraya-Watson: the class of x is the one with the largest `sum_i K(sigma x, sigma x_i)` over the training points of
the class, with the Gaussian kernel K estimated by random features, so that a prediction costs nothing that grows with
the training set. TrigRF has a sine and a cosine per direction, the others one feature. Random splits into train,
validation and test (80, 10, 10 %); sigma is chosen on the validation set, for every method by itself. Data sets that
scikit-learn ships, or tables: the label in the last column, no line of names, text as one column per value (text that
differs in most rows is no feature and is left out).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import pandas
import paper_tools
import torch
import typer
from paper_tools import Claim, below, estimate
from rich.progress import track
from sklearn import datasets
from sklearn.preprocessing import LabelEncoder, StandardScaler
from torch import Tensor

from hf_linattn import functional

SHIPPED = ("iris", "wine", "breast_cancer", "digits")
SIGMAS = tuple(10 ** (number / 4) for number in range(-8, 5))
EXACT = "exact kernel"
OLD = ("TrigRF", "PosRF", "GERF")
NEW = ("SADERF", "ADERF", "SDERF")
OURS = ("dense, centred",)
METHODS = (EXACT, *OLD, *NEW, *OURS)


class Table(NamedTuple):
    """Features `[points, columns]` and classes `[points]`."""

    points: Tensor
    classes: Tensor


# -- data -----------------------------------------------------------------------------------------------------------
def shipped(name: str) -> Table:
    found = getattr(datasets, f"load_{name}")()
    return Table(torch.from_numpy(found.data).double(), torch.from_numpy(found.target))


def read_csv(path: Path, label: int) -> Table:
    """A table: commas, semicolons, tabs or spaces between columns, no line of names. Rows with "?" are left out."""
    try:
        frame = pandas.read_csv(path, header=None, sep=r"[,;\t]\s*|\s+", engine="python", na_values="?").dropna()
    except (ValueError, UnicodeDecodeError) as error:
        paper_tools.fail(f"{path} is no table: {error}")
    if not -frame.shape[1] <= label < frame.shape[1] or frame.shape[1] < 2 or len(frame) < 30:
        paper_tools.fail(
            f"{path} must have at least 30 rows, 2 columns and a column {label} (--label); got {len(frame)} rows and"
            f" {frame.shape[1]} columns."
        )
    column = frame.columns[label]
    features = frame.drop(columns=column)
    text = features.select_dtypes(exclude="number").columns
    if any(pandas.to_numeric(features[name].iloc[1:], errors="coerce").notna().all() for name in text):
        paper_tools.fail(f"{path} begins with names of columns; leave that line out.")
    names = [name for name in text if features[name].nunique() > len(frame) / 2]
    features = pandas.get_dummies(features.drop(columns=names), columns=[name for name in text if name not in names])
    classes = LabelEncoder().fit_transform(frame[column].astype(str))
    if features.shape[1] < 1 or not 1 < classes.max() + 1 < len(frame) / 2:
        paper_tools.fail(
            f"Column {label} of {path} must be a class (--label), with a few values; got {classes.max() + 1} values in"
            f" {len(frame)} rows."
        )
    return Table(torch.from_numpy(features.to_numpy(dtype=float)), torch.from_numpy(classes))


def split(table: Table, seed: int) -> tuple[Table, Table, Table]:
    """Train, validation and test, with every column at mean 0 and variance 1 in train."""
    count = len(table.points)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split([count * 8 // 10, count * 9 // 10])
    scaler = StandardScaler().fit(table.points[parts[0]].numpy())
    train, validation, test = (
        Table(torch.from_numpy(scaler.transform(table.points[part].numpy())), table.classes[part]) for part in parts
    )
    return train, validation, test


# -- Nadaraya-Watson ------------------------------------------------------------------------------------------------
def scores(method: str, x: Tensor, y: Tensor, classes: Tensor, directions: Tensor) -> Tensor:
    """What every class gets, `[points, classes]`, up to a positive factor per point.

    Args:
        x: Points `[points, dim]`, multiplied by sigma; y: those of the training set, of these classes (one-hot).
        directions: `[features, dim]`.
    """
    half_norm = y.square().sum(-1) / 2  # K(x, y) = exp(x.y - |y|^2 / 2), up to a factor of x
    if method == EXACT:
        return torch.softmax(x @ y.mT - half_norm, -1) @ classes
    if method == "TrigRF":
        a, c = x @ directions.mT, y @ directions.mT
        return a.cos() @ (c.cos().mT @ classes) + a.sin() @ (c.sin().mT @ classes)
    x, y = x[None, None], y[None, None]
    statistics = None
    if method != "PosRF":
        variant, *centred = method.lower().split(", ")
        options = {"variant": variant, "centring": bool(centred), "is_cross": True}
        statistics = functional.favor_statistics(x, y, scaling=1.0, **options)
    a, c = functional.favor_log_features(x, y, directions, statistics)
    # Two softmaxes: what a feature has read from the training set, and what a point reads from the features.
    c = (c - half_norm[:, None]).mT
    return (torch.softmax(a + c.logsumexp(-1).unsqueeze(-2), -1) @ (torch.softmax(c, -1) @ classes))[0, 0]


def accuracy(method: str, part: Table, train: Table, sigma: float, directions: Tensor) -> float:
    classes = torch.nn.functional.one_hot(train.classes).double()
    found = scores(method, sigma * part.points, sigma * train.points, classes, directions)
    return float((found.argmax(-1) == part.classes).double().mean())


def tested(method: str, table: Table, num_features: int, seed: int) -> float:
    """Accuracy on the test set with the best sigma of the validation set, the smaller of equals."""
    train, validation, test = split(table, seed)
    drawn = functional.derive_seed("directions", seed)
    directions = functional.draw_projection(None, num_features, table.points.shape[1], seed=drawn).double()
    sigma = max(SIGMAS, key=lambda sigma: accuracy(method, validation, train, sigma, directions))
    return accuracy(method, test, train, sigma, directions)


# -- the experiment -------------------------------------------------------------------------------------------------
Found = dict[str, Tensor]  # method -> accuracy of every seed, in percent


def claims_of(found: dict[str, Found]) -> list[Claim]:
    mean = {method: torch.stack([of_data[method] for of_data in found.values()]).mean(0) for method in METHODS}
    listed = ", ".join(f"{method} {estimate(values)}" for method, values in mean.items())
    best_old = max(OLD, key=lambda method: float(mean[method].mean()))
    best_new = max(NEW, key=lambda method: float(mean[method].mean()))
    source = "FAVOR#, kernel classification"
    return [
        Claim.judged(
            source,
            "SDERF has the best accuracy on average over data sets, before TrigRF, PosRF and GERF",
            f"% of test points right: {listed}",
            [below(mean[old], mean["SDERF"]) for old in OLD],
        ),
        Claim.judged(
            source,
            "The best new method is better than the best old one",
            f"{best_new} over {best_old}: {estimate(mean[best_new] - mean[best_old])} points",
            [below(mean[best_old], mean[best_new])],
        ),
        Claim.judged(
            "ours, not in the paper",
            "The dense, centred form of this library is better still",
            f"over SDERF: {estimate(mean['dense, centred'] - mean['SDERF'])} points",
            [below(mean["SDERF"], mean["dense, centred"])],
        ),
    ]


def main(
    csv: Annotated[list[Path] | None, typer.Option(exists=True, dir_okay=False, help="Tables to use instead.")] = None,
    label: Annotated[int, typer.Option(help="Column of the class in these tables; -1 is the last.")] = -1,
    features: Annotated[int, typer.Option(min=1, help="Random features.")] = 128,
    seeds: paper_tools.Seeds = 40,
    out: paper_tools.Out = None,
) -> None:
    """Accuracy of Nadaraya-Watson classification with every method."""
    torch.set_num_threads(1)
    tables = {path.stem: read_csv(path, label) for path in csv} if csv else {name: shipped(name) for name in SHIPPED}
    found: dict[str, Found] = {}
    for name, table in track(tables.items(), description="Classifying"):
        by_method: dict[str, Sequence[float]] = {
            method: [100 * tested(method, table, features, seed) for seed in range(seeds)] for method in METHODS
        }
        found[name] = {method: torch.tensor(values, dtype=torch.float64) for method, values in by_method.items()}
    title = f"Test accuracy in percent, {features} features"
    rows = [
        {"table": title, "data": name, **{method: estimate(values) for method, values in of_data.items()}}
        for name, of_data in found.items()
    ]
    settings = {"features": features, "seeds": seeds, "sigmas": SIGMAS}
    paper_tools.finish(out, settings, rows, claims_of(found))


if __name__ == "__main__":
    typer.run(main)
