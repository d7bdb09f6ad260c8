"""Use estimators of scikit-learn, LightGBM, XGBoost or CatBoost as teachers.

Any object with a method `predict_proba` or `predict` works.
"""

import copy
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from ..base.errors import DistillError, few_names
from ..base.outputs import as_plain


def is_estimator(o: Any) -> bool:
    """Return True for an object with `predict_proba` or `predict` that is not itself callable."""
    if isinstance(o, (type, nn.Module)) or callable(o):
        return False
    return any(callable(getattr(o, k, None)) for k in ('predict_proba', 'predict'))


def load_estimator(path: Any) -> Any:
    """Load an estimator. The file is a pickle, so loading it can run arbitrary code.

    Args:
        path: Path of a file that `joblib.dump` wrote.
    """
    import joblib

    try:
        model = joblib.load(path)
    # subtle: unpickling a file of a different format may raise any error
    except Exception as e:
        reason = ' '.join(f'{type(e).__name__}: {e}'.split())
        raise DistillError(
            f'{path} could not be loaded ({reason}). Did joblib.dump write it? Can everything in it be '
            'imported here: packages, your own functions and classes?'
        ) from e
    if is_estimator(model):
        return model
    raise DistillError(
        f'{path} contains an object of type {type(model).__name__}, which has neither '
        "predict_proba nor predict: joblib.dump(pipeline, 'trees.joblib') writes a fitted "
        'estimator.'
    )


class Estimator:
    """A fitted estimator as a function of a batch.

    The estimator returns probabilities of classes or labels, or numbers for regression. A batch is a table, a
    tensor (B, columns), or a dict with a tensor for each column.

    Args:
        model: Estimator with `predict_proba`, or with only `predict`.
        kind: Kind of the predictions, as in `Teacher`.
        frame: For fastai tables, a DataFrame with the rows before any transform.
    """

    def __init__(self, model: Any, kind: str = 'softmax', frame: Any = None) -> None:
        self.model, self.kind, self.frame = model, kind, frame
        steps = getattr(model, 'steps', None)
        self.__name__ = type(steps[-1][1] if isinstance(steps, list) else model).__name__

    def of_kind(self, kind: str) -> Self:
        """Return the same estimator for a different kind of outputs."""
        other = copy.copy(self)
        other.kind = kind
        return other

    @property
    def classes(self) -> list | None:
        """Classes in the order of the outputs. None for regression and for estimators with
        several outputs.
        """
        own: Any = getattr(self.model, 'classes_', None)
        return None if isinstance(own, list) or np.ndim(own) != 1 else np.asarray(own).tolist()

    @property
    def columns(self) -> list[str] | None:
        """Names of the columns on which the estimator was fitted. None if the names are unknown."""
        for k in ('feature_names_in_', 'feature_names_', 'feature_name'):
            names = getattr(self.model, k, None)
            if (names := names() if callable(names) else names) is not None:
                return list(map(str, names))
        return None

    @property
    def identity(self) -> bytes:
        """Bytes that identify the fitted estimator."""
        import joblib

        return joblib.hash(self.model).encode()

    def __call__(self, *x: Any, **named: Any) -> Tensor:
        return self.predict(self._table(x, named))

    # used for timing. The subclass for fastai tables predicts again here instead of looking up
    # outputs
    anew = __call__

    def predict(self, rows: Any) -> Tensor:
        """Predict probabilities or numbers, (B, C).

        Args:
            rows: A table or an array.
        """
        read = dict(softmax=self._classes, sigmoid=self._labels, regression=self._numbers)
        try:
            given = read[self.kind](rows)
        except Exception as e:
            # subtle: scikit-learn, LightGBM and XGBoost raise a subclass of scikit-learn's error
            if not any(c.__name__ == 'NotFittedError' for c in type(e).__mro__):
                raise
            raise DistillError(
                f'The teacher {self.__name__} is not fitted, so it predicts nothing. Call its fit '
                'with the training data first.'
            ) from e
        # copy the array, which may be read-only
        return torch.from_numpy(np.array(given, dtype=np.float64)).float()

    def _classes(self, rows: Any) -> Any:
        if hasattr(self.model, 'predict_proba'):
            if isinstance(p := self.model.predict_proba(rows), list):
                raise DistillError(
                    f'{self.__name__} predicts {len(p)} outputs, but the student predicts one of '
                    'several classes. Pass a function that returns the probabilities of one '
                    "output: Teacher(fn, outputs='probs')."
                )
            return p
        v, classes = np.asarray(self.model.predict(rows)), self.classes
        if classes is not None and v.ndim == 1:
            return v[:, None] == np.asarray(classes)[None]
        if v.ndim == 2:
            return v
        if v.dtype.kind == 'f' and v.min() >= 0 and v.max() <= 1:
            return np.stack([1 - v, v], 1)
        raise DistillError(
            f'{self.__name__} has no predict_proba and no classes_, and its predict returns '
            f'{v.dtype} from {v.min()} to {v.max()}, so its classes are unknown. Give a function that '
            "returns a probability for each class: Teacher(fn, outputs='probs')."
        )

    def _labels(self, rows: Any) -> Any:
        if not hasattr(self.model, 'predict_proba'):
            return self._numbers(rows)
        p = self.model.predict_proba(rows)
        if isinstance(p, list):
            # an estimator that was fitted on a single class has only one column
            yes = lambda classes: [i for i, c in enumerate(classes) if c]
            return np.stack(
                [o[:, yes(classes)].sum(1) for o, classes in zip(p, self.model.classes_)], 1
            )
        two = p.shape[1] == 2 and len(self.classes or ()) == 2
        return p[:, 1:] if two and not getattr(self.model, 'multilabel_', False) else p

    def _numbers(self, rows: Any) -> np.ndarray:
        v = np.asarray(self.model.predict(rows))
        return v.reshape(len(v), -1)

    def _table(self, x: Any, named: Any) -> Any:
        if self.frame is not None:
            raise DistillError(
                "frame= is for fastai's tables. In your own training loop, the batch contains the "
                f'rows that {self.__name__} takes: use Teacher(model).'
            )
        if len(x) == 1 and not named and not isinstance(x[0], (Tensor, Mapping)):
            return x[0]
        if len(x) == 1 and isinstance(x[0], Mapping):
            x, named = (), {**x[0], **named}
        import pandas as pd

        if named and not x:
            columns = {k: as_plain(v).cpu().numpy() for k, v in named.items()}
            return self.in_order(pd.DataFrame(columns))
        if len(x) != 1 or x[0].dim() != 2:
            shapes = ', '.join(str(tuple(getattr(o, 'shape', ()))) for o in x)
            raise DistillError(
                f'{self.__name__} takes a table: one tensor (B, columns), or a dict with a tensor for each column. '
                f'This batch has inputs of shape {shapes}. Give a function that makes the table: '
                "Teacher(lambda *x: pipeline.predict_proba(table(x)), outputs='probs'), and return a tensor."
            )
        rows, names = as_plain(x[0]).detach().cpu().numpy(), self.columns
        if names is None or rows.shape[1] != len(names):
            return rows
        return self.in_order(pd.DataFrame(dict(zip(names, rows.T))))

    def in_order(self, table: Any) -> Any:
        """Return the columns on which the estimator was fitted, in the same order.

        Args:
            table: A DataFrame.

        Raises:
            DistillError: Columns are missing. The message lists them.
        """
        names = self.columns
        if names is None:
            if hasattr(self.model, 'n_features_in_'):
                raise DistillError(
                    f'{self.__name__} was fitted on an array, so the names of its columns are unknown. '
                    'Fit it on a DataFrame.'
                )
            return table
        if missing := [n for n in names if n not in table.columns]:
            raise DistillError(
                f'{self.__name__} was fitted on the columns {few_names(names)} ({len(names)}), but the rows '
                f'have no {few_names(missing)}. They have {few_names(list(table.columns), 20)}. In fastai, '
                'Teacher(pipeline, frame=df) takes them from the table that the DataLoaders were made '
                'from.'
            )
        return table[names]
