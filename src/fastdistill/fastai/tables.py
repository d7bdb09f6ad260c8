"""Use estimators (scikit-learn, LightGBM, ...) as teachers for tables.

Estimators receive the rows of a batch as they were before the transforms.
"""

import numpy as np
import torch
from fastai.basics import tensor
from fastai.data.transforms import Categorize, EncodedMultiCategorize, Normalize, RegressionSetup
from fastai.tabular.core import Categorify, FillMissing, Tabular
from torch import Tensor

from ..base.errors import DistillError, few_names
from ..base.sample_seeds import seeds_of
from ..teachers.estimator import Estimator

KNOWN = Categorify, FillMissing, Normalize
TARGETS = Categorize, EncodedMultiCategorize, RegressionSetup
CHUNK = 2**16  # number of rows predicted at once


def table_of(dls) -> Tabular | None:
    """Return the training set if it is a table. Return None otherwise."""
    ds = getattr(getattr(dls, 'train', None), 'dataset', None)
    return ds if isinstance(ds, Tabular) else None


def encoding_of_table(dls) -> dict | None:
    """Return a plain-data description of how raw rows of a table become inputs. None if the data
    are not a table.

    The code of a category is its position in `classes`. Missing values and unknown categories have
    the code 0. `fill` contains the numbers that replace missing values; the category NAME_na shows
    which values were missing. `unknown` lists the transforms that can't be described in this way.
    """
    if (table := table_of(dls)) is None:
        return None
    of = {type(p): p for p in table.procs.fs}
    classes = getattr(of.get(Categorify), 'classes', {})
    normalize, fill = of.get(Normalize), getattr(of.get(FillMissing), 'na_dict', {})
    conts = list(table.cont_names) if table.with_cont else []
    unknown = [c.__name__ for c in of if c not in (*KNOWN, *TARGETS)]
    if len(table.cat_names) > len(classes):
        unknown.append('no Categorify')
    return dict(
        cat_names=[str(n) for n in table.cat_names],
        cont_names=[str(n) for n in conts],
        classes={str(n): [plain_value(v) for v in c] for n, c in classes.items()},
        means=[0.0 if normalize is None else float(normalize.means[n]) for n in conts],
        stds=[1.0 if normalize is None else float(normalize.stds[n]) for n in conts],
        fill={str(n): float(v) for n, v in fill.items()},
        unknown=unknown,
    )


def plain_value(v):
    """Convert a category to a type that JSON can store."""
    v = v.item() if isinstance(v, np.generic) else v
    return v if isinstance(v, (str, int, float)) else str(v)


class TableEstimator(Estimator):
    """An estimator that predicts batches of fastai's tables.

    On the first batch, all rows of the DataLoaders are predicted at once. For later batches, the
    predictions are looked up by the content of the rows. Unknown rows, such as perturbed rows, are
    predicted batch by batch.

    Args:
        estimator: The estimator.
        dls: DataLoaders of a table.
    """

    def __init__(self, estimator: Estimator, dls):
        vars(self).update(vars(estimator))
        self.dls, self.raw, self.known_keys = dls, RawRows(table_of(dls), estimator.frame), None

    def of_kind(self, kind):
        other = super().of_kind(kind)
        if kind != self.kind:
            other.known_keys = None
        return other

    def __call__(self, *x):
        if self.known_keys is None:
            self._predict_all()
        keys = keys_of_rows(x)
        at = np.searchsorted(self.known_keys, keys).clip(max=len(self.known_keys) - 1)
        new, out = self.known_keys[at] != keys, self.known_outputs[torch.from_numpy(at)]
        if new.any():
            rows = [o.detach().cpu()[torch.from_numpy(new)] for o in x]
            out[torch.from_numpy(new)] = self.predict(self.in_order(self.raw(*rows)))
        return out

    def anew(self, *x):
        """Predict the rows of a batch again, without looking up earlier predictions.

        If `frame` is given, known rows are looked up, because a batch may not contain all columns.
        """
        return self(*x) if self.frame is not None else self.predict(self.in_order(self.raw(*x)))

    def _predict_all(self):
        """Predict all rows of the DataLoaders.

        Rows that differ for the teacher can have equal student inputs. The predictions for such
        rows are averaged.
        """
        tables = [dl.dataset for dl in self.dls.loaders if len(dl.dataset)]
        keys = np.concatenate([keys_of_rows(table_inputs(o)) for o in tables])
        outputs = torch.cat([self._predict_table(o) for o in tables])
        self.known_keys, place, n = np.unique(keys, return_inverse=True, return_counts=True)
        sums = torch.zeros(len(n), outputs.shape[1], dtype=torch.float64)
        sums.index_add_(0, torch.from_numpy(place), outputs.double())
        self.known_outputs = (sums / torch.from_numpy(n)[:, None]).float()

    def _predict_table(self, table):
        rows = (
            self.raw.of_frame(table) if self.frame is not None else self.raw(*table_inputs(table))
        )
        rows = self.in_order(rows)
        return torch.cat(
            [self.predict(rows.iloc[i : i + CHUNK]) for i in range(0, len(rows), CHUNK)]
        )


def table_inputs(table):
    """Return the inputs of all rows of a table, as in a batch."""
    cats = tensor(table.cats).long()
    return (cats, tensor(table.conts).float()) if table.with_cont else (cats,)


def keys_of_rows(x) -> np.ndarray:
    """Compute a key from the content of each row, (B,) uint64.

    Args:
        x: Inputs of a batch, (B, columns) tensors.
    """
    keys = np.zeros(len(x[0]), np.uint64)
    for o in x:
        o = o.detach().cpu()
        words = o.float().contiguous().view(torch.int32) if o.is_floating_point() else o
        for column in words.long().numpy().T:
            keys = seeds_of(0, keys, column)
    return keys


class RawRows:
    """Converts a batch to a DataFrame with the original rows of the table.

    The transforms `Categorify`, `Normalize` and `FillMissing` are undone.

    Args:
        table: The training set.
        frame: DataFrame from which the DataLoaders were created.
    """

    def __init__(self, table: Tabular, frame=None):
        self.frame, self.procs = frame, list(table.procs.fs)
        self.cats = list(table.cat_names)
        self.conts = list(table.cont_names) if table.with_cont else []
        of = lambda cls: next((p for p in self.procs if isinstance(p, cls)), None)
        self.categorify, self.normalize, self.fill = of(Categorify), of(Normalize), of(FillMissing)
        self.filled = list(getattr(self.fill, 'na_dict', {}))
        self.flags = [f'{n}_na' for n in self.filled if f'{n}_na' in self.cats]
        if frame is None and (why := self.why_lost):
            raise DistillError(f'{why}. {GIVE_FRAME}')
        self.whole = set()
        if frame is None:
            self.whole = {
                n for n, v in self._numbers(table_inputs(table)).items() if self._is_whole(n, v)
            }

    @property
    def why_lost(self):
        """The reason why the original rows can't be computed from a batch. None if that is
        possible.
        """
        if other := [type(p).__name__ for p in self.procs if not isinstance(p, (*KNOWN, *TARGETS))]:
            return f'It is unknown how to undo {few_names(other)}'
        if len(self.flags) < len(self.filled):
            return f'FillMissing(add_col=False) does not record which cells of {few_names(self.filled)} were missing'

    def __call__(self, *x: Tensor):
        """Return the original rows of a batch as a DataFrame.

        Categories that are not in the training set become missing values.

        Args:
            *x: Inputs of the batch.
        """
        import pandas as pd

        if why := self.why_lost:
            raise DistillError(f"{why}, so the estimator can't predict perturbed rows.")
        categories = {
            n: self._categories(n, codes) for n, codes in zip(self.cats, x[0].cpu().numpy().T)
        }
        flags = {n: np.asarray(categories.pop(n) == True) for n in self.flags}  # noqa: E712 (it may be missing)
        numbers = self._numbers(x)
        for n in self.filled:
            numbers[n] = np.where(flags[f'{n}_na'], np.nan, numbers[n])
        for n in self.whole:
            numbers[n] = np.round(numbers[n])
        return self._typed(pd.DataFrame({**categories, **numbers}))

    def _categories(self, name, codes):
        import pandas as pd

        if self.categorify is None:
            return codes
        values = list(self.categorify.classes[name])[1:]  # the first class is the missing value
        if all(isinstance(v, str) for v in values):
            return pd.Categorical.from_codes(codes - 1, values)
        dtype = None if all(map(is_number, values)) else object
        return pd.Series([np.nan, *values], dtype=dtype).iloc[codes].to_numpy()

    def _numbers(self, x):
        if len(x) < 2:
            return {}
        columns = dict(zip(self.conts, x[1].detach().cpu().double().numpy().T))
        if self.normalize is None:
            return columns
        return {n: v * self.normalize.stds[n] + self.normalize.means[n] for n, v in columns.items()}

    def _is_whole(self, name, v):
        """Return True if all values of a column are integers, within single precision."""
        error = (
            1.3e-7 * np.abs(v - (0 if self.normalize is None else self.normalize.means[name]))
            + 1e-6
        )
        return error.max() < 0.4 and (np.abs(v - np.round(v)) < error).all()

    def _typed(self, rows):
        """Convert the columns to the types that they have in `frame`."""
        if self.frame is None:
            return rows
        import pandas as pd

        for n in rows.columns:
            dtype = self.frame[n].dtype
            v = rows[n]
            if pd.api.types.is_integer_dtype(dtype) and n in self.conts:
                v = v.round()
            rows[n] = v.astype(dtype)
        return rows

    def of_frame(self, table: Tabular):
        """Look up the rows of a dataset in `frame` by their index.

        Args:
            table: A dataset of the DataLoaders.
        """
        index = table.items.index
        if not self.frame.index.is_unique:
            raise DistillError(
                "frame=: its index has duplicates, so rows can't be "
                'found. Make the DataLoaders from df.reset_index().'
            )
        if len(lost := index.difference(self.frame.index)):
            raise DistillError(
                f'frame= has no rows {few_names(list(lost))}, which the DataLoaders have. Pass the '
                'table from which they were made.'
            )
        rows = self.frame.loc[index]
        self._compare(rows, table_inputs(table))
        return rows

    def _compare(self, rows, x):
        """Raise an error if the rows of the frame differ from the rows of the DataLoaders."""
        if self.why_lost:
            return
        own = self(*x)
        for n in own.columns:
            a, b = own[n].to_numpy(), rows[n].to_numpy()
            if n in self.conts:
                same = np.isclose(a.astype(float), b.astype(float), 1e-4, 1e-6, equal_nan=True)
            else:
                same = (a == b) | own[n].isna().to_numpy()
            if not same.all():
                i = int(np.argmin(same))
                raise DistillError(
                    f'frame= has different rows than the DataLoaders: {n} of the row '
                    f'{rows.index[i]} is {b[i]!r} in frame, {a[i]!r} in the DataLoaders. Pass the '
                    'table from which they were made.'
                )


GIVE_FRAME = 'Pass the table from which the DataLoaders were made: Teacher(pipeline, frame=df).'


def is_number(v):
    return isinstance(v, (int, float, np.number)) and not isinstance(v, (bool, np.bool_))
