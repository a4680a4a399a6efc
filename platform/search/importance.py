"""Which dimensions decide an objective."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from kvlab.platform.search.rows import Direction, Row
from kvlab.platform.search.space import Space

EVALUATOR = "PED-ANOVA"
"""Optuna's: it gives conditional dimensions their share, where fANOVA leaves them out."""
LEAST_TRIALS = 20
LEAST_BEST = 5
"""Its authors' advice: how many trials the best are told from the rest by."""
BEST_SHARE = 0.1


def importances(
    rows: Sequence[Row], space: Space, objectives: Mapping[str, Direction]
) -> dict[str, dict[str, float]] | None:
    """Return what share each dimension has in being among the best, for each objective by itself.

    The best are a tenth of the trials, five at the least. Shares add up to 1; dimensions with a
    single value have none.

    Returns:
        shares by path, the largest first, by objective; None below 20 complete trials.
    """
    from optuna import create_study
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    from optuna.trial import create_trial

    complete = [row for row in rows if row.state == "complete" and row.source != "repeat"]
    if len(complete) < LEAST_TRIALS:
        return None
    paths = {dimension.name: dimension.path for dimension in space.dimensions}
    best = PedAnovaImportanceEvaluator(
        target_quantile=max(BEST_SHARE, LEAST_BEST / len(complete)),
    )
    found: dict[str, dict[str, float]] = {}
    for objective, direction in objectives.items():
        study = create_study(direction=direction)
        for row in complete:
            params, distributions = space.encode(dict(row.values))
            value = row.objectives[objective]
            study.add_trial(create_trial(value=value, params=params, distributions=distributions))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a choice that one trial has taken is no news
            shares = get_param_importances(study, evaluator=best)
        ranked = sorted(shares.items(), key=lambda item: (-item[1], item[0]))
        found[objective] = {paths[name]: float(share) for name, share in ranked}
    return found
