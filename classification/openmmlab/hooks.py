"""What is said beside a toolchain's own log."""

import logging
from collections.abc import Callable, Sequence

import numpy as np
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.logging import print_log

NAMED = 5  # classes


class NameAbsentClasses(Hook):
    """Has mmseg's IoUMetric name classes without a pixel of the ground truth.

    Their IoU is NaN, which the mean leaves out, or 0 where they are predicted.
    """

    def before_val_epoch(self, runner) -> None:
        _name_absent(runner.val_evaluator)

    def before_test_epoch(self, runner) -> None:
        _name_absent(runner.test_evaluator)


def _name_absent(evaluator: Evaluator) -> None:
    for metric in evaluator.metrics:
        kinds = {kind.__name__ for kind in type(metric).__mro__}
        if "IoUMetric" in kinds and "compute_metrics" not in vars(metric):
            metric.compute_metrics = _naming(metric, metric.compute_metrics)


def _naming(metric: BaseMetric, compute: Callable[[list], dict]) -> Callable[[list], dict]:
    def named(results: list) -> dict:
        found = compute(results)
        if found and results:  # not of format_only
            _, union, _, labels = (sum(areas).numpy() for areas in zip(*results, strict=True))
            if message := absent(metric.dataset_meta["classes"], labels, union):
                print_log(message, logger="current", level=logging.WARNING)
        return found

    return named


def absent(classes: Sequence[str], labels: np.ndarray, union: np.ndarray) -> str | None:
    """Of classes that no map has: which, and of how many the mean is.

    Args:
        classes: all.
        labels: pixels of each in the maps.
        union: of those and of pixels that were predicted.
    """
    missing = [repr(name) for name, pixels in zip(classes, labels, strict=False) if not pixels]
    if not missing:
        return None
    more = f" and {len(missing) - NAMED} more" if missing[NAMED:] else ""
    one = len(missing) == 1
    return (
        f"{'class' if one else 'classes'} {', '.join(missing[:NAMED])}{more} {'is' if one else 'are'} in no map; mIoU "
        f"is the mean of {np.count_nonzero(union)} of {len(classes)} classes"
    )
