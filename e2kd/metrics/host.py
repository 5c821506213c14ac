"""torchmetrics, or what to do to have it."""

try:
    from torchmetrics import Metric as Metric
except ImportError as error:
    raise ImportError('e2kd.metrics needs torchmetrics: pip install "e2kd[metrics]"') from error
